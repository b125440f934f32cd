"""Each engine on one rank, in this process: its updates, those left out, and the state it names.

What they train, on more ranks too: tests/distributed/test_parity.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from neftune_dist.config import UserError, load_config
from neftune_dist.data.loader import MicroBatch
from neftune_dist.distributed.world import World
from neftune_dist.engine import make_engine
from neftune_dist.engine.base import FROZEN, MASTER, Engine, check_shardable, make_trained_float32
from neftune_dist.model import load
from neftune_dist.model.modules import forward_of
from neftune_dist.optim.adamw import MakeOptimizer
from neftune_dist.optim.param_slice import STATE_NAMES
from tests.support import tiny_model

ENGINES = {
    "replicated": ["engine.name=replicated"],
    "fsdp2": ["engine.name=fsdp2"],
    "zero-1": ["engine.name=deepspeed", "engine.zero_stage=1"],
    "zero-2": ["engine.name=deepspeed", "engine.zero_stage=2"],
    "zero-3": ["engine.name=deepspeed", "engine.zero_stage=3"],
}
RATE = 1e-2
KINDS = (MASTER, *STATE_NAMES)
# Adam's epsilon makes the size of a gradient count.
SETTINGS = ["optim.epsilon=1e-2", "optim.weight_decay=0.1"]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    linear = torch.nn.functional.linear
    alone = World()
    yield alone
    alone.close()
    torch.nn.functional.linear = linear  # type: ignore[assignment]  # ZeRO-3 replaces it


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.make_model(tmp_path_factory.mktemp("engines"))


@dataclass
class Made:
    """An engine with the weights of `folder`."""

    engine: Engine
    model: Any

    def masters(self) -> dict[str, Tensor]:
        shards = self.engine.flat_state()
        return {s.name: s.tensor.clone() for s in shards if s.kind == MASTER}  # type: ignore

    def accumulate(self, *batches: MicroBatch) -> None:
        for i, batch in enumerate(batches):
            loss = self.engine.forward(batch) / num_targets(batches)
            self.engine.backward(loss, i == len(batches) - 1)


def state_of(engine: Engine) -> dict[str, Tensor]:
    """A copy of all masters and moments, by key."""
    return {s.key: s.tensor[:].clone() for s in engine.flat_state()}


def num_targets(batches: Sequence[MicroBatch]) -> int:
    return sum(len(batch.targets) for batch in batches)


def make(name: str, folder: Path, world: World, *words: str, num_updates: int = 0) -> Made:
    needed = [f"model.name_or_path={folder}", "data.source=d", "run_dir=r", "model.dtype=fp32"]
    config = load_config(None, [*needed, *SETTINGS, *ENGINES[name], *words])
    model = load.build(folder, config.model, config.data.packing, config.adapter)
    weights = load.open_weights(model, folder, config.model, 0)
    engine = make_engine(config, world)
    engine.setup(model, MakeOptimizer(config.optim))
    for shard in engine.frozen_state() + engine.flat_state():
        assert isinstance(shard.tensor, Tensor)
        if shard.kind in (MASTER, FROZEN):
            stop = shard.start + len(shard.tensor)
            shard.tensor.copy_(weights.read(shard.name, shard.start, stop))
    engine.after_load(num_updates)
    return Made(engine, model)


def batch(seed: int, size: int = 24) -> MicroBatch:
    """One document, every token but the first learned."""
    ids = torch.randint(10, 500, (1, size), generator=torch.Generator().manual_seed(seed))
    one = torch.tensor([0])
    return MicroBatch(
        input_ids=ids,
        position_ids=torch.arange(size)[None],
        attention_mask=None,
        positions=torch.arange(size - 1),
        targets=ids[0, 1:],
        lengths=torch.tensor([size]),
        documents=one,
        epochs=one,
        segment=torch.zeros(size, dtype=torch.int64),
        token_length=torch.full((size,), size),
        cu_seqlens=torch.tensor([0, size], dtype=torch.int32),
        document_lengths=(size,),
    )


@dataclass(frozen=True)
class Step:
    """A step's learning rate, what multiplies its loss, and its micro-batches."""

    rate: float
    scale: float
    batches: tuple[MicroBatch, ...]


NUM_UPDATES = 3  # made before, so Adam's bias correction begins with the fourth
MAX_GRAD_NORM = 0.5  # the first step's gradient is above it, the second's below
STEPS = (
    Step(1e-2, 1.0, (batch(0), batch(1), batch(2))),
    Step(3e-3, 0.01, (batch(3), batch(4, size=9))),
)


