"""A step without a finite loss and gradient: skipped and counted; too many in a row end the run.

Faults are put into one micro-batch of one rank, as an infinite loss whose gradient is finite, or as
a gradient of NaN whose loss is finite. What must come of it is known from elsewhere: a plain loop
that leaves the update out, the tensors of the step before, or the same run without the fault.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from neftune_dist.checkpoint import store
from neftune_dist.training.loop import Progress
from tests.support import reference_loop, tiny_model
from tests.support.non_finite import Fault
from tests.support.reference_loop import TOLERANCE

STEPS = 8
ENGINES = {
    "fsdp2": ["engine.name=fsdp2"],
    "hsdp": ["engine.name=fsdp2", "engine.num_replicas=2"],
    "zero-1": ["engine.name=deepspeed", "engine.zero_stage=1"],
    "zero-2": ["engine.name=deepspeed", "engine.zero_stage=2"],
    "zero-3": ["engine.name=deepspeed", "engine.zero_stage=3"],
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.make_config(
        tmp_path_factory.mktemp("skipped"),
        train={"max_steps": STEPS, "micro_batch_tokens": 128},
        checkpoint={"every_steps": 1, "keep": 0},
        evaluate={"every_steps": 3},
        logging={"progress": True, "tensorboard": False},
    )


def train(
    config: Path, run_dir: Path, fault: Fault | None, *words: str, ranks: int = 2
) -> list[dict[str, Any]]:
    done = tiny_model.run_forked(
        "train", config, f"run_dir={run_dir}", *words, ranks=ranks, before=fault
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return records_of(run_dir)


def records_of(run_dir: Path) -> list[dict[str, Any]]:
    """Refuses what Python's parser takes and JSON does not know: NaN, Infinity."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def tensors(run_dir: Path, step: int) -> dict[str, Tensor]:
    return tiny_model.checkpoint_tensors(run_dir / "checkpoints" / f"step_{step:08d}")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def assert_same_end(run_dir: Path, untouched: Path) -> None:
    assert tiny_model.untimed(records_of(run_dir)) == tiny_model.untimed(records_of(untouched))
    one, other = (run / "evaluations.jsonl" for run in (run_dir, untouched))
    assert one.read_text() == other.read_text()
    assert same(tensors(run_dir, STEPS), tensors(untouched, STEPS))


@pytest.mark.parametrize("engine", ["fsdp2", "zero-1", "zero-2", "zero-3"])
def test_skipped_step_omits_only_the_update(engine: str, config: Path, tmp_path: Path) -> None:
    """As in a plain loop that makes no update at these steps, whose Adam counts no step there."""
    fault = Fault(losses=(2, 6), gradients=(5,), rank=1)
    records = train(config, tmp_path / "run", fault, *ENGINES[engine])
    expected = reference_loop.records(config, skipped=(2, 5, 6))
    assert [record["num_skipped_steps"] for record in records] == [0, 1, 1, 1, 2, 3, 3, 3]
    for one, other in zip(records, expected, strict=True):
        assert (one["loss"] is None) == (one["step"] in (2, 6))
        assert (one["grad_norm"] is None) == (one["step"] in (2, 5, 6))
        for key in ("loss", "grad_norm"):
            if one[key] is not None:
                assert one[key] == pytest.approx(other[key], rel=TOLERANCE), (one["step"], key)


@pytest.mark.parametrize("engine", ENGINES)
def test_skipped_step_changes_no_weight_and_no_moment(
    engine: str, config: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    words = [*ENGINES[engine], "model.dtype=bf16", "train.max_steps=5"]
    words += ["train.global_batch_size=20"]  # enough for several micro-batches on four ranks
    ranks = 4 if engine == "hsdp" else 2
    records = train(config, run_dir, Fault(gradients=(1, 3)), *words, ranks=ranks)
    assert all(math.isfinite(records[i]["loss"]) for i in (1, 3, 4))
    saved = {step: tensors(run_dir, step) for step in (1, 2, 3, 4, 5)}
    assert same(saved[3], saved[2])
    assert not any(saved[1][key].any() for key in saved[1] if not key.startswith("master/"))
    for one, other in ((2, 1), (4, 3), (5, 4)):
        assert not same(saved[one], saved[other])
    for step in saved:
        assert all(tensor.isfinite().all() for tensor in saved[step].values())


@pytest.mark.parametrize("engine", ["fsdp2", "zero-3"])
def test_resumes_after_and_among_skipped_steps(engine: str, config: Path, tmp_path: Path) -> None:
    fault, words = Fault(losses=(2, 3), gradients=(4,), rank=1), ENGINES[engine]
    whole = tmp_path / "whole"
    train(config, whole, fault, *words)
    for step in (3, 5):
        run_dir = tmp_path / str(step)
        cut(whole, run_dir, step)
        train(config, run_dir, fault, *words)
        assert_same_end(run_dir, whole)


def cut(whole: Path, run_dir: Path, step: int) -> None:
    """The run as it was when the checkpoint of `step` was its newest."""
    shutil.copytree(whole, run_dir)
    for checkpoint in store.find_all(run_dir):
        if checkpoint.step > step:
            shutil.rmtree(checkpoint.folder)


def test_update_count_survives_change_of_engine(config: Path, tmp_path: Path) -> None:
    """Adam's bias correction after few updates differs much from that after a few more."""
    fault = Fault(gradients=(1, 2, 4))
    whole = tmp_path / "whole"
    expected = train(config, whole, fault, *ENGINES["fsdp2"])
    run_dir = tmp_path / "run"
    cut(whole, run_dir, 5)
    records = train(config, run_dir, fault, *ENGINES["zero-3"])
    for one, other in zip(records, expected, strict=True):
        assert one["num_skipped_steps"] == other["num_skipped_steps"]
        if other["grad_norm"] is not None:
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
            assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)


