"""The doctor sees what is there, says what is wrong, and never fails itself."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

from neftune_dist import doctor as module
from neftune_dist.distributed import World
from neftune_dist.doctor import OK, WARNING, WRONG, Finding, doctor

DEADLINE_SECONDS = 120
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
CHECKS = ["python", "torch", "deepspeed", "transformers", "datasets", "omegaconf", "compiler"]
CHECKS += ["gpu", "host memory", "run directory", "hub", "collectives"]


@pytest.fixture(autouse=True)
def alone_and_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def table(text: str) -> dict[str, str]:
    """Check: status. Every line must be a finding."""
    lines = text.splitlines()
    assert all(line.split()[0] in (OK, WARNING, WRONG) for line in lines)
    return {line[9:23].strip(): line.split()[0] for line in lines}


def only(findings: Iterator[Finding]) -> Finding:
    (finding,) = findings
    return finding


def test_a_sound_machine_is_well_and_nothing_is_left_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor(tmp_path / "not" / "there") == 0
    statuses = table(capsys.readouterr().out)
    assert list(statuses) == CHECKS
    assert WRONG not in statuses.values()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("found", "seen"), [("1.13.1", "1.13.1"), (None, "not installed")])
def test_an_old_or_missing_package_is_wrong(
    found: str | None,
    seen: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fake(name: str) -> str:
        if name != "torch":
            return version(name)
        if found is None:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr(module, "version", fake)
    assert doctor(tmp_path) == 2
    out = capsys.readouterr().out
    assert [name for name, status in table(out).items() if status == WRONG] == ["torch"]
    (line,) = [line for line in out.splitlines() if line.startswith(WRONG)]
    assert seen in line and 'install "torch>=' in line


def test_a_run_directory_below_a_file_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert doctor(tmp_path / "file" / "runs") == 2
    captured = capsys.readouterr()
    assert table(captured.out)["run directory"] == WRONG
    assert "--run-dir" in captured.out and "Traceback" not in captured.out + captured.err


def test_the_probe_of_the_disk_is_64_mib_and_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda number: sizes.append(os.fstat(number).st_size))
    assert "MiB/s" in only(module.check_run_dir(tmp_path)).seen
    assert sizes == [64 * 2**20]
    assert list(tmp_path.iterdir()) == []


def test_a_missing_compiler_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert only(module.check_compiler()).status == WARNING
    (tmp_path / "mine").write_text("")
    (tmp_path / "mine").chmod(0o755)
    monkeypatch.setenv("CXX", "mine -O2")
    finding = only(module.check_compiler())
    assert (finding.status, finding.seen) == (OK, str(tmp_path / "mine"))


def test_gpus_are_named_with_memory_and_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    assert only(module.check_gpus()).seen == "none: CPU" or Path("/dev/nvidia0").exists()
    devices = [
        SimpleNamespace(name="New", total_memory=80 * 2**30, major=9),
        SimpleNamespace(name="Old", total_memory=16 * 2**30, major=7),
    ]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
    monkeypatch.setattr(torch.cuda, "get_device_properties", devices.__getitem__)
    assert [(f.status, f.check, f.seen) for f in module.check_gpus()] == [
        (OK, "gpu 0", "New, 80 GiB, bf16"),
        (WARNING, "gpu 1", "Old, 16 GiB, no bf16"),
    ]


def test_the_hub_is_not_asked_in_offline_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    finding = only(module.check_hub())
    assert finding.status == OK and "HF_HUB_OFFLINE" in finding.seen


@pytest.mark.parametrize(("answer", "status"), [(200, OK), (404, OK), (503, WARNING)])
def test_a_hub_that_answers_is_reached(
    answer: int, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(answer)
            self.end_headers()

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.handle_request, daemon=True)
        thread.start()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert only(module.check_hub()).status == status
        thread.join(5)


@pytest.mark.parametrize("listening", [True, False])
def test_a_hub_that_is_silent_or_away_is_a_warning(
    listening: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if listening:
            listener.listen()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.setattr(module, "_HUB_SECONDS", 0.5)
        finding = only(module.check_hub())
    assert finding.status == WARNING and "not reached" in finding.seen


def test_a_name_server_that_is_silent_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    session = SimpleNamespace(head=lambda url, timeout: released.wait(30))
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: session)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(module, "_HUB_SECONDS", 0.5)
    began = time.monotonic()
    finding = only(module.check_hub())
    released.set()
    assert time.monotonic() - began < 10
    assert finding.status == WARNING and "no answer" in finding.seen


def test_a_check_that_fails_is_a_line_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> int:
        raise RuntimeError("no driver\nand a long story")

    monkeypatch.setattr(torch.cuda, "device_count", broken)
    assert doctor(tmp_path) == 2
    captured = capsys.readouterr()
    statuses = table(captured.out)
    assert list(statuses) == CHECKS and statuses["gpu"] == WRONG
    assert "RuntimeError: no driver" in captured.out and "long story" not in captured.out


def test_a_wrong_sum_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(World, "gather", lambda self, values: [[2.0, 0.0]])
    assert doctor(tmp_path) == 2
    assert "the sum is 2 instead of 1" in capsys.readouterr().out


@pytest.mark.parametrize("rank", ["0", "1"])
def test_ranks_that_cannot_meet_are_a_line_without_a_traceback(
    rank: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(module, "_RANK_0_FINISHES_SECONDS", 0)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")  # but no MASTER_ADDR
    assert doctor(tmp_path) == 2
    captured = capsys.readouterr()
    speaks, silent = (captured.out, captured.err) if rank == "0" else (captured.err, captured.out)
    assert table(speaks)["collectives"] == WRONG and f"rank {rank}: " in speaks
    assert silent == ""


def test_a_rank_that_never_comes_is_not_waited_for_without_end(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    code = (
        "from neftune_dist import doctor; from pathlib import Path; import sys;"
        "doctor._COLLECTIVES_SECONDS = 3; sys.exit(doctor.doctor(Path(sys.argv[1])))"
    )
    group = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=ENVIRONMENT | group,
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
    )
    assert done.returncode == 2
    assert table(done.stdout)["collectives"] == WRONG and "no answer" in done.stdout


def under_torchrun(run_dir: Path) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    verb = ["-m", "neftune_dist", "doctor", "--run-dir", str(run_dir)]
    return subprocess.run(
        [sys.executable, *launcher, *verb],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
    )


def test_under_torchrun_all_ranks_take_part_and_one_speaks(tmp_path: Path) -> None:
    done = under_torchrun(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(table(done.stdout)) == CHECKS
    assert len(done.stdout.splitlines()) == len(CHECKS)
    assert "2 on cpu" in done.stdout


def test_under_torchrun_what_rank_0_sees_ends_all_ranks_alike(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = under_torchrun(tmp_path / "file" / "runs")
    assert done.returncode != 0
    assert table(done.stdout)["run directory"] == WRONG
    assert "doctor.py" not in done.stderr  # no traceback of ours in torchrun's report
    assert "exitcode  : 2" in done.stderr
