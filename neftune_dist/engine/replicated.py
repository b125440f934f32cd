"""The whole model on every rank: nothing is gathered, and gradients are added once a step.

Parameters compute in `model.dtype`, beside float32 masters and moments; each parameter's gradient
is added to its float32 sum, and freed, as soon as the backward has made it. Sharding engines do the
same work, but copy and cast every weight for each forward and each backward, and every gradient
three times. Every rank makes the same update from the same sums, and the first saves it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from neftune_dist.compat.torch import foreach_copy_
from neftune_dist.config import Config
from neftune_dist.data.loader import MicroBatch
from neftune_dist.distributed.world import World
from neftune_dist.engine.base import (
    FROZEN,
    FlatShard,
    clip_and_update,
    describe_state,
    dtype_name,
    make_trained_float32,
    state_shards,
    trained_and_frozen,
)
from neftune_dist.engine.gradient_sums import GradientSums
from neftune_dist.model.load import DTYPES, initialize_buffers
from neftune_dist.model.loss import resolve_loss, token_losses
from neftune_dist.model.modules import replace_buffers, replace_parameters
from neftune_dist.optim.adamw import MakeOptimizer, initialize_state, set_updates, squared_norm
from neftune_dist.optim.param_slice import ParamSlice, local


class ReplicatedEngine:
    """The engine contract on ranks that hold the whole model each."""

    def __init__(self, config: Config, world: World) -> None:
        self.world = world
        self.device = world.device
        self.max_grad_norm = config.optim.max_grad_norm
        self.compute_dtype = DTYPES[config.model.dtype]
        self.loss = config.model.loss
        self.shapes: Mapping[str, tuple[int, ...]] = {}
        self.sums: GradientSums | None = None  # of several ranks

    def setup(self, model: Any, make_optimizer: MakeOptimizer) -> None:
        """See `Engine.setup`."""
        self.shapes = make_trained_float32(model)
        self.loss = resolve_loss(self.loss, model)
        self._materialize(model)
        initialize_buffers(model, self.device)
        self.model = model
        self.named, self.frozen = trained_and_frozen(model)
        self.masters = [_master(parameter) for _, parameter in self.named]
        self._collect_gradients()
        names = [name for name, _ in self.named]
        self.optimizer = make_optimizer(list(zip(names, self.masters, strict=True)), self.shapes)
        self.slices = [
            ParamSlice(master, slice(0, master.numel()), name, 0, master.numel())
            for name, master in zip(names, self.masters, strict=True)
        ]
        initialize_state(self.optimizer, self.masters, self.slices)

    def _materialize(self, model: nn.Module) -> None:
        """Memory for a model on the meta device; parameters that are tied stay one."""

        def empty(parameter: nn.Parameter) -> nn.Parameter:
            trained = parameter.requires_grad
            dtype = self.compute_dtype if trained else parameter.dtype
            content = torch.empty_like(parameter, dtype=dtype, device=self.device)
            return nn.Parameter(content, requires_grad=trained)

        replace_parameters(model, empty)
        replace_buffers(model, lambda buffer: torch.empty_like(buffer, device=self.device))

    def _collect_gradients(self) -> None:
        """Have the backward bring each parameter's gradient to its master."""
        if self.world.size > 1:
            self.sums = GradientSums(self.masters)
        for i, (_, parameter) in enumerate(self.named):
            if self.sums is not None:
                parameter.register_post_accumulate_grad_hook(partial(self.sums.add, i))
            elif parameter is not self.masters[i]:
                parameter.register_post_accumulate_grad_hook(partial(_add, self.masters[i]))

    def after_load(self, num_updates: int) -> None:
        """See `Engine.after_load`."""
        set_updates(self.optimizer, num_updates)
        self._copy_masters()

    @torch.no_grad()
    def _copy_masters(self) -> None:
        """Make the compute copies from the masters."""
        if self.compute_dtype != torch.float32:
            parameters: list[Tensor] = [parameter for _, parameter in self.named]
            foreach_copy_(parameters, list[Tensor](self.masters))

    def forward(self, batch: MicroBatch) -> Tensor:
        """See `Engine.forward`."""
        return token_losses(self.model, batch, self.loss)

    def backward(self, loss: Tensor, last_micro_batch: bool) -> None:
        """See `Engine.backward`."""
        if self.sums is not None:
            self.sums.is_last = last_micro_batch
        loss.backward()

    def step(self, learning_rate: float) -> float:
        """See `Engine.step`."""
        if self.sums is not None:
            self.sums.finish()
        grads = [master.grad for master in self.masters if master.grad is not None]
        norm = squared_norm(grads).sqrt()
        clip_and_update(self.optimizer, learning_rate, norm, self.max_grad_norm)
        self._copy_masters()
        return float(norm)

    def flat_state(self) -> list[FlatShard]:
        """See `Engine.flat_state`."""
        return state_shards(self.optimizer, self.slices)

    def frozen_state(self) -> list[FlatShard]:
        """See `Engine.frozen_state`."""
        return [
            FlatShard(FROZEN, name, 0, local(parameter), parameter.numel())
            for name, parameter in self.frozen
        ]

    @property
    def is_saving_replica(self) -> bool:
        """See `Engine.is_saving_replica`: the first rank."""
        return self.world.is_first

    def train(self, mode: bool) -> None:
        """See `Engine.train`."""
        self.model.train(mode)

    def describe(self) -> list[str]:
        """See `Engine.describe`."""
        ranks = f"each of {self.world.size} ranks" if self.sums else f"one {self.device.type}"
        return [
            f"engine: replicated, the whole model on {ranks}; compute "
            f"{dtype_name(self.compute_dtype)}, gradients accumulated in float32",
            describe_state(self.flat_state()),
        ]


def _master(parameter: nn.Parameter) -> nn.Parameter:
    """The float32 weights of a parameter: itself where it is float32."""
    if parameter.dtype == torch.float32:
        return parameter
    return nn.Parameter(torch.empty_like(parameter, dtype=torch.float32))


def _add(master: nn.Parameter, computed: Tensor) -> None:
    """Add the gradient that the backward has just made to its master's, and free it."""
    assert computed.grad is not None
    if master.grad is None:
        master.grad = computed.grad.to(torch.float32)
    else:
        master.grad.add_(computed.grad)
    computed.grad = None
