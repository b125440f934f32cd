"""The optimizer and the learning rate.

The learning rate is a pure function of the step, so a resumed run needs no scheduler state. The
optimizer is AdamW (Loshchilov and Hutter, arXiv 1711.05101), on whatever shards the engine holds:
torch's where moments are float32, `LowPrecisionAdamW` where they are smaller. Its state is made at
once, so that a fresh run and a resumed one look the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neftune_dist.compat.torch import foreach_norm
from neftune_dist.config import OptimConfig
from neftune_dist.optim.adamw_low_precision import (
    MIN_NUMEL_8BIT,
    STATE_NAMES,
    LowPrecisionAdamW,
    Moment,
    ParamSlice,
    local,
)
from neftune_dist.optim.quantized_state import BLOCK, QuantizedMoment
from neftune_dist.optim.schedule import Schedule

_NORM_ELEMENTS = 1 << 18  # of gradients in host memory, at a time


def learning_rate(config: OptimConfig, step: int, num_steps: int) -> float:
    """The learning rate of step 0 <= step < num_steps."""
    schedule = Schedule(
        config.learning_rate, config.schedule, config.warmup_steps, config.final_fraction
    )
    return schedule.value(step, num_steps)


@dataclass(frozen=True)
class MakeOptimizer:
    """Builds AdamW over an engine's shards. Weight decay falls on matrices only.

    Attributes:
        config: the section `optim`.
        seed: of the rounding, where `optim.states` is bf16.
    """

    config: OptimConfig
    seed: int = 0

    def __call__(
        self,
        parameters: Sequence[tuple[str, torch.nn.Parameter]],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> torch.optim.Optimizer:
        """Build the optimizer, without state.

        Args:
            parameters: names and the shards to update.
            shapes: of the whole parameters, by name.
        """
        matrices = [p for name, p in parameters if len(shapes[name]) >= 2]
        vectors = [p for name, p in parameters if len(shapes[name]) < 2]
        groups = [
            {"params": matrices, "weight_decay": self.config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        settings: dict[str, Any] = {
            "lr": self.config.learning_rate,
            "betas": (self.config.beta1, self.config.beta2),
            "eps": self.config.epsilon,
        }
        if self.config.states == "fp32":
            return torch.optim.AdamW(groups, **settings, fused=True)
        return LowPrecisionAdamW(groups, **settings, states=self.config.states, seed=self.seed)


def initialize_state(
    optimizer: torch.optim.Optimizer, tensors: Sequence[Tensor], slices: Sequence[ParamSlice]
) -> None:
    """Make zero moments and counts of updates, as torch makes them at its first step.

    Args:
        tensors: all that the optimizer updates.
        slices: which ranges of which parameters they hold.
    """
    if isinstance(optimizer, LowPrecisionAdamW):
        optimizer.initialize(tensors, slices)
        return
    for tensor in tensors:
        optimizer.state[tensor] = {
            "step": torch.zeros((), dtype=torch.float32, device=tensor.device),
            **{name: torch.zeros_like(tensor) for name in STATE_NAMES},
        }


def moments(optimizer: torch.optim.Optimizer, param_slice: ParamSlice) -> dict[str, Moment]:
    """A slice's moments by name, where the optimizer keeps them: to read them and to write them."""
    state = optimizer.state[param_slice.tensor]
    if isinstance(optimizer, LowPrecisionAdamW):
        held: dict[str, Moment] = next(kept for one, kept in state["slices"] if one is param_slice)
        return held
    return {name: local(state[name])[param_slice.part] for name in STATE_NAMES}


def precision_of(moment: Moment) -> str:
    """The precision of a moment, for people."""
    if isinstance(moment, QuantizedMoment):
        return f"8-bit in blocks of {BLOCK}"
    return str(moment.dtype).removeprefix("torch.")


def state_bytes(config: OptimConfig, numel: int) -> int:
    """Bytes of both moments of one parameter of `numel` elements, over all its shards."""
    if config.states == "8bit" and numel >= MIN_NUMEL_8BIT:
        return 2 * (numel + 4 * -(-numel // BLOCK))
    return numel * (4 if config.states == "bf16" else 8)


def set_updates(optimizer: torch.optim.Optimizer, num_updates: int) -> None:
    """Set the number of updates made so far, which Adam's bias correction needs."""
    for state in optimizer.state.values():
        state["step"].fill_(num_updates)


def skip_update_where(optimizer: torch.optim.Optimizer, unwanted: Tensor) -> None:
    """Let the next update change nothing (no parameter, no moment, no count) where `unwanted`, a
    bool scalar on the parameters' device, is true. So the host need not wait for its value."""
    # Torch's fused optimizers look for it; it is what GradScaler sets.
    optimizer.found_inf = unwanted.float()  # type: ignore[attr-defined]


def divide_gradients(optimizer: torch.optim.Optimizer, divisor: Tensor) -> None:
    """Set the divisor, float32 () on the gradients' device, that the next update divides gradients
    by as it reads them. The gradients in memory may be divided by it as well, or not."""
    # As with found_inf: what GradScaler sets, and torch's fused optimizers look for.
    optimizer.grad_scale = divisor  # type: ignore[attr-defined]


def prepare_update(
    optimizer: torch.optim.Optimizer, rate: float, norm: Tensor, max_norm: float
) -> None:
    """Set rate and clipping of the next update, which alone reads the gradients.

    Args:
        rate: the learning rate.
        norm: of the gradients, float64 () on their device; if it is not finite, nothing changes.
        max_norm: the gradients are divided by norm / max_norm where that is above 1; 0: never.
    """
    set_learning_rate(optimizer, rate)
    skip_update_where(optimizer, ~norm.isfinite())
    # A checkpoint has one count for all parameters: those without a gradient count the update, too.
    for group in optimizer.param_groups:
        for count in [optimizer.state[p]["step"] for p in group["params"] if p.grad is None]:
            count += norm.isfinite().to(count)
    if max_norm:
        excess = ((norm + 1e-6) / max_norm).clamp(min=1.0)
        divide_gradients(optimizer, excess.to(torch.float32))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of the next update, for every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def squared_norm(tensors: list[Tensor]) -> Tensor:
    """The sum of all elements' squares, float64 (), on their device; they are read once."""
    tensors = [tensor.view(-1) for tensor in tensors if tensor.numel()]
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    if tensors[0].device.type == "cpu":
        # There they are copied to float64: as much at a time as stays in the cache.
        tensors = [part for tensor in tensors for part in tensor.split(_NORM_ELEMENTS)]
    norms = foreach_norm(tensors, 2, dtype=torch.float64)
    return torch.stack(norms).square().sum()
