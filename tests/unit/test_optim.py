"""The learning rate is a pure function of the step; AdamW is torch's, on the right groups; with
moments of reduced precision it is the same within their rounding (tests/unit/test_moments.py)."""

from __future__ import annotations

import math

import pytest
import torch

from neftune_dist.config import OptimConfig, load_config
from neftune_dist.optim.adamw import (
    MakeOptimizer,
    initialize_state,
    prepare_update,
    set_learning_rate,
    set_updates,
    squared_norm,
)
from neftune_dist.optim.param_slice import STATE_NAMES, ParamSlice
from neftune_dist.optim.schedule import learning_rate
from neftune_dist.training.startup_report import warmup_lines

SCHEDULES = ["cosine", "linear", "constant"]


def config(**settings: object) -> OptimConfig:
    return OptimConfig(**{"learning_rate": 2.0, **settings})  # type: ignore[arg-type]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_is_linear_and_ends_at_the_rate(schedule: str) -> None:
    rates = [learning_rate(config(schedule=schedule, warmup_steps=4), s, 20) for s in range(5)]
    assert rates == [0.5, 1.0, 1.5, 2.0, 2.0]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("final", [0.0, 0.1])
def test_the_rate_never_rises_after_the_warm_up(schedule: str, warmup: int, final: float) -> None:
    settings = config(schedule=schedule, warmup_steps=warmup, final_fraction=final)
    rates = [learning_rate(settings, step, 30) for step in range(30)]
    decay = rates[warmup:]
    assert decay == sorted(decay, reverse=True)
    assert max(rates) == 2.0
    assert min(rates) > 0  # no step is taken for nothing


def test_schedules_end_at_their_final_fraction() -> None:
    for schedule in ("cosine", "linear"):
        settings = config(schedule=schedule, warmup_steps=5, final_fraction=0.1)
        assert learning_rate(settings, 5, 25) == 2.0
        assert learning_rate(settings, 15, 25) == pytest.approx(2.0 * 0.55)  # half-way
        # The step after the last would be at the final fraction.
        assert learning_rate(settings, 25, 25) == pytest.approx(0.2)
    assert learning_rate(config(schedule="constant", warmup_steps=5), 24, 25) == 2.0


def test_cosine_and_linear_are_those_of_transformers() -> None:
    from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

    for schedule, make in (
        ("cosine", get_cosine_schedule_with_warmup),
        ("linear", get_linear_schedule_with_warmup),
    ):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
        scheduler = make(optimizer, num_warmup_steps=0, num_training_steps=17)
        for step in range(17):
            ours = learning_rate(config(schedule=schedule), step, 17)
            assert ours == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12)
            optimizer.step()
            scheduler.step()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_runs_shorter_than_their_warm_up_have_a_rate(schedule: str) -> None:
    assert learning_rate(config(schedule=schedule), 0, 1) == 2.0
    # A warm-up as long as the run, and longer.
    for warmup in (3, 9):
        rates = [
            learning_rate(config(schedule=schedule, warmup_steps=warmup), step, 3)
            for step in range(3)
        ]
        assert rates == pytest.approx([2.0 * (step + 1) / warmup for step in range(3)])
        assert all(math.isfinite(rate) for rate in rates)


SHAPES = {
    "embed.weight": (7, 4),
    "norm.weight": (4,),
    "head.weight": (7, 4),
    "head.bias": (7,),
    "experts.down_proj_bias": (3, 4),  # a row an expert
}


def test_decay_falls_on_matrices_by_their_whole_shape() -> None:
    # As shards, every one of them is flat or empty.
    shards = [
        ("embed.weight", torch.nn.Parameter(torch.ones(14))),
        ("norm.weight", torch.nn.Parameter(torch.ones(2))),
        ("head.weight", torch.nn.Parameter(torch.ones(0))),
        ("head.bias", torch.nn.Parameter(torch.ones(4))),
        ("experts.down_proj_bias", torch.nn.Parameter(torch.ones(6))),
    ]
    optimizer = MakeOptimizer(config(weight_decay=0.5))(shards, SHAPES)
    decay = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    assert {name: decay[id(p)] for name, p in shards} == {
        "embed.weight": 0.5,
        "head.weight": 0.5,
        "norm.weight": 0.0,
        "head.bias": 0.0,
        "experts.down_proj_bias": 0.0,
    }


def test_no_group_is_empty() -> None:
    shard = ("norm.weight", torch.nn.Parameter(torch.ones(4)))
    assert len(MakeOptimizer(config())([shard], SHAPES).param_groups) == 1


def test_adam_by_hand_and_after_a_resume() -> None:
    settings = config(beta1=0.8, beta2=0.9, epsilon=1e-3, weight_decay=0.5)
    gradients = [torch.tensor([[1.0, -2.0]]), torch.tensor([[0.5, 3.0]])]
    rates = [0.1, 0.05]

    def run(value: torch.Tensor, steps: range, state: dict[str, torch.Tensor] | None) -> tuple:
        parameter = torch.nn.Parameter(value.clone())
        optimizer = MakeOptimizer(settings)([("a", parameter)], {"a": (1, 2)})
        initialize_state(optimizer, [parameter], [])
        if state:
            for name in STATE_NAMES:
                optimizer.state[parameter][name].copy_(state[name])
            set_updates(optimizer, steps.start)
        for step in steps:
            parameter.grad = gradients[step].clone()
            set_learning_rate(optimizer, rates[step])
            optimizer.step()
        return parameter.detach(), optimizer.state[parameter]

    start = torch.tensor([[1.0, -1.0]])
    expected, mean, square = start.double(), torch.zeros(1, 2), torch.zeros(1, 2)
    for step, gradient in enumerate(gradients):
        mean = 0.8 * mean + 0.2 * gradient
        square = 0.9 * square + 0.1 * gradient**2
        corrected = mean / (1 - 0.8 ** (step + 1))
        scale = (square / (1 - 0.9 ** (step + 1))).sqrt() + 1e-3
        expected = expected * (1 - rates[step] * 0.5) - rates[step] * corrected / scale
    through, _ = run(start, range(2), None)
    torch.testing.assert_close(through.double(), expected, atol=1e-6, rtol=0)

    half, state = run(start, range(1), None)
    resumed, _ = run(half, range(1, 2), state)
    assert torch.equal(resumed, through)


