"""The optimizer and the learning rate.

The learning rate is a pure function of the step, so a resumed run needs no scheduler state. The
optimizer is torch's AdamW (Loshchilov and Hutter, arXiv 1711.05101), on whatever shards the engine
holds; its state is made at once, so that a fresh run and a resumed one look the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neftune_dist.config import OptimConfig, scheduled

STATE_NAMES = ("exp_avg", "exp_avg_sq")


def learning_rate(config: OptimConfig, step: int, num_steps: int) -> float:
    """The rate of step 0 <= step < num_steps."""
    return scheduled(
        config.learning_rate,
        config.schedule,
        config.warmup_steps,
        config.final_fraction,
        step,
        num_steps,
    )


@dataclass(frozen=True)
class MakeOptimizer:
    """Builds AdamW over an engine's shards. Weight decay falls on matrices only."""

    config: OptimConfig

    def __call__(
        self,
        parameters: Sequence[tuple[str, torch.nn.Parameter]],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> torch.optim.AdamW:
        """
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
        return torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=self.config.learning_rate,
            betas=(self.config.beta1, self.config.beta2),
            eps=self.config.epsilon,
            fused=True,
        )


def initialize_state(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> None:
    """Zero moments and step count, as torch makes them at its first step."""
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            **{name: torch.zeros_like(parameter) for name in STATE_NAMES},
        }


def set_updates(optimizer: torch.optim.Optimizer, num_updates: int) -> None:
    """Tell Adam's bias correction how many updates have been made."""
    for state in optimizer.state.values():
        state["step"].fill_(num_updates)


def skip_update_where(optimizer: torch.optim.Optimizer, unwanted: Tensor) -> None:
    """Whether the next update is to change nothing: no parameter, no moment, no count. A bool
    scalar on the parameters' device, so that the host need not wait for its value."""
    # Torch's fused optimizers look for it; it is what GradScaler sets.
    optimizer.found_inf = unwanted.float()  # type: ignore[attr-defined]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The rate of the next update, for every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate
