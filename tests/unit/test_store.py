"""What publishing leaves on disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

from neftune_dist.checkpoint import choice, flat, marked_folder, store
from neftune_dist.checkpoint.flat import WrittenFile
from neftune_dist.checkpoint.listing import rows, table
from neftune_dist.config import CheckpointConfig, UserError, with_checksum
from neftune_dist.engine.base import MASTER, FlatShard
from tests.support.disk_log import disk_log

STATE: dict[str, Any] = {
    "progress": {},
    "num_steps": 9,
    "identity": {"architecture": {}},
    "shapes": {},
    "config": {"engine": {"name": "fsdp2"}},
    "world_size": 1,
    "versions": {"neftune_dist": "0"},
}


def publish(
    run_dir: Path,
    step: int,
    settings: CheckpointConfig,
    best_step: int | None = None,
    progress: dict[str, Any] | None = None,
) -> Path:
    """A checkpoint of one file that tells the step; its folder."""
    run_dir.mkdir(parents=True, exist_ok=True)
    partial = store.begin(run_dir, step)
    content = f"all the tensors of step {step}".encode()
    (partial / "__0_0.distcp").write_bytes(content)
    written = WrittenFile(len(content), xxhash.xxh3_128(content).hexdigest())
    state = {"step": step, **STATE}
    if progress is not None or best_step is not None:
        state["progress"] = {"best_step": best_step} if progress is None else progress
    files = {"__0_0.distcp": written}
    store.publish(partial, json.dumps(state), files, settings, best_step)
    return partial.with_suffix("")


def test_prune_keeps_the_best(tmp_path: Path) -> None:
    settings = CheckpointConfig(keep=1)
    for step, best in ((1, 1), (2, 2), (3, 2), (4, 2)):
        publish(tmp_path, step, settings, best)
    assert steps(tmp_path) == [4, 2]
    publish(tmp_path, 5, settings, 5)
    assert steps(tmp_path) == [5]


def test_best_is_what_the_newest_checkpoint_says(tmp_path: Path) -> None:
    settings = CheckpointConfig(keep=0)
    for step, best in ((1, 1), (2, 1), (3, 1)):
        publish(tmp_path, step, settings, best)
    assert choice.choose(tmp_path, "best").step == 1


@pytest.mark.parametrize("progress", [{}, {"best_step": None}, {"best_step": 0}])
def test_run_without_a_better_evaluation_has_no_best(
    progress: dict[str, Any], tmp_path: Path
) -> None:
    publish(tmp_path, 4, CheckpointConfig(), progress=progress)
    with pytest.raises(UserError, match="up to step 4 no evaluation was better"):
        choice.choose(tmp_path, "best")


def names(run_dir: Path, fate: str) -> list[str]:
    return [entry.path.name for entry in store.entries(run_dir) if entry.fate == fate]


def steps(run_dir: Path) -> list[int]:
    return [checkpoint.step for checkpoint in store.find_all(run_dir)]


@pytest.mark.parametrize(
    ("keep", "keep_every_steps", "kept"),
    [
        (1, 0, [5]),
        (2, 0, [5, 4]),
        (9, 0, [5, 4, 3, 2, 1]),
        (0, 0, [5, 4, 3, 2, 1]),
        (0, 2, [5, 4, 3, 2, 1]),
        (1, 2, [5, 4, 2]),
        (2, 3, [5, 4, 3]),
    ],
)
def test_prune_keeps_by_count_and_interval(
    keep: int, keep_every_steps: int, kept: list[int], tmp_path: Path
) -> None:
    for step in range(1, 6):
        publish(tmp_path, step, CheckpointConfig(keep=keep, keep_every_steps=keep_every_steps))
    assert steps(tmp_path) == kept
    for checkpoint in store.find_all(tmp_path):
        assert checkpoint.first_flaw() is None
        assert checkpoint.trainer_state() == {"step": checkpoint.step, **STATE}
    left = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert left == {"latest", *(f"step_{step:08d}" for step in kept)}
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000005\n"


def test_prune_keeps_newest_sound_checkpoint(tmp_path: Path) -> None:
    """A flipped bit changes no size: by sizes alone step 8 is still the newest, and with one to
    keep, it was kept in place of the step that a resumed run had just published."""
    settings = CheckpointConfig(keep=1)
    shard = publish(tmp_path, 8, settings) / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[3] ^= 1
    shard.write_bytes(content)
    publish(tmp_path, 6, settings)
    publish(tmp_path, 7, settings)
    eight, seven = store.find_all(tmp_path)
    assert (eight.step, seven.step) == (8, 7)
    assert eight.first_flaw() == "__0_0.distcp"
    assert seven.first_flaw() is None
    assert publish(tmp_path, 8, settings).with_name("step_00000008.damaged").is_dir()
    assert names(tmp_path, store.PUT_ASIDE) == ["step_00000008.damaged"]
    assert steps(tmp_path) == [8]
    assert store.find_all(tmp_path)[0].first_flaw() is None


def test_shortened_file_makes_a_checkpoint_damaged(tmp_path: Path) -> None:
    settings = CheckpointConfig(keep=0)
    publish(tmp_path, 1, settings)
    shard = publish(tmp_path, 2, settings) / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert steps(tmp_path) == [1]
    assert [folder.name for folder, _ in store.damaged_folders(tmp_path)] == ["step_00000002"]
    # An older model must not pass for the newest.
    with pytest.raises(UserError, match="--step 1"):
        choice.choose(tmp_path, None)
    assert choice.choose(tmp_path, 1).step == 1


def test_manifest_of_another_step_is_refused(tmp_path: Path) -> None:
    settings = CheckpointConfig(keep=0)
    one, two = (publish(tmp_path, step, settings) for step in (1, 2))
    shutil.copy(one / "manifest.json", two / "manifest.json")
    with pytest.raises(UserError, match=r"manifest\.json"):
        store.Checkpoint(two).files()


@pytest.mark.parametrize("key", STATE)
def test_state_of_a_version_that_recorded_less_is_refused(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(STATE, key)
    folder = publish(tmp_path, 1, CheckpointConfig())
    with pytest.raises(UserError, match=rf"{key}.*another version of neftune_dist made"):
        store.Checkpoint(folder).trainer_state()
    assert "trainer_state.json cannot be read" in rows(tmp_path, verify=True)[0].state


def test_manifest_without_trainer_state_makes_a_checkpoint_damaged(tmp_path: Path) -> None:
    folder = publish(tmp_path, 1, CheckpointConfig())
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {name: file for name, file in manifest["files"].items() if name != store.STATE}
    (folder / "manifest.json").write_text(json.dumps(with_checksum({"step": 1, "files": files})))
    assert store.find_all(tmp_path) == []
    with pytest.raises(UserError, match=r"manifest\.json"):
        store.Checkpoint(folder).trainer_state()


def test_changed_trainer_state_is_refused(tmp_path: Path) -> None:
    folder = publish(tmp_path, 1, CheckpointConfig())
    (folder / store.STATE).write_text('{"step": 3}')  # of the same length
    with pytest.raises(UserError, match=store.STATE):
        store.Checkpoint(folder).trainer_state()


def test_unfinished_checkpoint_is_never_read_and_removed_by_next_save(tmp_path: Path) -> None:
    settings = CheckpointConfig(keep=1)
    publish(tmp_path, 1, settings)
    (store.begin(tmp_path, 2) / "__0_0.distcp").write_bytes(b"half")
    assert steps(tmp_path) == [1]
    assert names(tmp_path, store.UNFINISHED) == ["step_00000002.partial"]
    publish(tmp_path, 3, settings)
    assert steps(tmp_path) == [3]
    assert names(tmp_path, store.UNFINISHED) == []


def make_odd(root: Path, elsewhere: Path) -> dict[str, str]:
    """What saves did not make, among the checkpoints: name and content or target."""
    (root / "step_notes.txt").write_text("mine")
    (root / "step_00000001").write_text("a file")
    (root / "step_00000002").symlink_to("nowhere")
    (root / "step_00000009").mkdir()
    (root / "step_00000009" / "thesis.txt").write_text("mine")
    for ending in (".partial", ".damaged"):
        (root / f"step_00000003{ending}").write_text("a file")
        (root / f"step_00000004{ending}").symlink_to(elsewhere)
        (root / f"step_00000005{ending}").mkdir()
        (root / f"step_00000005{ending}" / "thesis.txt").write_text("mine")
    (root / "step_00000005.partial-2").mkdir()
    (root / "step_00000005.partial-2" / "notes.txt").write_text("mine, too")
    return contents(root)


def contents(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): str(path.readlink()) if path.is_symlink() else path.read_text()
        for path in root.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def test_foreign_entries_are_kept_and_named_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Links too: `rmtree` refuses them, and every later save failed."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "__0_0.distcp").write_text("mine")
    root = tmp_path / "run" / "checkpoints"
    root.mkdir(parents=True)
    before = make_odd(root, elsewhere)
    shown = "\n".join(table(rows(tmp_path / "run", verify=True)))
    assert shown.count("passed over: a link that leads nowhere") == 1
    assert shown.count("passed over: not made by a save") == 7
    settings = CheckpointConfig(keep=1)
    for step in range(3, 9):
        publish(tmp_path / "run", step, settings)
    assert steps(tmp_path / "run") == [8]
    assert (elsewhere / "__0_0.distcp").read_text() == "mine"
    after = contents(root)
    kept = {name: text for name, text in before.items() if ".partial" not in name}
    assert kept.items() <= after.items()
    # What stood where a save had to write was put aside.
    assert after["step_00000003.partial-2"] == "a file"
    assert after["step_00000005.partial-2/notes.txt"] == "mine, too"
    assert after["step_00000005.partial-3/thesis.txt"] == "mine"
    told = capsys.readouterr().err
    for name in ("step_notes.txt", "step_00000001", "step_00000002", "step_00000003.damaged"):
        assert told.count(f"checkpoints/{name} is passed over: ") == 1


def test_checkpoint_that_a_run_removes_while_it_is_looked_at_is_left_out_of_the_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path, 1, CheckpointConfig(keep=0))
    gone = publish(tmp_path, 2, CheckpointConfig(keep=0))
    (gone / "mine").touch()
    look, looks = store._flaw, []

    def look_then_remove(folder: Path) -> str | None:
        found = look(folder)
        looks.append(folder)
        if looks.count(gone) == 1:  # before it is seen whether it holds something else
            shutil.rmtree(gone, ignore_errors=True)
        return found

    monkeypatch.setattr(store, "_flaw", look_then_remove)
    (row,) = rows(tmp_path, verify=True)
    assert row.step == "1" and looks.count(gone) >= 1


@pytest.mark.parametrize("fate", ["complete", "unfinished", "odd", "damaged"])
def test_entry_that_a_run_removes_meanwhile_is_left_out_of_the_list(
    fate: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path, 1, CheckpointConfig(keep=0))
    gone = publish(tmp_path, 2, CheckpointConfig(keep=0))
    if fate == "unfinished":
        gone = gone.rename(gone.with_suffix(".partial"))
    if fate == "odd":
        gone = gone.rename(gone.with_name("step_odd"))
    if fate == "damaged":
        (gone / "manifest.json").unlink()
    look = store.entries

    def look_then_remove(run_dir: Path) -> Any:
        found = look(run_dir)
        shutil.rmtree(gone)
        return found

    monkeypatch.setattr(store, "entries", look_then_remove)
    (row,) = rows(tmp_path, verify=True)
    assert row.step == "1"


def test_linked_checkpoint_is_read_and_only_its_link_removed(tmp_path: Path) -> None:
    settings, run_dir = CheckpointConfig(keep=2), tmp_path / "run"
    moved = publish(run_dir, 1, settings).rename(tmp_path / "step_00000001")
    (run_dir / "checkpoints" / "step_00000001").symlink_to(moved)
    publish(run_dir, 2, settings)
    assert steps(run_dir) == [2, 1]
    publish(run_dir, 3, settings)
    assert steps(run_dir) == [3, 2]
    assert store.open_checkpoint(moved).first_flaw() is None
    # One of the same step as the link's, which was passed over as damaged.
    (moved / "manifest.json").unlink()
    (run_dir / "checkpoints" / "step_00000004").symlink_to(moved)
    publish(run_dir, 4, settings)
    assert steps(run_dir) == [4, 3] and (moved / "__0_0.distcp").exists()


def test_checkpoint_with_foreign_file_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = CheckpointConfig(keep=1)
    folder = publish(tmp_path, 1, settings)
    (folder / "export").mkdir()
    (folder / "export" / "model.safetensors").write_text("mine")
    for step in (2, 3):
        publish(tmp_path, step, settings)
    assert steps(tmp_path) == [3, 1]
    assert (folder / "export" / "model.safetensors").read_text() == "mine"
    assert capsys.readouterr().err.count("passed over: it holds export, which no save wrote") == 1


def test_failure_to_prune_fails_no_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    settings = CheckpointConfig(keep=1)
    publish(tmp_path, 1, settings)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuse)
        publish(tmp_path, 2, settings)
        assert steps(tmp_path) == [2]
    assert "warning: an old checkpoint was not removed: " in capsys.readouterr().err
    publish(tmp_path, 3, settings)
    assert names(tmp_path, store.UNFINISHED) == []


def save(run_dir: Path, step: int) -> None:
    """A checkpoint of one tensor, which the one before it makes room for."""
    partial = store.begin(run_dir, step)
    shard = FlatShard(MASTER, "a", 0, torch.full((9,), float(step)), 9)
    store.publish(partial, "{}", flat.write(partial, [shard]), CheckpointConfig(keep=1))


def test_publish_follows_the_disk(tmp_path: Path) -> None:
    """A power cut between any two operations leaves no name without its content."""
    root, name = "checkpoints", "step_00000002"
    partial, final = f"{root}/{name}.partial", f"{root}/{name}"
    save(tmp_path, 1)
    with disk_log(tmp_path) as log:
        save(tmp_path, 2)
    files = {f"{partial}/{path.name}" for path in (tmp_path / final).iterdir()}
    assert len(files) == 4  # tensors, their description, the trainer's state, the manifest
    manifest = f"{partial}/manifest.json"
    (written,) = (op for op in log.operations if op[0] == "rename" and op[2] == manifest)
    assert files - {manifest} <= log.safe_contents[log.index(*written)], "the manifest is last"
    published = log.index("rename", partial, final)
    assert files <= log.safe_contents[published] and files <= log.safe_names[published]
    latest = f"{root}/latest"
    (replaced,) = (op for op in log.operations if op[0] == "rename" and op[2] == latest)
    pointed = log.index(*replaced)
    assert replaced[1] in log.safe_contents[pointed], "latest is never half written"
    assert final in log.safe_names[pointed], "latest names what is there"
    doomed = f"{root}/step_00000001.partial"
    renamed, removed = log.index("rename", doomed[:-8], doomed), log.index("remove", doomed)
    assert pointed < renamed < removed
    assert latest in log.safe_names[renamed], "the old one goes when the new one is safe"
    published_names = {path for op, path, *_ in log.operations if op == "remove"}
    assert final not in published_names and doomed[:-8] not in published_names


def test_replaced_folder_follows_the_disk(tmp_path: Path) -> None:
    for content in ("one", "two"):
        with (
            disk_log(tmp_path) as log,
            marked_folder.replaced(tmp_path / "export", "mark.json") as folder,
        ):
            (folder / "a.txt").write_text(content)
    new, old = ".export.neftune-new", ".export.neftune-old"
    published = log.index("rename", new, "export")
    files = {f"{new}/a.txt", f"{new}/mark.json"}
    assert files <= log.safe_contents[published] and files <= log.safe_names[published]
    assert log.index("rename", "export", old) < published
    for i, (operation, path, *_) in enumerate(log.operations):
        if operation == "remove" and path.startswith(old):
            assert i > published and "export" in log.safe_names[i]
    assert (tmp_path / "export" / "a.txt").read_text() == "two"