def plain_updates(folder: Path, dtype: torch.dtype) -> tuple[list[float], dict[str, Tensor]]:
    """The gradients' norms and the masters of `STEPS`, by torch's AdamW on float32 copies of a
    transformers model's weights."""
    read = transformers.AutoModelForCausalLM.from_pretrained
    model = read(folder, dtype=dtype)
    weights = dict(model.named_parameters())
    masters = {
        name: torch.nn.Parameter(weight.detach().clone())
        for name, weight in read(folder, dtype=torch.float32).named_parameters()
    }
    optim = load_config(None, ["model.name_or_path=m", "data.source=d", "run_dir=r"]).optim
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in masters.values() if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in masters.values() if p.dim() < 2], "weight_decay": 0.0},
        ],
        betas=(optim.beta1, optim.beta2),
        eps=1e-2,
    )
    for master in masters.values():
        adamw.state[master] = {
            "step": torch.tensor(float(NUM_UPDATES)),
            "exp_avg": torch.zeros_like(master),
            "exp_avg_sq": torch.zeros_like(master),
        }
    norms = []
    for step in STEPS:
        for one in step.batches:
            logits = model(one.input_ids).logits[0, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits, one.targets, reduction="sum")
            (loss * step.scale / num_targets(step.batches)).backward()
            for name, weight in weights.items():
                assert weight.grad is not None
                gradient = weight.grad.float()
                kept = masters[name].grad
                masters[name].grad = gradient if kept is None else kept + gradient
                weight.grad = None
        norms.append(float(torch.nn.utils.clip_grad_norm_(list(masters.values()), MAX_GRAD_NORM)))
        for group in adamw.param_groups:
            group["lr"] = step.rate
        adamw.step()
        adamw.zero_grad()
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(masters[name])
    return norms, {name: master.detach() for name, master in masters.items()}


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The L2 norm of the difference of all tensors."""
    assert one.keys() == other.keys()
    return math.hypot(*(float((one[key].view(-1) - other[key].view(-1)).norm()) for key in one))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("fp32", 1e-4), ("bf16", 2e-2)], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("name", ENGINES)
def test_updates_are_those_of_plain_adamw(
    name: str, dtype: str, tolerance: float, folder: Path, world: World
) -> None:
    """Clipped and not, over several micro-batches, at a rate for each step, after a resume."""
    words = [f"model.dtype={dtype}", f"optim.max_grad_norm={MAX_GRAD_NORM}", "model.loss=plain"]
    made = make(name, folder, world, *words, num_updates=NUM_UPDATES)
    before = made.masters()
    norms = []
    for step in STEPS:
        for i, one in enumerate(step.batches):
            loss = made.engine.forward(one) * step.scale / num_targets(step.batches)
            made.engine.backward(loss, i == len(step.batches) - 1)
        norms.append(made.engine.step(step.rate))
    expected_norms, expected = plain_updates(folder, load.DTYPES[dtype])
    assert expected_norms[0] > 2 * MAX_GRAD_NORM and expected_norms[1] < MAX_GRAD_NORM / 2
    assert norms == pytest.approx(expected_norms, rel=tolerance)
    made_masters = made.masters()
    assert distance(made_masters, expected) < tolerance * distance(before, expected)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ENGINES)
def test_gradient_that_is_not_finite_changes_nothing(
    name: str, dtype: str, folder: Path, world: World
) -> None:
    """And is dropped: the next step is as if it had never been."""
    made = make(name, folder, world, f"model.dtype={dtype}")
    untouched = make(name, folder, world, f"model.dtype={dtype}")
    before = made.masters()
    loss = made.engine.forward(batch(0))
    made.engine.backward(loss * math.nan, False)
    made.engine.backward(made.engine.forward(batch(1)), True)
    assert not math.isfinite(made.engine.step(RATE))
    assert all(torch.equal(before[key], value) for key, value in made.masters().items())
    norms = []
    for one in (made, untouched):
        one.accumulate(batch(2))
        norms.append(one.engine.step(RATE))
    assert norms[0] == norms[1]
    after = untouched.masters()
    assert all(torch.equal(after[key], value) for key, value in made.masters().items())
    assert not all(torch.equal(before[key], value) for key, value in after.items())


@pytest.mark.parametrize("name", ENGINES)
def test_parameter_without_a_gradient_in_a_step_is_left_alone(
    name: str, folder: Path, world: World
) -> None:
    """Its moments as well, and it counts the update, as it does after a resume."""
    made = make(name, folder, world)
    norm = made.model.model.layers[0].post_attention_layernorm
    key = "model.layers.0.post_attention_layernorm.weight"
    made.accumulate(batch(0))
    made.engine.step(RATE)
    before = state_of(made.engine)
    with forward_of(norm, lambda hidden: hidden):
        made.accumulate(batch(1))
        made.engine.step(RATE)
    after = state_of(made.engine)
    assert {k for k, held in after.items() if torch.equal(held, before[k])} == {
        f"{kind}/{key}" for kind in KINDS
    }
    resumed = make(name, folder, world)
    for shard in resumed.engine.flat_state():
        shard.tensor.copy_(after[shard.key])
    resumed.engine.after_load(2)
    for one in (made, resumed):
        one.accumulate(batch(2))
        one.engine.step(RATE)
    last = state_of(resumed.engine)
    assert all(torch.equal(held, last[k]) for k, held in state_of(made.engine).items())


def _leave_norm_alone(folder: Path) -> None:
    with World() as world:
        made = make("zero-3", folder, world)
        norm = made.model.model.layers[0].post_attention_layernorm
        made.accumulate(batch(0))
        made.engine.step(RATE)
        before = norm.weight.detach().clone()
        with forward_of(norm, lambda hidden: hidden):
            made.accumulate(batch(1))
            made.engine.step(RATE)
        assert len(before) and torch.equal(norm.weight, before)


def test_parameter_without_a_gradient_computes_as_before(folder: Path) -> None:
    """ZeRO-3 keeps small parameters whole, beside their partitions."""
    done = tiny_model.call_forked(partial(_leave_norm_alone, folder), ranks=2)
    assert done.returncode == 0, done.stderr


def test_deepspeed_does_not_wait_for_the_gpu_before_a_forward(
    folder: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its timer would, from the third step on."""
    made = make("zero-1", folder, world, "model.dtype=bf16")
    for seed in range(3):
        made.accumulate(batch(seed))
        made.engine.step(RATE)
    monkeypatch.setattr("deepspeed.accelerator.cpu_accelerator.CPU_Accelerator.synchronize", None)
    made.engine.forward(batch(3))


