"""Files are written whole, what is not ours is left alone, and two processes do not mix."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from neftune_dist.config import UserError
from neftune_dist.system import storage

DEADLINE_SECONDS = 60


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_written_files_follow_the_umask(umask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        storage.write(tmp_path / "a.json", "{}")
        with storage.hold(tmp_path / "lock", "busy"):
            lock = (tmp_path / "lock").stat().st_mode
    finally:
        os.umask(before)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == lock & 0o777 == mode


def test_link_is_replaced_and_its_target_not_written(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / "link").symlink_to("theirs")
    storage.write(tmp_path / "link", "ours", durable=True)
    assert (tmp_path / "theirs").read_text() == "theirs"
    assert (tmp_path / "link").read_text() == "ours" and not (tmp_path / "link").is_symlink()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "kept").touch()
    (tmp_path / "to_folder").symlink_to("folder")
    storage.remove(tmp_path / "to_folder")
    assert not os.path.lexists(tmp_path / "to_folder") and (tmp_path / "folder" / "kept").exists()


def test_failed_write_leaves_the_old_file_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    storage.write(tmp_path / "a.json", "old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        storage.write(tmp_path / "a.json", "new", durable=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "old"


def test_second_process_is_refused_and_a_dead_one_lets_go(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    code = (
        "import sys, time; from pathlib import Path; from neftune_dist.system import storage\n"
        "with storage.hold(Path(sys.argv[1]), 'busy'): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="in use"), storage.hold(lock, "in use", seconds=0.3):
        pass
    holder.kill()
    holder.wait()
    with storage.hold(lock, "in use", seconds=0):
        pass
    assert not lock.exists()


def test_removed_lock_file_is_not_held(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its last holder removes it between our opening and our locking it."""
    lock, flock, calls = tmp_path / "lock", fcntl.flock, list[int]()

    def late(descriptor: int, operation: int) -> None:
        if not calls:
            lock.unlink()
        calls.append(operation)
        flock(descriptor, operation)

    monkeypatch.setattr(storage.fcntl, "flock", late)
    with storage.hold(lock, "busy"), lock.open() as other, pytest.raises(BlockingIOError):
        flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert len(calls) == 2


def test_no_two_processes_hold_a_lock_at_once(tmp_path: Path) -> None:
    """Though each removes the lock's file when it lets go."""
    code = (
        "import sys; from pathlib import Path; from neftune_dist.system import storage\n"
        "folder = Path(sys.argv[1])\n"
        "for _ in range(200):\n"
        "    with storage.hold(folder / 'lock', 'busy', seconds=50):\n"
        "        number = int((folder / 'number').read_text())\n"
        "        (folder / 'number').write_text(str(number + 1))\n"
    )
    (tmp_path / "number").write_text("0")
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(3)]
    assert [process.wait(DEADLINE_SECONDS) for process in processes] == [0, 0, 0]
    assert (tmp_path / "number").read_text() == "600"


def test_folder_with_foreign_files_is_not_claimed(tmp_path: Path) -> None:
    folder, names = tmp_path / "project", ("config.yaml", "answers[0-9]*.jsonl")
    folder.mkdir()
    (folder / "slurm-17.out").touch()
    storage.claim(folder, names, "ours.json", "run_dir=project")
    (folder / "config.yaml").write_text("a run's, now")
    storage.claim(folder, names, "ours.json", "run_dir=project")
    for name in ("config.yaml", "answers12.jsonl", "model-00001-of-00002.safetensors", ".git"):
        other = tmp_path / f"with {name}"
        other.mkdir()
        (other / name).symlink_to("nowhere")
        with pytest.raises(UserError, match=f"run_dir=x holds {name}, but no ours.json"):
            storage.claim(other, names, "ours.json", "run_dir=x")
        assert [path.name for path in other.iterdir()] == [name]


def test_root_and_home_are_not_claimed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in ("/", "/tmp/..", tmp_path):
        with pytest.raises(UserError, match="is a root or home directory"):
            storage.claim(Path(folder), (), "ours.json", f"run_dir={folder}")
    assert not [*tmp_path.iterdir()]


def test_children_end_with_the_parent_that_is_killed(tmp_path: Path) -> None:
    """A study that is killed alone leaves no evaluation that fills the same folder."""
    child = (
        "import os, signal, sys, time; from pathlib import Path\n"
        "def stop(*_): Path(sys.argv[1], 'stopped').touch(); sys.exit()\n"
        "signal.signal(signal.SIGTERM, stop); Path(sys.argv[1], 'started').touch(); time.sleep(60)"
    )
    parent = (
        "import sys; from neftune_dist.study.grid import execute\n"
        f"execute([sys.executable, '-c', {child!r}, sys.argv[1]])"
    )
    study = subprocess.Popen([sys.executable, "-c", parent, str(tmp_path)])
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not (tmp_path / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    study.send_signal(signal.SIGKILL)
    study.wait()
    while not (tmp_path / "stopped").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
