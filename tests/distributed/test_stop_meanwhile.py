"""A request to stop that comes while a run evaluates or saves: heard soon, and nothing is lost.

The signal comes from within, so that it finds the run where it should: as a rank takes up a batch
of held-out documents, or writes a checkpoint. The run that continues is compared, record for record
and bit for bit, with one that nobody stopped.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from neftune_dist.checkpoint import store
from tests.support import tiny_model

STEPS, EVERY = 8, 4
ENGINES = {
    "fsdp2": ["engine.name=fsdp2"],
    "zero-3": ["engine.name=deepspeed", "model.dtype=bf16"],
}


@dataclass(frozen=True)
class StopInEvaluation:
    """To `ranks`, as they come to their second batch of the evaluation after `step`."""

    step: int
    ranks: tuple[int, ...]
    folder: Path  # for a mark a batch

    def __call__(self) -> None:
        from neftune_dist.training import held_out
        from neftune_dist.training.loop import Trainer

        rank = int(os.environ.get("RANK", "0"))
        evaluate, batches = Trainer.evaluate, held_out.evaluation_batches

        def counted(*arguments: Any) -> Iterator[Any]:
            for i, batch in enumerate(batches(*arguments)):
                (self.folder / f"batch_{rank}_{i}").touch()
                if i == 1 and rank in self.ranks:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

        def watched(trainer: Trainer) -> bool:
            there = trainer.progress.step == self.step
            held_out.evaluation_batches = counted if there else batches
            return evaluate(trainer)

        Trainer.evaluate = watched  # type: ignore[method-assign]

    def batches(self) -> dict[int, int]:
        """How many each rank took up; the marks are removed."""
        taken = dict.fromkeys((0, 1), 0)
        for mark in self.folder.glob("batch_*"):
            taken[int(mark.name.split("_")[1])] += 1
            mark.unlink()
        return taken


def stop_before_torch() -> None:
    """To the last rank, as it reads its configuration."""
    from neftune_dist.verbs import training

    load = training.load_config

    def interrupted(*words: Any) -> Any:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGUSR1)
        return load(*words)

    training.load_config = interrupted  # type: ignore[assignment]


@dataclass(frozen=True)
class StopInSave:
    """To `ranks`, as they write their shards of the checkpoint of `step`, which takes a while."""

    step: int
    ranks: tuple[int, ...]

    def __call__(self) -> None:
        from neftune_dist.checkpoint import flat

        write = flat.write

        def interrupted(folder: Path, *arguments: Any) -> Any:
            if folder.name.startswith(f"step_{self.step:08d}"):
                if int(os.environ.get("RANK", "0")) in self.ranks:
                    os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.5)
            return write(folder, *arguments)

        flat.write = interrupted


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.make_config(
        tmp_path_factory.mktemp("stop"),
        data={"num_held_out": 24},
        train={"max_steps": STEPS, "micro_batch_tokens": 96},
        checkpoint={"keep": 0},
        evaluate={"every_steps": EVERY},
        logging={"progress": False, "tensorboard": False},
        noise={"stream": "rank"},
    )


@pytest.fixture(scope="module")
def untouched(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run directory of an engine's uninterrupted run on two ranks, made once."""
    made: dict[str, Path] = {}

    def of(engine: str) -> Path:
        if engine not in made:
            made[engine] = tmp_path_factory.mktemp(engine) / "run"
            tiny_model.train(config, made[engine], *ENGINES[engine], ranks=2)
        return made[engine]

    return of


