"""A training step of the real engine on tensors without content, in a world without other ranks.

Everything that `train` runs between two checkpoints runs here: the model as it is built, the noise,
the engine's set-up, two micro-batches forward and backward, the update. `FakeTensorMode` gives the
tensors shapes and lifetimes and no memory, and torch's `fake` process group lets every collective
succeed at once, so one process stands for any rank of any number.

The tensors are CPU tensors, as torch without CUDA has no others; which is host memory and which is
the GPU's follows from `engine.offload`. Not simulated: torch.compile, Liger's kernels and float8,
which need a GPU or its compiler, and save memory, if anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from neftune_dist.compat.fake_tensors import FakeStore, FakeTensorMode
from neftune_dist.config import Config
from neftune_dist.data.loader import MicroBatch
from neftune_dist.distributed.world import World
from neftune_dist.engine import make_engine
from neftune_dist.engine.base import MASTER
from neftune_dist.model import load
from neftune_dist.model.precision import with_dtype
from neftune_dist.model.ulysses import share_sequences
from neftune_dist.optim.adamw import MakeOptimizer
from neftune_dist.optim.quantized_state import QuantizedMoment
from neftune_dist.planning.memory import Memory, Peak
from neftune_dist.training.noise import attach_noise, token_layout

# On each rank DeepSpeed's stage 3 handles every partition of every tensor by itself: no more of
# them than this are simulated, and the size of a partition is scaled.
_MAX_PARTITIONS = 32

T = TypeVar("T")


class _Rank0(World):
    """Rank 0 of `size` ranks, alone."""

    def __init__(self, size: int) -> None:
        self.rank = self.local_rank = 0
        self.size = self.local_size = size
        self.device = torch.device("cpu")


class _IdleOptimizer(MakeOptimizer):
    """An optimizer that updates nothing, and is remembered: an update works in place, in memory
    made at set-up, so to simulate it would only take time."""

    made: torch.optim.Optimizer

    def __call__(
        self,
        parameters: Sequence[tuple[str, torch.nn.Parameter]],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> torch.optim.Optimizer:
        made = super().__call__(parameters, shapes)
        made.step = lambda *_, **__: None  # type: ignore[method-assign, assignment]
        object.__setattr__(self, "made", made)
        return made


def simulate(config: Config, folder: Path, world_size: int, batches: Sequence[MicroBatch]) -> Peak:
    """Simulate a step on rank 0, whose shards are the largest, and return its peak.

    Args:
        config: the run's; compilation, fused kernels and float8 are left out.
        folder: the model's directory; no weights are read.
        world_size: ranks of the run.
        batches: the first micro-batches of a step, with content. Only as many are run as it takes
            to meet everything that is kept from one to the next.

    Raises:
        UserError: as the engine and the model raise it.
    """
    config = simulated_settings(config)
    model = load.build(folder, config.model, config.data.packing, config.adapter)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    # The second meets gradients. With replicas the third meets more: FSDP2 keeps what the second
    # gave to the all-reduce until the next is made.
    batches = batches[: 3 if (config.engine.num_replicas or 1) > 1 else 2]
    layouts = [token_layout(batch) for batch in batches]
    zero3 = config.engine.name == "deepspeed" and config.engine.zero_stage in (None, 3)
    num_ranks = min(world_size, _MAX_PARTITIONS) if zero3 else world_size
    # None of the partitions left out shares this rank's sequences.
    num_ranks = max(num_ranks, config.engine.sequence_parallel)
    with _world(config, model, num_ranks) as group:
        engine = make_engine(config, _Rank0(num_ranks))
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        with fake, Memory(fake, vocabulary) as memory:
            noise = attach_noise(config, model, 0, group)
            noise.sign = 1  # the other one takes the same memory
            optimizer = _IdleOptimizer(config.optim, config.train.seed)
            engine.setup(model, optimizer)
            engine.after_load(0)
            share = num_ranks / world_size
            kept = _EngineState(engine, optimizer, memory, config.engine.offload == "cpu", share)
            kept.name_state()
            for i, (batch, layout) in enumerate(zip(batches, layouts, strict=True)):
                which = "a later micro-batch" if i else "the first micro-batch"
                memory.default, memory.phase = "activations", f"forward of {which}"
                noise.describe(_faked(layout, fake))
                there = _faked(batch, fake)
                memory.see(*filter(torch.is_tensor, vars(there).values()))
                loss = engine.forward(there)
                memory.phase = f"backward of {which}"
                engine.backward(loss, i == len(batches) - 1)
                kept.name_gradients()
            memory.default, memory.phase = "optimizer", "update"
            engine.step(config.optim.learning_rate)
            noise.remove()
    return memory.peak()


@dataclass(frozen=True)
class _EngineState:
    """Tensors that an engine keeps between micro-batches, which this names to `memory`.

    Attributes:
        engine: after its set-up.
        optimizer: that the engine made.
        memory: follows their tensors.
        on_host: whether it lies in host memory.
        share: size of a real shard relative to a simulated one.
    """

    engine: Any
    optimizer: _IdleOptimizer
    memory: Memory
    on_host: bool
    share: float

    def name_state(self) -> None:
        """Name the state. Called after set-up."""
        # Its parameters, too; they are named after it.
        self.memory.name(list(vars(self.optimizer.made).values()), "optimizer")
        parameters = list(self.engine.model.parameters())
        self.memory.name([p.detach() for p in parameters], "weights")
        self.memory.name(list(self.engine.model.buffers()), "weights")
        shards = [getattr(p, "ds_tensor", None) for p in parameters]
        self.memory.name(shards, "weights", share=self.share)
        for shard in self.engine.flat_state():
            held = shard.tensor
            parts = [held.codes, held.scales] if isinstance(held, QuantizedMoment) else held
            self._name(parts, "weights" if shard.kind == MASTER else "optimizer")
        self.name_gradients()

    def name_gradients(self) -> None:
        """Name the gradients. Called after a backward."""
        # The model's own, which ZeRO-1 keeps whole. FSDP2 updates them, so they are shards.
        self.memory.name([p.grad for p in self.engine.model.parameters()], "gradients")
        groups = self.optimizer.made.param_groups
        self._name([p.grad for group in groups for p in group["params"]], "gradients")
        # DeepSpeed keeps others under other names, by stage.
        if hasattr(self.engine, "zero"):
            compat = import_module("neftune_dist.compat.deepspeed")
            self._name(compat.kept_gradients(self.engine.zero), "gradients")

    def _name(self, where: Any, kind: str) -> None:
        self.memory.name(where, kind, self.on_host, self.share)


def simulated_settings(config: Config) -> Config:
    """Return the configuration as on a GPU, without compilation, fused kernels and float8."""
    config = with_dtype(config, "bf16")
    model = replace(config.model, compile=False, kernels="torch", float8="none")
    if model.loss == "liger":
        model.loss = "chunked"
    if model.attention == "flex":
        model.attention = "varlen"
    return replace(config, model=model)


def _faked(thing: T, mode: FakeTensorMode) -> T:
    """Return the dataclass with tensors that have no content."""
    changed: dict[str, Any] = {
        name: mode.from_tensor(value)
        for name, value in vars(thing).items()
        if isinstance(value, Tensor)
    }
    return replace(thing, **changed)  # type: ignore[type-var]


@contextmanager
def _world(config: Config, model: Any, size: int) -> Iterator[dist.ProcessGroup | None]:
    """A process group of that size without other ranks, with the engine's patches; gives the group
    of the ranks that share this rank's sequences."""
    assert not dist.is_initialized()
    slices = config.engine.sequence_parallel
    with ExitStack() as stack:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
        stack.callback(dist.destroy_process_group)
        if config.engine.name == "deepspeed":
            compat = import_module("neftune_dist.compat.deepspeed")
            stack.enter_context(compat.simulated(model, config.engine.zero_stage or 3))
        group = dist.new_group(range(slices)) if slices > 1 else None
        share_sequences(group, model.config)
        stack.callback(share_sequences, None, model.config)
        yield group