def test_progress_of_earlier_version_loads() -> None:
    assert Progress(**{"step": 3, "num_tokens": 2, "num_supervised_tokens": 1}).num_updates == 3


def test_too_many_consecutive_skips_end_the_run(config: Path, tmp_path: Path) -> None:
    """What was learned before is kept, even where no save was due; and with the fault mended the
    run goes on from there, and ends as one that never had it."""
    words = ["train.max_skipped_steps=2", "checkpoint.every_steps=0"]
    run_dir, marks = tmp_path / "run", tmp_path / "marks"
    marks.mkdir()
    # Skipped before, but with a good step between: not in a row.
    fault = Fault(losses=(1, 2, 4, 5, 6), rank=1, folder=marks)
    for _ in range(2):  # the second time from the checkpoint, into the same fault
        done = tiny_model.run_forked(
            "train", config, f"run_dir={run_dir}", *words, ranks=2, before=fault
        )
        assert done.returncode == 1
        said = [(marks / f"diverged_{rank}").read_text() for rank in (0, 1)]
        assert said[0] == said[1]
        assert "Steps 4 to 6 had no finite loss" in said[0]
        assert "The checkpoint of step 3 holds all" in said[0]
        assert "warning: step 5 was skipped" in done.stdout
        assert len(records_of(run_dir)) == 6
        assert [checkpoint.step for checkpoint in store.find_all(run_dir)] == [3]
        assert store.damaged_folders(run_dir) == []
        assert store.find_all(run_dir)[0].first_flaw() is None
    whole = tmp_path / "whole"
    early = Fault(losses=(1, 2), rank=1)
    train(config, whole, early, *words)
    train(config, run_dir, early, *words)
    assert_same_end(run_dir, whole)


def test_consecutive_skips_are_saved(config: Path, tmp_path: Path) -> None:
    """Saved among skipped steps, a run does not begin to count them anew."""
    run_dir = tmp_path / "run"
    fault = Fault(losses=(3, 4, 5), folder=tmp_path)
    words = [f"run_dir={run_dir}", "train.max_skipped_steps=2"]
    for _ in range(2):
        done = tiny_model.run_forked("train", config, *words, before=fault)
        assert done.returncode == 1
        said = (tmp_path / "diverged_0").read_text()
        assert "Steps 3 to 5 had no finite loss" in said
        assert "The checkpoint of step 4 holds all" in said
        assert store.find_all(run_dir)[0].step == 4
        assert len(records_of(run_dir)) == 5


def test_max_skipped_steps_0_ends_at_first_skip(config: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    fault = Fault(losses=(1,), folder=tmp_path)
    done = tiny_model.run_forked(
        "train", config, f"run_dir={run_dir}", "train.max_skipped_steps=0", before=fault
    )
    assert done.returncode == 1
    said = (tmp_path / "diverged_0").read_text()
    assert "Steps 1 to 1" in said
    assert "Nothing had been trained before" in said
    assert store.find_all(run_dir) == []


def test_skip_warning_names_step_values_and_documents(config: Path, tmp_path: Path) -> None:
    done = tiny_model.run_forked(
        "train",
        config,
        f"run_dir={tmp_path / 'run'}",
        "train.max_steps=2",
        ranks=2,
        before=Fault(losses=(2,), rank=1),
    )
    (line,) = [line for line in done.stdout.splitlines() if "was skipped" in line]
    assert line.startswith("warning: step 2 was skipped, no weight has changed: loss inf, gradient")
    documents = line.rpartition(": ")[2].split(", ")
    assert len({int(number) for number in documents}) == 10
    assert "step 2/2  loss inf" in done.stdout
