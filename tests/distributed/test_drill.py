"""A short sample of the fault drill and the resume matrix (`drill.py`), and the other faults.

The whole was run; its outcome: drill.md.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from neftune_dist.checkpoint import store
from tests.distributed import drill
from tests.support import tiny_model


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return drill.make_config(tmp_path_factory.mktemp("drill"))


@pytest.mark.parametrize("engine", ["replicated", "fsdp2", "zero-3"])
def test_kills_at_random_operations_lose_nothing_published(
    engine: str, config: Path, tmp_path: Path
) -> None:
    outcome = drill.drill(config, tmp_path, engine, 4, random.Random(3))
    assert outcome.total() == 4


@pytest.fixture(scope="module")
def sources(config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[drill.Layout, Path]:
    folder = tmp_path_factory.mktemp("matrix")
    return {
        layout: drill.save_at_two(config, folder, layout)
        for layout in (drill.Layout("fsdp2", 3), drill.Layout("zero-1", 2))
    }


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (drill.Layout("fsdp2", 3), drill.Layout("hsdp", 2)),
        (drill.Layout("fsdp2", 3), drill.Layout("replicated", 2)),
        (drill.Layout("fsdp2", 3), drill.Layout("zero-3", 2)),
        (drill.Layout("zero-1", 2), drill.Layout("fsdp2", 1)),
        (drill.Layout("zero-1", 2), drill.Layout("zero-2", 3)),
    ],
    ids=str,
)
def test_continues_under_another_layout(
    one: drill.Layout,
    other: drill.Layout,
    config: Path,
    sources: dict[drill.Layout, Path],
    tmp_path: Path,
) -> None:
    drill.continue_from(config, sources[one], other, tmp_path)


@pytest.fixture(scope="module")
def finished(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a whole run on one rank, all checkpoints kept."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    tiny_model.train(config, run_dir, "checkpoint.keep=0")
    return run_dir


@pytest.fixture(scope="module")
def both(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a whole run on two ranks that saved while it trained."""
    run_dir = tmp_path_factory.mktemp("both") / "run"
    tiny_model.train(config, run_dir, "checkpoint.mode=async", ranks=2)
    return run_dir


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "trainer_state.json"])
@pytest.mark.parametrize("damage", [flip_a_bit, truncate])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(
    name: str, damage: object, config: Path, copy: Path, finished: Path
) -> None:
    newest = store.find_all(copy)[0].folder
    assert callable(damage)
    damage(newest / name)
    done = tiny_model.run_forked("train", config, f"run_dir={copy}", "checkpoint.keep=0")
    assert done.returncode == 0, done.stderr
    warning = next(line for line in done.stdout.splitlines() if line.startswith("warning"))
    assert str(newest) in warning and name in warning
    assert f"step {drill.STEPS - 1} of {drill.STEPS}" in done.stdout
    drill.compare(copy, finished)
    assert newest.with_name(newest.name + ".damaged").is_dir()


def test_without_verifying_only_sizes_are_looked_at(config: Path, copy: Path) -> None:
    flip_a_bit(store.find_all(copy)[0].folder / "__0_0.distcp")
    words = [f"run_dir={copy}", "checkpoint.verify=false"]
    done = tiny_model.run_forked("train", config, *words)
    assert "nothing is left to train" in done.stdout


def test_with_all_damaged_nothing_is_overwritten(config: Path, copy: Path) -> None:
    for checkpoint in store.find_all(copy):
        flip_a_bit(checkpoint.folder / "__0_0.distcp")
    before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    done = tiny_model.run_forked("train", config, f"run_dir={copy}", ranks=2)
    assert done.returncode == 2
    assert "damaged checkpoints only" in done.stderr
    assert "Traceback" not in done.stderr
    assert {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()} == before


@pytest.fixture(scope="module")
def constant(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a constant learning rate on two ranks: `begun` with three steps, and a `whole` run."""
    folder = tmp_path_factory.mktemp("constant")
    for name, words in (("begun", ["train.max_steps=3"]), ("whole", [])):
        tiny_model.train(config, folder / name, "optim.schedule=constant", *words, ranks=2)
    return folder


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_full_disk_ends_the_run_and_keeps_what_was_published(
    mode: str, config: Path, constant: Path, tmp_path: Path
) -> None:
    """Both ranks end with one sentence; what was published before stays and is gone on from."""
    run_dir = tmp_path / "run"
    shutil.copytree(constant / "begun", run_dir)
    words = ["optim.schedule=constant", f"checkpoint.mode={mode}"]
    full = drill.SmallFiles(100_000)
    done = tiny_model.run_forked(
        "train", config, f"run_dir={run_dir}", *words, ranks=2, before=full
    )
    assert done.returncode == 2
    assert "could not be written: File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert store.find_all(run_dir)[0].step == 3
    assert tiny_model.untimed(
        tiny_model.train(config, run_dir, *words, ranks=2)
    ) == tiny_model.untimed(tiny_model.steps(constant / "whole"))


@pytest.mark.parametrize("engine", ["fsdp2", "zero-3"])
def test_training_goes_on_while_a_save_is_written(
    engine: str, config: Path, tmp_path: Path
) -> None:
    """And what is written is the state of the step that was saved, not of the one under way."""
    words = [*drill.ENGINES[engine], "checkpoint.keep=0"]
    slow, sync = tmp_path / "slow", tmp_path / "sync"
    done = tiny_model.run_forked(
        "train",
        config,
        f"run_dir={slow}",
        *words,
        "checkpoint.mode=async",
        ranks=2,
        before=drill.SlowDisk(slow),
    )
    assert done.returncode == 0, done.stderr
    tiny_model.train(config, sync, *words, "checkpoint.mode=sync", ranks=2)
    pairs = list(zip(store.find_all(slow), store.find_all(sync), strict=True))
    assert [one.step for one, _ in pairs] == list(range(drill.STEPS, 0, -1))
    for one, other in pairs:
        ours, theirs = (
            tiny_model.checkpoint_tensors(checkpoint.folder) for checkpoint in (one, other)
        )
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), one.step


@pytest.mark.parametrize(
    "dead",
    [drill.DeadDisk(1, "save"), drill.DeadDisk(0, "save"), drill.DeadDisk(0, "publish")],
    ids=str,
)
def test_disk_that_never_answers_ends_the_run(
    dead: drill.DeadDisk, config: Path, tmp_path: Path
) -> None:
    """The run ends by itself with one sentence, whichever rank waits in vain, and for whatever."""
    done = tiny_model.run_forked(
        "train",
        config,
        f"run_dir={tmp_path / 'run'}",
        "checkpoint.timeout_minutes=0.05",
        ranks=2,
        before=dead,
        grace_seconds=1,  # the rank whose disk is dead does not end by itself
    )
    assert done.returncode == 2, done.stdout + done.stderr
    sentence = (
        "The checkpoint of step 1 was not written on all ranks within "
        "checkpoint.timeout_minutes=0.05."
    )
    assert done.stderr.count(sentence) == done.stderr.count("checkpoint.timeout_minutes") == 1
    assert "Traceback" not in done.stderr + done.stdout
    assert store.find_all(tmp_path / "run") == store.damaged_folders(tmp_path / "run") == []


@pytest.mark.parametrize("rank", [0, 1])
def test_too_little_memory_for_a_copy_saves_in_place(
    rank: int, config: Path, both: Path, tmp_path: Path
) -> None:
    """On any machine: then all ranks save synchronously, and nothing else changes."""
    words = [f"run_dir={tmp_path / 'run'}", "checkpoint.mode=auto"]
    done = tiny_model.run_forked("train", config, *words, ranks=2, before=drill.LittleMemory(rank))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("checkpoint: saved synchronously: a copy takes") == 1
    drill.compare(tmp_path / "run", both)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


def test_directory_made_read_only_ends_the_run_in_one_sentence(open_folder: Path) -> None:
    config = drill.make_config(open_folder)
    run_dir = open_folder / "run"
    tiny_model.train(config, run_dir, "train.max_steps=2", "optim.schedule=constant")
    before = sorted(str(p) for p in (run_dir / "checkpoints").rglob("*"))
    for path in [open_folder, *open_folder.rglob("*")]:
        path.chmod(0o777 if path.is_dir() else 0o666)
    (run_dir / "checkpoints").chmod(0o555)
    words = [f"run_dir={run_dir}", "optim.schedule=constant"]
    done = tiny_model.run_forked("train", config, *words, before=drill.Nobody())
    assert done.returncode == 2, done.stdout + done.stderr
    assert "could not be written: Permission denied" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(str(p) for p in (run_dir / "checkpoints").rglob("*")) == before


def test_prune_keeps_what_the_settings_say(config: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    tiny_model.train(config, run_dir, "checkpoint.keep=1", "checkpoint.keep_every_steps=3")
    assert [c.step for c in store.find_all(run_dir)] == [8, 6, 3]
    assert (run_dir / "checkpoints" / "latest").read_text() == "step_00000008\n"


def test_accepted_changes_are_named(config: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    tiny_model.train(config, run_dir, "train.max_steps=2")
    words = ["optim.learning_rate=2e-4", "noise.alpha=10", f"run_dir={run_dir}"]
    refused = tiny_model.run_forked("train", config, *words)
    assert refused.returncode == 2
    keys = "noise.alpha,optim.learning_rate"
    assert f"checkpoint.accept_changes={keys}" in refused.stderr
    done = tiny_model.run_forked("train", config, *words, f"checkpoint.accept_changes={keys}")
    assert done.returncode == 0, done.stderr
    assert "resume: noise.alpha was 5.0, is now 10.0" in done.stdout
    assert "resume: train.max_steps was 2, is now 8" in done.stdout
    norms = [record["noise_norm"] for record in tiny_model.steps(run_dir)]
    assert norms[-1] == pytest.approx(2 * norms[0], rel=0.02)


def test_checkpoints_lists_sound_and_damaged_ones(copy: Path) -> None:
    newest, next_newest = (c.folder for c in store.find_all(copy)[:2])
    truncate(newest / "__0_0.distcp")
    flip_a_bit(next_newest / "__0_0.distcp")
    shutil.copytree(next_newest, newest.with_name("step_00000009.partial"))
    shown = tiny_model.run_forked("checkpoints", copy).stdout
    verified = tiny_model.run_forked("checkpoints", copy, "--verify")
    assert verified.returncode == 2 and "holds damaged checkpoints, of step" in verified.stderr
    told = verified.stdout
    assert shown.count(" complete ") == drill.STEPS - 1
    assert told.count(" complete, verified ") == drill.STEPS - 2
    assert "__0_0.distcp is not what was written" in told
    for text in (shown, told):
        assert "unfinished" in text and "__0_0.distcp has" in text and "fsdp2, 1 rank " in text
    assert tiny_model.run_forked("checkpoints", copy.parent).returncode == 2


def test_checkpoint_without_readable_trainer_state_is_listed_as_damaged(copy: Path) -> None:
    """Half of it is another size; a flipped bit may leave it readable, with another key."""
    newest, next_newest = (c.folder / "trainer_state.json" for c in store.find_all(copy)[:2])
    content = newest.read_bytes()
    assert b'"config"' in content
    newest.write_bytes(content.replace(b'"config"', b'"confie"', 1))
    truncate(next_newest)
    for words, code in (([], 0), (["--verify"], 2)):
        done = tiny_model.run_forked("checkpoints", copy, *words)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        rows = done.stdout.splitlines()[1:]
        assert [int(row.split()[0]) for row in rows] == list(range(1, drill.STEPS + 1))
        assert "damaged: trainer_state.json cannot be read" in rows[-1]
        assert "damaged: trainer_state.json has" in rows[-2]
        assert all(row.endswith("nothing") for row in rows[-2:])
        assert all(" complete" in row and "fsdp2, 1 rank " in row for row in rows[:-2])
