"""How a setting (the learning rate, the noise's alpha) changes over a run: warm-up, then a decay.

A value is a pure function of the step, so a resumed run needs no scheduler state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from neftune_dist.config import OptimConfig


@dataclass(frozen=True)
class Schedule:
    """A setting over the steps of a run.

    Warm-up is linear and reaches `peak` at step `warmup_steps - 1`. The decay starts from `peak` at
    step `warmup_steps` and would reach `peak * final_fraction` one step after the last.

    Attributes:
        peak: the greatest value.
        shape: "constant", "linear" or "cosine".
        warmup_steps: steps of warm-up; 0 for none.
        final_fraction: part of `peak` that the decay leaves; "constant" ignores it.
    """

    peak: float
    shape: str
    warmup_steps: int
    final_fraction: float

    def value(self, step: int, num_steps: int) -> float:
        """The setting at step 0 <= step < num_steps."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.shape == "constant":
            return self.peak
        done = (step - self.warmup_steps) / max(1, num_steps - self.warmup_steps)
        left = 0.5 * (1 + math.cos(math.pi * done)) if self.shape == "cosine" else 1 - done
        return self.peak * (self.final_fraction + (1 - self.final_fraction) * left)


def learning_rate(config: OptimConfig, step: int, num_steps: int) -> float:
    """The learning rate of step 0 <= step < num_steps."""
    schedule = Schedule(
        config.learning_rate, config.schedule, config.warmup_steps, config.final_fraction
    )
    return schedule.value(step, num_steps)
