"""The loop's decisions, over parts that only note what they are asked: when it evaluates, saves,
stops, skips and gives up, and what each step draws by."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from neftune_dist.config import Config, UserError, load_config
from neftune_dist.data.loader import MicroBatch, StepBatch
from neftune_dist.distributed.signals import Stopped
from neftune_dist.model import optimizations
from neftune_dist.model.flops import ModelSize
from neftune_dist.training.loop import Diverged, Progress, Trainer
from neftune_dist.training.metrics import RankResult, step_record

NUM_STEPS = 6


@dataclass
class Parts:
    """All that a trainer is made of. `events` are in the order in which they came.

    Attributes:
        losses: of the micro-batches of a step; grad_norms: of the steps. The last one repeats.
        stop_at: the event at which this rank is asked to stop.
        fired: whether the noise's hook fires.
        fails: whether the save in flight fails.
    """

    losses: list[float] = field(default_factory=lambda: [6.0])
    grad_norms: list[float] = field(default_factory=lambda: [1.0])
    stop_at: str = ""
    fired: bool = True
    fails: bool = False
    events: list[str] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    backwards: list[tuple[float, bool]] = field(default_factory=list)
    gradients: list[float] = field(default_factory=list)  # of the loss sums that `forward` gave
    draws: list[int] = field(default_factory=list)
    alphas: list[float] = field(default_factory=list)
    signs: list[int] = field(default_factory=list)
    held_out: list[float] = field(default_factory=lambda: [1.0])  # losses, the last one repeats
    num_forwards: int = 0

    def note(self, event: str) -> None:
        self.events.append(event)

    def stopped(self) -> bool:
        return self.stop_at in self.events

    def evaluate(self, engine: Any, stop_requested: Any) -> dict[str, Any] | None:
        self.note("evaluate")
        loss = self.held_out[min(self.events.count("evaluate"), len(self.held_out)) - 1]
        return None if stop_requested() else {"held_out_loss": loss}

    def forward(self, batch: MicroBatch) -> Tensor:
        self.draws.append(int(torch.randint(1 << 62, ())))
        loss = self.losses[min(self.num_forwards, len(self.losses) - 1)]
        self.num_forwards += 1
        self.loss_sum = torch.tensor(loss, requires_grad=True)
        return self.loss_sum

    def backward(self, loss: Tensor, last_micro_batch: bool) -> None:
        self.backwards.append((float(loss.detach()), last_micro_batch))
        (gradient,) = torch.autograd.grad(loss, self.loss_sum)
        self.gradients.append(float(gradient))

    def step(self, rate: float) -> float:
        self.note("update")
        count = self.events.count("update") - 1
        return self.grad_norms[min(count, len(self.grad_norms) - 1)]

    def save(self, step: int, engine: Any, state: Any, best_step: int | None = None) -> None:
        self.note(f"save {step}" if best_step is None else f"save {step} best {best_step}")

    def wait(self) -> None:
        self.note("wait")
        if self.fails:
            raise UserError("the disk is full")


class FakeNoise:
    """Counts forwards as the handle does, from 0 at each step."""

    def __init__(self, parts: Parts) -> None:
        self.parts, self.num_fired, self.alpha, self.sign = parts, 0, 0.0, 0
        self._step = -1

    @property
    def step(self) -> int:
        return self._step

    @step.setter
    def step(self, value: int) -> None:
        self._step, self.num_fired = value, 0

    def describe(self, layout: Any) -> None:
        self.num_fired += self.parts.fired
        self.parts.alphas.append(self.alpha)
        self.parts.signs.append(self.sign)

    def take_noise_norms(self) -> tuple[Tensor, Tensor]:
        return torch.tensor(6.0), torch.tensor(2.0)


class FakeWorld:
    """One rank, unless it is told that there are others."""

    size, rank, device = 1, 0, torch.device("cpu")

    def __init__(self) -> None:
        self.lines: list[str] = []

    def gather_fields(self, mine: Any) -> list[Any]:
        return [mine]

    def any(self, flag: bool) -> bool:
        return flag

    def log(self, line: str) -> None:
        self.lines.append(line)


def empty_batch() -> MicroBatch:
    none = torch.zeros(0, dtype=torch.int64)
    ids = torch.zeros(1, 4, dtype=torch.int64)
    return MicroBatch(ids, ids, None, none, none, none, none, none, none, none, None, (4,))


def step_batch(step: int, num_micro_batches: int = 2) -> StepBatch:
    batches = [empty_batch() for _ in range(num_micro_batches)]
    return StepBatch(step, batches, 3, 10, 4, 16, 40)


def make_trainer(parts: Parts, *words: str, step: int = 0, due: bool = False) -> Trainer:
    needed = ["model.name_or_path=m", "data.source=d", "run_dir=r", "data.num_held_out=4"]
    config = load_config(None, [*needed, *words])
    engine = SimpleNamespace(
        forward=parts.forward,
        backward=parts.backward,
        step=parts.step,
        train=lambda mode: None,
    )
    sampler = SimpleNamespace(
        num_steps=NUM_STEPS, documents=lambda step: (torch.tensor([8, step]), None)
    )
    loader = SimpleNamespace(
        sampler=sampler, steps=lambda first: (step_batch(s) for s in range(first, NUM_STEPS))
    )
    recorder = SimpleNamespace(
        step=parts.records.append, evaluation=lambda record: parts.note("recorded")
    )
    saver = SimpleNamespace(
        prepare=lambda engine: parts.note("prepare"),
        save=parts.save,
        wait=parts.wait,
        failed=parts.fails,
        seconds_waited=0.0,
    )
    stragglers = SimpleNamespace(
        waited=lambda seconds: None, measure=lambda step: (0.0, 0.0), compare=lambda *_: None
    )
    made: dict[str, Any] = {
        "config": config,
        "world": FakeWorld(),
        "engine": engine,
        "noise": FakeNoise(parts),
        "loader": loader,
        "recorder": recorder,
        "size": ModelSize(8, 8, 8, 8, 1, 2),
        "held_out": SimpleNamespace(evaluate=parts.evaluate),
        "samples": None,
        "saver": saver,
        "watchdog": SimpleNamespace(at=lambda step, phase, limited=True: None),
        "stragglers": stragglers,
        "profiler": SimpleNamespace(step=lambda number: nullcontext()),
        "trainer_state": vars,
        "stop_requested": parts.stopped,
        "progress": Progress(step=step),
        "evaluation_due": due,
    }
    return Trainer(**made)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["checkpoint.every_steps=4"],
            "prepare 1 2 3 4 save-4 5 6 evaluate recorded save-6 wait",
        ),
        (
            ["checkpoint.every_steps=0", "evaluate.every_steps=4"],
            "1 2 3 4 evaluate recorded 5 6 evaluate recorded save-6 wait",
        ),
        (
            ["checkpoint.every_steps=3", "evaluate.every_steps=3"],
            "prepare 1 2 3 evaluate recorded save-3 4 5 6 evaluate recorded save-6 wait",
        ),
    ],
)
def test_evaluates_then_saves_when_due(words: list[str], expected: str) -> None:
    parts = Parts()
    assert make_trainer(parts, *words).run()
    assert numbered(parts.events) == expected


def test_ends_when_the_held_out_loss_stays_worse() -> None:
    parts = Parts(held_out=[3.0, 2.0, 2.0, 2.5, 1.0])
    words = ["train.patience=2", "evaluate.every_steps=1", "checkpoint.every_steps=0"]
    trainer = make_trainer(parts, *words, "data.num_held_out=1")
    assert trainer.run()
    assert [record["step"] for record in parts.records] == [1, 2, 3, 4]
    assert parts.events[-2:] == ["save 4", "wait"]
    assert trainer.progress.best_step == 2 and trainer.progress.num_worse == 2


def test_saves_the_best_and_says_which_it_is() -> None:
    parts = Parts(held_out=[3.0, math.nan, 2.0, 4.0])
    words = ["checkpoint.keep_best=true", "evaluate.every_steps=1", "checkpoint.every_steps=0"]
    assert make_trainer(parts, *words, "data.num_held_out=1").run()
    saves = [event for event in parts.events if event.startswith("save")]
    assert saves == ["save 1 best 1", "save 3 best 3", "save 6 best 3"]


def test_resumed_run_keeps_its_patience() -> None:
    words = ["train.patience=3", "evaluate.every_steps=1", "data.num_held_out=1"]
    trainer = make_trainer(Parts(held_out=[2.0]), *words, step=2)
    trainer.progress = replace(trainer.progress, best_loss=1.0, best_step=1, num_worse=1)
    assert trainer.run() and trainer.progress.step == 4


def numbered(events: list[str]) -> str:
    """The events in one line, updates as numbers."""
    count = iter(range(1, len(events) + 1))
    words = (str(next(count)) if event == "update" else event.replace(" ", "-") for event in events)
    return " ".join(words)


@pytest.mark.parametrize(
    ("stop_at", "expected", "finished"),
    [
        ("update", "evaluate recorded 1 save-1 wait", False),
        ("save 2", "evaluate recorded 1 2 save-2 wait", False),
        (
            "never",
            "evaluate recorded 1 2 save-2 3 4 save-4 5 6 evaluate recorded save-6 wait",
            True,
        ),
    ],
)
def test_stops_after_the_step_and_saves(stop_at: str, expected: str, finished: bool) -> None:
    parts = Parts(stop_at=stop_at)
    trainer = make_trainer(parts, "checkpoint.every_steps=2", due=True)
    assert trainer.run() == finished
    assert numbered([e for e in parts.events if e != "prepare"]) == expected


def test_stop_in_the_first_evaluation_saves_nothing() -> None:
    parts = Parts(stop_at="evaluate")
    with pytest.raises(Stopped):
        make_trainer(parts, due=True).run()
    assert parts.events == ["evaluate"]


def test_stop_in_a_later_evaluation_saves_and_leaves_it_due() -> None:
    parts = Parts(stop_at="evaluate")
    trainer = make_trainer(parts, "evaluate.every_steps=2", "checkpoint.every_steps=0")
    assert not trainer.run()
    assert numbered(parts.events) == "1 2 evaluate save-2 wait"
    parts = Parts(stop_at="evaluate")  # after the last step: the run is not finished
    assert not make_trainer(parts, "checkpoint.every_steps=0", step=5).run()
    assert numbered(parts.events) == "1 evaluate save-6 wait"


def test_resumed_run_begins_at_its_cursor() -> None:
    parts = Parts()
    assert make_trainer(parts, "checkpoint.every_steps=0", step=4).run()
    assert [record["step"] for record in parts.records] == [5, 6]


def test_gradient_is_that_of_the_mean_over_the_global_batch() -> None:
    """Law 3: each micro-batch's loss sum, over the step's supervised tokens of all ranks."""
    parts = Parts(losses=[6.0, 2.0])
    trainer = make_trainer(parts, "checkpoint.every_steps=0", step=5)
    assert trainer.run()
    assert parts.backwards == [(1.5, False), (0.5, True)]
    (record,) = parts.records
    assert record["loss"] == 2.0 and record["step"] == 6
    assert record["padding_fraction"] == 1 - 10 / 16
    assert record["noise_norm"] == 3.0
    assert (trainer.progress.num_tokens, trainer.progress.num_supervised_tokens) == (10, 4)


def test_symmetric_noise_halves_the_share_of_each_pass() -> None:
    parts = Parts(losses=[6.0, 2.0])
    words = ["noise.distribution=symmetric", "checkpoint.every_steps=0"]
    assert make_trainer(parts, *words, step=5).run()
    assert parts.backwards == [(0.75, False), (0.25, False), (0.25, False), (0.25, True)]
    assert parts.signs == [1, -1, 1, -1]
    assert parts.records[0]["loss"] == (3 + 1 + 1 + 1) / 4


def test_dropout_draws_differ_by_step_and_rank_and_repeat() -> None:
    first, again, other = Parts(), Parts(), Parts()
    make_trainer(first, "checkpoint.every_steps=0").run()
    make_trainer(again, "checkpoint.every_steps=0", step=3).run()
    trainer = make_trainer(other, "checkpoint.every_steps=0")
    trainer.world.rank = 1
    trainer.run()
    assert len({*first.draws, *other.draws}) == 4 * NUM_STEPS  # two micro-batches a step
    assert again.draws == first.draws[6:]


def test_noise_follows_its_schedule_by_the_batch_step() -> None:
    parts = Parts()
    words = ["noise.alpha=6", "noise.schedule=linear", "checkpoint.every_steps=0"]
    make_trainer(parts, *words, "noise.warmup_steps=2", step=1).run()
    assert parts.alphas[:4] == [6.0, 6.0, 6.0, 6.0]
    assert parts.alphas == sorted(parts.alphas, reverse=True) and parts.alphas[-1] < 3
    parts = Parts()
    make_trainer(parts, *words, "noise.warmup_steps=3").run()
    assert parts.alphas[:6] == pytest.approx([2.0, 2.0, 4.0, 4.0, 6.0, 6.0])


def test_hook_that_does_not_fire_ends_the_run() -> None:
    with pytest.raises(RuntimeError, match="added in 0 of 2 forward passes"):
        make_trainer(parts := Parts(fired=False)).run()
    assert parts.records == [] and "save 1" not in parts.events
    assert make_trainer(Parts(fired=False), "noise.alpha=0").run()


def test_compiling_that_compiles_nothing_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    counters: dict[str, dict[str, int]] = {"stats": {"unique_graphs": 0}, "unimplemented": {}}
    monkeypatch.setattr(optimizations, "_compile_counters", lambda: counters)
    with pytest.raises(UserError, match=r"model.compile=true has compiled nothing"):
        make_trainer(parts := Parts(), "model.compile=true").run()
    assert parts.records == []
    assert make_trainer(Parts()).run()
    counters["stats"], counters["graph_break"] = {"unique_graphs": 1}, {"a reason\n more": 2}
    trainer = make_trainer(Parts(), "model.compile=true")
    assert trainer.run()
    lines = [line for line in cast(Any, trainer.world).lines if "in pieces" in line]
    assert len(lines) == 1 and "with less gain: a reason (" in lines[0]


@pytest.mark.parametrize("losses", [[math.inf], [6.0, math.nan]])
def test_non_finite_loss_poisons_the_gradient(losses: list[float]) -> None:
    """An infinite loss may have a finite gradient, and the gradient alone decides."""
    parts = Parts(losses=losses)
    make_trainer(parts, "checkpoint.every_steps=0", step=5).run()
    assert [math.isfinite(gradient) for gradient in parts.gradients] == [
        math.isfinite(loss) for loss in (losses * 2)[:2]
    ]


def test_skipped_steps_are_counted_and_their_documents_named() -> None:
    parts = Parts(grad_norms=[1.0, math.nan, math.inf, 1.0])
    trainer = make_trainer(parts, "checkpoint.every_steps=0")
    assert trainer.run()
    assert [record["num_skipped_steps"] for record in parts.records] == [0, 1, 2, 2, 2, 2]
    assert trainer.progress.num_updates == 4 and trainer.progress.num_skipped_in_a_row == 0
    lines = [line for line in cast(Any, trainer.world).lines if "was skipped" in line]
    assert len(lines) == 2
    assert "step 2 was skipped" in lines[0] and lines[0].endswith("from 0: 1, 8")


@pytest.mark.parametrize("most", [0, 2])
def test_too_many_skipped_steps_save_the_last_update_and_end_the_run(most: int) -> None:
    parts = Parts(grad_norms=[1.0, 1.0, math.nan])
    words = [f"train.max_skipped_steps={most}", "checkpoint.every_steps=0"]
    with pytest.raises(Diverged, match=f"Steps 3 to {3 + most} had no finite"):
        make_trainer(parts, *words).run()
    assert numbered(parts.events).endswith(f"{3 + most} save-2 wait")


def test_nothing_is_saved_of_a_run_that_never_learned() -> None:
    parts = Parts(grad_norms=[math.nan])
    with pytest.raises(Diverged, match="Nothing had been trained before"):
        make_trainer(parts, "train.max_skipped_steps=1", "checkpoint.every_steps=0").run()
    assert numbered(parts.events) == "1 2 wait"


def test_checkpoint_of_last_update_is_not_saved_again() -> None:
    parts = Parts(grad_norms=[1.0, 1.0, math.nan])
    with pytest.raises(Diverged, match="The checkpoint of step 2 holds all"):
        make_trainer(parts, "train.max_skipped_steps=0", "checkpoint.every_steps=2").run()
    assert numbered(parts.events) == "prepare 1 2 save-2 3 wait"


def test_failed_save_ends_the_run_at_the_next_step() -> None:
    parts = Parts(fails=True)
    with pytest.raises(UserError, match="the disk is full"):
        make_trainer(parts).run()
    assert parts.records == [] and parts.events[-2:] == ["update", "wait"]


def test_stop_of_any_rank_counts_and_slowest_rank_is_recorded() -> None:
    class Others(FakeWorld):
        size = 3

        def gather_fields(self, mine: RankResult) -> list[RankResult]:
            late = replace(mine, data_wait_seconds=9.0, memory_gib=1e3, stop_requested=True)
            return [mine, late, replace(mine, loss_sum=2 * mine.loss_sum)]

    parts = Parts()
    trainer = make_trainer(parts, "checkpoint.every_steps=0")
    trainer.world = cast(Any, Others())
    assert not trainer.run()
    (record,) = parts.records
    assert (record["data_wait_seconds"], record["memory_gib"]) == (9.0, 1e3)
    assert record["loss"] == (12 + 12 + 24) / 4
    assert record["world_size"] == 3 and record["noise_norm"] == 3.0


def test_utilization_counts_all_ranks_and_both_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neftune_dist.training.metrics.measured_flops", lambda *_: 1e3)
    world: Any = SimpleNamespace(size=2, device=torch.device("cpu"))
    rank = RankResult(1.0, 0.0, 0.0, False, False, 1.0, 0.0, 0.0, 0.0)
    found = []
    for distribution in ("uniform", "symmetric"):
        config = Config()
        config.noise.distribution = distribution
        record = step_record(
            config,
            ModelSize(8, 8, 8, 8, 1, 2),
            world,
            step_batch(0),
            [rank, rank],
            alpha=0.0,
            learning_rate=1.0,
            grad_norm=1.0,
            seconds=2.0,
            num_skipped_steps=0,
        )
        found.append((record["mfu"], record["mfu_6n"], record["tokens_per_second"]))
    # 6 * 8 parameters * 10 tokens + attention 6 * 2 * 40, in 2 s of 2 ranks of 1e3 FLOP/s.
    assert found[0] == pytest.approx((960 / 4e3, 480 / 4e3, 5.0))
    assert found[1] == pytest.approx((2 * 960 / 4e3, 2 * 480 / 4e3, 5.0))