def test_trained_parameters_are_laid_out_as_masters_are() -> None:
    module = nn.Linear(3, 5, device="meta")
    module.weight = nn.Parameter(torch.empty(3, 5, device="meta").t())
    module.bias.requires_grad_(False)
    bias, tied = module.bias, nn.ModuleList([module, nn.Linear(3, 5, device="meta")])
    tied[1].weight = module.weight
    tied[1].bias = nn.Parameter(torch.empty(5, dtype=torch.float16, device="meta"))
    assert make_trained_float32(tied) == {"0.weight": (5, 3), "1.bias": (5,)}
    assert module.weight.is_contiguous() and tied[1].bias.dtype == torch.float32
    assert tied[1].weight is module.weight and module.bias is bias
    module.extra = nn.Parameter(torch.empty(2, 0, device="meta"))
    with pytest.raises(UserError, match=r"0\.extra has no element"):
        make_trained_float32(tied)


def test_models_that_are_not_sharded_are_refused() -> None:
    model = nn.Linear(3, 5)
    check_shardable(model, True)
    model.experts = nn.ModuleList([nn.Linear(3, 3)])
    check_shardable(model, False)
    with pytest.raises(UserError, match=r"modules of their own \(experts\).*zero_stage=3"):
        check_shardable(model, True)
    model.gain = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(UserError, match=r"scalar parameter gain.*engine\.name=replicated"):
        check_shardable(model, False)


@pytest.mark.parametrize("name", ENGINES)
def test_state_names_every_tensor_and_shape_once(name: str, folder: Path, world: World) -> None:
    made = make(name, folder, world, "model.dtype=bf16")
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
    shapes = {key: tuple(p.shape) for key, p in plain.named_parameters()}
    assert dict(made.engine.shapes) == shapes
    state = made.engine.flat_state()
    assert sorted(s.key for s in state) == sorted(
        f"{kind}/{key}" for kind in KINDS for key in shapes
    )
    for shard in state:
        assert shard.numel == math.prod(shapes[shard.name]) == shard.tensor.numel()
    assert made.engine.is_saving_replica
    assert made.engine.frozen_state() == []


@pytest.mark.parametrize("name", ENGINES)
def test_evaluates_without_dropout(name: str, folder: Path, world: World) -> None:
    made = make(name, folder, world)
    made.engine.train(False)
    assert not made.model.training
    made.engine.train(True)
    assert made.model.training
