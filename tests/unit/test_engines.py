"""Each engine on one rank, in this process: updates that are left out, and the state it names. What
they train, on more ranks too: tests/distributed/test_parity.py."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from neftune_dist.config import load_config
from neftune_dist.data.loader import MicroBatch
from neftune_dist.distributed.world import World
from neftune_dist.engine import make_engine
from neftune_dist.engine.base import FROZEN, MASTER, Engine
from neftune_dist.model import load
from neftune_dist.optim import MakeOptimizer
from tests.support import tiny_model

ENGINES = {
    "single": ["engine.name=single"],
    "fsdp2": ["engine.name=fsdp2"],
    "zero-1": ["engine.name=deepspeed", "engine.zero_stage=1"],
    "zero-2": ["engine.name=deepspeed", "engine.zero_stage=2"],
    "zero-3": ["engine.name=deepspeed", "engine.zero_stage=3"],
}
RATE = 1e-2
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
            loss = self.engine.forward(batch) / sum(len(each.targets) for each in batches)
            self.engine.backward(loss, i == len(batches) - 1)


def make(name: str, folder: Path, world: World, *words: str, num_updates: int = 0) -> Made:
    needed = [f"model.name_or_path={folder}", "data.source=d", "run_dir=r", "model.dtype=fp32"]
    config = load_config(None, [*needed, *SETTINGS, *ENGINES[name], *words])
    model = load.build(folder, config.model, config.data.packing, config.adapter)
    weights = load.open_weights(model, folder, config.model, 0)
    engine = make_engine(config, world)
    engine.setup(model, MakeOptimizer(config.optim))
    for shard in engine.frozen_state() + engine.flat_state():
        assert isinstance(shard.tensor, Tensor) and shard.start == 0
        if shard.kind in (MASTER, FROZEN):
            shard.tensor.copy_(weights.read(shard.name, 0, shard.numel))
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
def test_state_names_every_tensor_and_shape_once(name: str, folder: Path, world: World) -> None:
    made = make(name, folder, world, "model.dtype=bf16")
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
    shapes = {key: tuple(p.shape) for key, p in plain.named_parameters()}
    assert dict(made.engine.shapes) == shapes
    state = made.engine.flat_state()
    assert sorted(s.key for s in state) == sorted(
        f"{kind}/{key}" for kind in (MASTER, "exp_avg", "exp_avg_sq") for key in shapes
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
