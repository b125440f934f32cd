"""Slow and failing ranks, so that a test can hit a run in the phase that it means."""

from __future__ import annotations

import os
import subprocess
import time
from typing import Any

from neftune_dist.checkpoint import flat
from neftune_dist.model import load
from neftune_dist.training import inputs, train
from neftune_dist.training.held_out import HeldOut
from neftune_dist.training.loop import Diverged, Trainer

MOST_SECONDS = 120.0
# Where each phase of a run happens.
PHASES: dict[str, tuple[Any, str]] = {
    "load": (load, "build"),
    "tokenise": (inputs, "prepare"),
    "fill": (train, "_fill"),
    "evaluate": (HeldOut, "evaluate"),
    "save": (flat, "write"),
}


def apply(faults: dict[str, Any]) -> None:
    """Make this rank behave as the variable FAULTS says."""
    step = Trainer.train_step

    def slow(trainer: Trainer, *arguments: Any) -> Any:
        time.sleep(faults.get("step_seconds", 0))
        if trainer.progress.step + 1 in faults.get("wait_at", ()):
            deadline = time.monotonic() + MOST_SECONDS
            while not trainer.stop_requested():
                assert time.monotonic() < deadline, "no signal came"
                time.sleep(0.1)
        fails = faults.get("fail_rank", trainer.world.rank) == trainer.world.rank
        if fails and trainer.progress.step + 1 == faults.get("fail_at"):
            raise ValueError(f"step {faults['fail_at']}")
        if trainer.progress.step + 1 == faults.get("nan_at"):
            forward = trainer.engine.forward
            trainer.engine.forward = lambda batch: forward(batch) * float("nan")  # type: ignore
            try:
                return step(trainer, *arguments)
            finally:
                trainer.engine.forward = forward  # type: ignore[method-assign]
        if faults.get("diverge"):
            raise Diverged("The loss is not finite.")
        return step(trainer, *arguments)

    Trainer.train_step = slow  # type: ignore[method-assign]
    attempt, phases = int(os.environ.get("SLURM_RESTART_COUNT") or 0), faults.get("signal_in", [])
    if os.environ["RANK"] == "0" and attempt < len(phases):
        signal_in(phases[attempt], faults["phase_seconds"])


def signal_in(phase: str, seconds: float) -> None:
    """Signal the batch script when the phase first begins, and begin it some seconds later."""
    owner, name = PHASES[phase]
    work = getattr(owner, name)

    def signalled(*arguments: Any, **options: Any) -> Any:
        setattr(owner, name, work)
        job = os.environ["SLURM_JOB_ID"]
        subprocess.run(["scancel", "--batch", "--signal=USR1", job], check=True)
        time.sleep(seconds)
        return work(*arguments, **options)

    setattr(owner, name, signalled)
