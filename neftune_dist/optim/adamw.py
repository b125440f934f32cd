"""AdamW (Loshchilov and Hutter, arXiv 1711.05101) on the shards that an engine holds.

`MakeOptimizer` chooses the class by `optim.states`: torch's fused AdamW for float32 moments,
`LowPrecisionAdamW` for bfloat16 and 8-bit ones. The moments are allocated at once, not at the first
step, so that a checkpoint is loaded into a fresh run as into a resumed one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neftune_dist.compat.torch import foreach_norm
from neftune_dist.config import OptimConfig
from neftune_dist.optim.adamw_low_precision import MIN_NUMEL_8BIT, LowPrecisionAdamW
from neftune_dist.optim.param_slice import STATE_NAMES, Moment, ParamSlice, local
from neftune_dist.optim.quantized_state import BLOCK, QuantizedMoment

_NORM_ELEMENTS = 1 << 18  # of gradients in host memory, at a time


@dataclass(frozen=True)
class MakeOptimizer:
    """Builds AdamW over an engine's shards. Weight decay falls on matrices only, and not on stacked
    biases (gpt-oss's experts).

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
        matrices = {name for name, shape in shapes.items() if len(shape) >= 2} - {
            name for name in shapes if name.endswith("bias")
        }
        groups = [
            {
                "params": [p for name, p in parameters if (name in matrices) == decays],
                "weight_decay": w,
            }
            for decays, w in ((True, self.config.weight_decay), (False, 0.0))
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


def prepare_update(
    optimizer: torch.optim.Optimizer, learning_rate: float, norm: Tensor, max_norm: float
) -> None:
    """Set the learning rate, the skip and the clipping of the next update, without waiting for the
    GPU: the optimizer reads all three on the device.

    The two attributes set here are those that GradScaler sets and that torch's fused optimizers
    read: `found_inf` (1: change no parameter, no moment, no count) and `grad_scale` (divide the
    gradients by it as they are read).

    Args:
        norm: L2 norm of the gradients, float64 () on their device; if it is not finite, the update
            changes nothing.
        max_norm: gradients of a greater norm are scaled down to it; 0: no clipping.
    """
    set_learning_rate(optimizer, learning_rate)
    optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
    # A checkpoint has one count for all parameters, so those without a gradient count the update.
    for group in optimizer.param_groups:
        for count in [optimizer.state[p]["step"] for p in group["params"] if p.grad is None]:
            count += norm.isfinite().to(count)
    if max_norm:
        excess = ((norm + 1e-6) / max_norm).clamp(min=1.0)
        optimizer.grad_scale = excess.to(torch.float32)  # type: ignore[attr-defined]


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
