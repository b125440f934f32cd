"""FSDP2: `fully_shard` for each transformer block and the rest, optionally replicated (HSDP).

Parameters are float32 shards and are their own masters; blocks compute in `model.dtype`; gradients
are reduced and accumulated in float32, as shards, after every micro-batch. With
`engine.sync_every=step` weights are gathered, and gradients reduced, once a step: they stay whole
from one micro-batch to the next. With `engine.offload=cpu` shards, gradients and moments lie in
host memory, and the update is made there.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from neftune_dist.compat.torch import local_shape_and_offset
from neftune_dist.config import Config, check_divides
from neftune_dist.data.loader import MicroBatch
from neftune_dist.distributed.world import World
from neftune_dist.engine.base import (
    FROZEN,
    FlatShard,
    check_shardable,
    clip_and_update,
    describe_state,
    dtype_name,
    make_trained_float32,
    state_shards,
    trained_and_frozen,
)
from neftune_dist.engine.used_parameters import UsedParameters
from neftune_dist.model.float8 import update_float8_scales
from neftune_dist.model.load import DTYPES, initialize_buffers
from neftune_dist.model.loss import resolve_loss, token_losses
from neftune_dist.model.modules import replace_buffers
from neftune_dist.model.optimizations import blocks
from neftune_dist.optim.adamw import MakeOptimizer, initialize_state, set_updates, squared_norm
from neftune_dist.optim.param_slice import ParamSlice, local


class FSDP2Engine:
    """The engine contract over FSDP2."""

    def __init__(self, config: Config, world: World) -> None:
        self.world = world
        self.device = world.device
        self.max_grad_norm = config.optim.max_grad_norm
        self.compute_dtype = DTYPES[config.model.dtype]
        self.num_replicas = config.engine.num_replicas or 1
        check_divides("engine.num_replicas", self.num_replicas, world.size)
        self.gathers_float8 = config.model.float8 == "tensorwise"
        self.loss = config.model.loss
        self.syncs_once = config.engine.sync_every == "step"
        keep = self.syncs_once or config.engine.reshard_after_forward is False
        self.reshard_after_forward = not keep
        self.mesh = self._mesh()
        self.offload: OffloadPolicy | None = None
        self.state_device = world.device
        if config.engine.offload == "cpu":
            self.offload = CPUOffloadPolicy(pin_memory=world.device.type == "cuda")
            self.state_device = torch.device("cpu")
        self.shapes: Mapping[str, tuple[int, ...]] = {}

    def _mesh(self) -> DeviceMesh:
        kind, shards = self.world.device.type, self.world.size // self.num_replicas
        if self.num_replicas == 1:
            return init_device_mesh(kind, (shards,), mesh_dim_names=("shard",))
        return init_device_mesh(
            kind, (self.num_replicas, shards), mesh_dim_names=("replicate", "shard")
        )

    def setup(self, model: Any, make_optimizer: MakeOptimizer) -> None:
        """See `Engine.setup`."""
        check_shardable(model, needs_all_gradients=self.world.size > 1)
        self.shapes = make_trained_float32(model)
        self.loss = resolve_loss(self.loss, model)
        policy = MixedPrecisionPolicy(
            param_dtype=self.compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        options: dict[str, Any] = {
            "mesh": self.mesh,
            "mp_policy": policy,
            "offload_policy": self.offload or OffloadPolicy(),
        }
        units: list[Any] = _separate(blocks(model), model)
        self.used = UsedParameters(self.world.device, {"": model, **_named(model, units)})
        for block in units:
            # The backward begins with the last block, whose weights are still gathered.
            reshard = self.reshard_after_forward and block is not units[-1]
            fully_shard(block, reshard_after_forward=reshard, **options)
        fully_shard(model, **options)
        # Without this, FSDP2 starts to gather the next block's weights when the GPU begins this
        # block. Started one block earlier, they have arrived when they are needed.
        for block, following in pairwise(units):
            block.set_modules_to_forward_prefetch([following])
        model.to_empty(device=self.state_device)
        # Buffers are not offloaded.
        replace_buffers(model, lambda buffer: buffer.to(self.world.device))
        initialize_buffers(model, self.world.device)
        self.model = model
        self.named, self.frozen = trained_and_frozen(model)
        self.optimizer = make_optimizer(self.named, self.shapes)
        self.slices = list(self._slices())
        initialize_state(self.optimizer, [p for _, p in self.named], self.slices)

    def after_load(self, num_updates: int) -> None:
        """See `Engine.after_load`: the shards are the masters, so nothing is copied."""
        set_updates(self.optimizer, num_updates)
        self._refresh_scales()

    def _refresh_scales(self) -> None:
        """Compute the scales of float8 weights again, after the weights have changed."""
        if self.gathers_float8:
            update_float8_scales(self.model)

    def forward(self, batch: MicroBatch) -> Tensor:
        """See `Engine.forward`."""
        return token_losses(self.model, batch, self.loss)

    def backward(self, loss: Tensor, last_micro_batch: bool) -> None:
        """See `Engine.backward`."""
        self.used.check(loss, [name for name, _ in self.named])
        self.model.set_is_last_backward(last_micro_batch)
        if self.syncs_once:
            self.model.set_requires_gradient_sync(last_micro_batch)
            self.model.set_reshard_after_backward(last_micro_batch)
        if self.num_replicas > 1 and self.offload is None:
            # Replicas lie on other machines, perhaps, and exchange once a step. (Offloaded, the
            # sums would have to wait for it on the device.)
            self.model.set_requires_all_reduce(last_micro_batch)
        # FSDP2 divides the sum over ranks by their number: cancelled here (law 3).
        (loss * self.world.size).backward()

    def step(self, learning_rate: float) -> float:
        """See `Engine.step`."""
        grads = [p.grad.to_local() for _, p in self.named if isinstance(p.grad, DTensor)]
        square = squared_norm(grads).to(self.world.device)  # where the process group works
        # Over all replicas, too: each by itself could round the sum in another way, clip by another
        # factor, and become another model.
        dist.all_reduce(square)
        norm = (square / self.num_replicas).sqrt().to(self.state_device)
        clip_and_update(self.optimizer, learning_rate, norm, self.max_grad_norm)
        self._refresh_scales()
        return float(norm)

    def flat_state(self) -> list[FlatShard]:
        """See `Engine.flat_state`."""
        return state_shards(self.optimizer, self.slices)

    def frozen_state(self) -> list[FlatShard]:
        """See `Engine.frozen_state`."""
        return [
            FlatShard(FROZEN, name, start, local(parameter)[:held], parameter.numel())
            for name, parameter in self.frozen
            for start, held in self._range(parameter)
        ]

    def _slices(self) -> Iterator[ParamSlice]:
        for name, parameter in self.named:
            for start, held in self._range(parameter):
                yield ParamSlice(parameter, slice(0, held), name, start, parameter.numel())

    @staticmethod
    def _range(parameter: Tensor) -> Iterator[tuple[int, int]]:
        """This rank's range of the whole parameter: its start and length; nothing where empty."""
        assert isinstance(parameter, DTensor)
        shape, offset = local_shape_and_offset(parameter)
        if 0 not in shape:
            # Sharded along dimension 0, of which a row is contiguous.
            yield offset[0] * math.prod(parameter.shape[1:]), math.prod(shape)

    @property
    def is_saving_replica(self) -> bool:
        """See `Engine.is_saving_replica`: the first replica."""
        return self.num_replicas == 1 or self.mesh["replicate"].get_local_rank() == 0

    def train(self, mode: bool) -> None:
        """See `Engine.train`."""
        self.model.train(mode)

    def describe(self) -> list[str]:
        """See `Engine.describe`."""
        shards = self.world.size // self.num_replicas
        layout = f"{shards} shards" + (
            f" x {self.num_replicas} replicas" if self.num_replicas > 1 else ""
        )
        when = "once a step" if self.syncs_once else "after each micro-batch"
        return [
            f"engine: fsdp2, {layout} on {self.world.device.type}; "
            f"compute {dtype_name(self.compute_dtype)}, "
            f"gradients reduced {when} and accumulated in float32",
            describe_state(self.flat_state()),
        ]


def _named(model: nn.Module, units: list[nn.Module]) -> dict[str, nn.Module]:
    chosen = set(units)
    return {name: module for name, module in model.named_modules() if module in chosen}


def _separate(units: list[nn.Module], model: nn.Module) -> list[nn.Module]:
    """The units that share no parameter with the rest of the model, because FSDP2 can shard a
    parameter in one unit only (Zamba's blocks share some; the root unit then holds them)."""
    names: dict[int, int] = Counter(
        id(p) for _, p in model.named_parameters(remove_duplicate=False)
    )

    def is_separate(unit: nn.Module) -> bool:
        own = Counter(id(p) for _, p in unit.named_parameters(remove_duplicate=False))
        return all(names[key] == count for key, count in own.items())

    return [unit for unit in units if is_separate(unit)]