def evaluated(run_dir: Path) -> list[int]:
    lines = (run_dir / "evaluations.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def published(run_dir: Path) -> list[int]:
    """Newest first; none is damaged, and nothing is half-written."""
    assert all(entry.fate == store.COMPLETE for entry in store.entries(run_dir))
    found = store.find_all(run_dir)
    assert [checkpoint.first_flaw() for checkpoint in found] == [None] * len(found)
    return [checkpoint.step for checkpoint in found]


def assert_as_untouched(run_dir: Path, untouched_dir: Path) -> None:
    assert tiny_model.untimed(tiny_model.steps(run_dir)) == tiny_model.untimed(
        tiny_model.steps(untouched_dir)
    )
    one, other = (run / "evaluations.jsonl" for run in (run_dir, untouched_dir))
    assert one.read_text() == other.read_text()
    ours, theirs = (
        tiny_model.checkpoint_tensors(store.find_all(run)[0].folder)
        for run in (run_dir, untouched_dir)
    )
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert torch.equal(tensor, theirs[key]), key


# At every place on the way with one engine; there, the ranks are asked in one way wherever it is.
@pytest.mark.parametrize(
    ("engine", "ranks", "step"),
    [
        ("fsdp2", (1,), 0),
        ("fsdp2", (1,), EVERY),
        ("fsdp2", (1,), STEPS),
        ("fsdp2", (0, 1), EVERY),
        ("zero-3", (0,), EVERY),
    ],
)
def test_stop_during_evaluation_saves_and_evaluates_again(
    engine: str,
    ranks: tuple[int, ...],
    step: int,
    config: Path,
    untouched: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    run_dir, words = tmp_path / "run", [f"run_dir={tmp_path / 'run'}", *ENGINES[engine]]
    injected = StopInEvaluation(step, ranks, tmp_path)
    for _ in range(2):  # the second time at once, in the evaluation that it makes up for
        done = tiny_model.run_forked("train", config, *words, ranks=2, before=injected)
        assert done.returncode == 75, done.stdout + done.stderr
        assert "stopped" in done.stdout.splitlines()[-1]
        # The batch that was in hand; one more where the signal is slow to be delivered.
        assert all(2 <= taken <= 3 for taken in injected.batches().values())
        assert evaluated(run_dir) == list(range(0, step, EVERY))
        assert len(tiny_model.steps(run_dir)) == step
        assert published(run_dir) == ([step] if step else [])
    done = tiny_model.run_forked("train", config, *words, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_as_untouched(run_dir, untouched(engine))
    if step == STEPS:  # what was made up for is not made again
        done = tiny_model.run_forked("train", config, *words, ranks=2)
        assert done.returncode == 0
        assert "nothing is left to train" in done.stdout
        assert_as_untouched(run_dir, untouched(engine))


def test_stop_before_torch_is_imported_counts(config: Path, tmp_path: Path) -> None:
    words = [f"run_dir={tmp_path / 'run'}"]
    done = tiny_model.run_forked("train", config, *words, ranks=2, before=stop_before_torch)
    assert done.returncode == 75, done.stdout + done.stderr
    assert "nothing had to be saved" in done.stdout.splitlines()[-1]


def test_evaluation_has_many_batches(config: Path, tmp_path: Path) -> None:
    """Else the test above would show nothing."""
    injected = StopInEvaluation(0, (), tmp_path)
    words = [f"run_dir={tmp_path / 'run'}", "train.max_steps=1"]
    done = tiny_model.run_forked(
        "train", config, *words, "evaluate.every_steps=0", ranks=2, before=injected
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(taken >= 5 for taken in injected.batches().values())


@pytest.mark.parametrize(("mode", "ranks"), [("sync", (0, 1)), ("async", (1,))])
def test_stop_during_save_is_obeyed(
    mode: str,
    ranks: tuple[int, ...],
    config: Path,
    untouched: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """The save under way is completed. Where training waited for it, nothing has happened since;
    else one more is made, of the step then in hand."""
    run_dir = tmp_path / "run"
    words = [f"run_dir={run_dir}", f"checkpoint.mode={mode}", "checkpoint.every_steps=3"]
    done = tiny_model.run_forked("train", config, *words, ranks=2, before=StopInSave(3, ranks))
    assert done.returncode == 75, done.stdout + done.stderr
    stopped_at = len(tiny_model.steps(run_dir))
    if mode == "sync":
        assert stopped_at == 3
        assert published(run_dir) == [3]
    else:  # training goes on until the signal is delivered
        assert stopped_at in (3, 4, 5)
        assert published(run_dir) == sorted({3, stopped_at}, reverse=True)
    done = tiny_model.run_forked("train", config, *words, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_as_untouched(run_dir, untouched("fsdp2"))
