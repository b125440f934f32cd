"""Slow ranks, for the tests to hit them where they mean to."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from neftune_dist.checkpoint import flat
from neftune_dist.model import load
from neftune_dist.training import inputs, train
from neftune_dist.training.held_out import HeldOut
from neftune_dist.training.loop import Diverged, Trainer

# Where each phase of a run happens.
PHASES: dict[str, tuple[Any, str]] = {
    "load": (load, "build"),
    "tokenise": (inputs, "prepare"),
    "fill": (train, "_fill"),
    "evaluate": (HeldOut, "evaluate"),
    "save": (flat, "write"),
}


def apply(faults: dict[str, Any]) -> None:
    """Do as told by the variable FAULTS, in this rank."""
    step = Trainer.train_step

    def slow(trainer: Trainer, *arguments: Any) -> Any:
        time.sleep(faults.get("step_seconds", 0))
        if trainer.progress.step + 1 == faults.get("fail_at"):
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
        if "fail_with_time" in faults:
            raise ValueError(f"now it is {time.time()}")
        return step(trainer, *arguments)

    Trainer.train_step = slow  # type: ignore[method-assign]
    if "phase" in faults and os.environ["RANK"] == "0":
        owner, name = PHASES[faults["phase"]]
        work, mark = getattr(owner, name), Path(faults["mark"])

        def marked(*arguments: Any, **options: Any) -> Any:
            if not mark.exists():
                mark.touch()
                time.sleep(faults["phase_seconds"])
            return work(*arguments, **options)

        setattr(owner, name, marked)