def test_state_made_at_once_is_what_torch_makes_at_its_first_step() -> None:
    shards = [("a", torch.nn.Parameter(torch.ones(3)))]
    ready, lazy = (MakeOptimizer(config())(shards, {"a": (3,)}) for _ in range(2))
    initialize_state(ready, [p for _, p in shards], [])
    shards[0][1].grad = torch.ones(3)
    lazy.step()
    mine, theirs = (o.state[shards[0][1]] for o in (ready, lazy))
    assert mine.keys() == theirs.keys()
    for key in theirs:
        assert (mine[key].dtype, mine[key].shape) == (theirs[key].dtype, theirs[key].shape)
        assert not mine[key].any()


def test_an_unwanted_update_changes_nothing_and_a_wanted_one_no_bit() -> None:
    """Against AdamW that was never told, at the same gradients less the unwanted one."""

    def trained(unwanted: tuple[int, ...], told: bool) -> list[torch.Tensor]:
        draw = torch.Generator().manual_seed(0)
        parameter = torch.nn.Parameter(torch.randn(7, 5, generator=draw))
        make = MakeOptimizer(config(weight_decay=0.1, learning_rate=0.1))
        optimizer = make([("w", parameter)], {"w": (7, 5)})
        initialize_state(optimizer, [parameter], [])
        for step in range(4):
            parameter.grad = torch.randn(7, 5, generator=draw)
            if told:
                optimizer.found_inf = torch.tensor(float(step in unwanted))
                if step in unwanted:
                    parameter.grad.fill_(math.nan)
            if told or step not in unwanted:
                optimizer.step()
        state = optimizer.state[parameter]
        return [parameter.detach(), *(state[name] for name in ("step", *STATE_NAMES))]

    for unwanted in ((), (0,), (1, 2)):
        for one, other in zip(trained(unwanted, True), trained(unwanted, False), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("states", ["fp32", "bf16", "8bit"])
@pytest.mark.parametrize("max_norm", [0.0, 0.5, 100.0])
def test_gradients_are_clipped_as_they_are_read(states: str, max_norm: float) -> None:
    """The same parameters as from gradients clipped before, and the same norm as in float64; where
    it is below the bound, to the bit."""

    def trained(clip_before: bool) -> torch.Tensor:
        draw = torch.Generator().manual_seed(0)
        parameter = torch.nn.Parameter(torch.randn(70, 80, generator=draw))
        param_slice = ParamSlice(parameter, slice(0, 5600), "w", 0, 5600)
        optimizer = MakeOptimizer(config(states=states))([("w", parameter)], {"w": (70, 80)})
        initialize_state(optimizer, [parameter], [param_slice])
        for scale in (1e-3, 1.0):
            grad = torch.randn(70, 80, generator=draw) * scale
            exact = float(grad.double().square().sum())
            norm = squared_norm([grad, torch.zeros(0)]).sqrt()
            assert float(norm) == pytest.approx(math.sqrt(exact), rel=1e-12)
            if clip_before:
                if max_norm:
                    grad.div_(max(1.0, math.sqrt(exact) / max_norm))
                norm, bound = norm * 0, 0.0
            else:
                bound = max_norm
            parameter.grad = grad
            prepare_update(optimizer, 0.1, norm, bound)
            optimizer.step()
        return parameter.detach()

    one, other = trained(False), trained(True)
    if max_norm == 0.5:
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(one, other)


def test_the_norm_is_of_all_elements_however_they_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neftune_dist.optim.adamw._NORM_ELEMENTS", 7)
    tensors = [torch.arange(float(n)).view(-1, 1) for n in (0, 1, 7, 20)]
    expected = sum(float(tensor.square().sum()) for tensor in tensors)
    assert float(squared_norm(tensors)) == pytest.approx(expected, rel=1e-12)
    assert float(squared_norm([])) == 0


def test_no_update_where_the_norm_is_not_finite() -> None:
    for norm in (math.nan, math.inf):
        parameter = torch.nn.Parameter(torch.ones(3))
        optimizer = MakeOptimizer(config())([("w", parameter)], {"w": (3,)})
        initialize_state(optimizer, [parameter], [])
        parameter.grad = torch.full((3,), norm)
        prepare_update(optimizer, 0.1, squared_norm([parameter.grad]).sqrt(), 1.0)
        optimizer.step()
        assert torch.equal(parameter.detach(), torch.ones(3))


def test_warm_up_that_outlasts_the_run_is_a_warning() -> None:
    words = ["model.name_or_path=m", "optim.warmup_steps=40", "noise.warmup_steps=20"]
    (line,) = warmup_lines(load_config(None, words), 20)
    assert line.startswith("warning: optim.warmup_steps=40 outlasts") and "50% of the peak" in line
    assert len(warmup_lines(load_config(None, words), 10)) == 2
    assert len(warmup_lines(load_config(None, [*words, "noise.alpha=0"]), 10)) == 1
