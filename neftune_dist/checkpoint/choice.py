"""The checkpoint that `--step` or `--best` names, else the newest: for export, evaluate, chat."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from neftune_dist.checkpoint import store
from neftune_dist.config import UserError
from neftune_dist.system.checkpoint_names import step_of

# A checkpoint's step; None: the newest; "best": with the lowest held-out loss.
StepChoice = int | Literal["best"] | None


def choose(run_dir: Path, step: StepChoice) -> store.Checkpoint:
    """Return the complete checkpoint of that step; None: the newest; "best": of the lowest held-out
    loss.

    Raises:
        UserError: there is none, or a damaged one is newer: an older model must not pass for the
            newest.
    """
    about = ""
    if step == "best":
        step = _best_step(run_dir)
        about = (
            ", which has the lowest held-out loss (checkpoint.keep_best=true keeps it, in the run "
            "that made it)"
        )
    found = store.find_all(run_dir)
    broken = store.damaged_folders(run_dir)
    if not found:
        flaws = "".join(f"; {folder.name} is damaged: {flaw}" for folder, flaw in broken)
        raise UserError(f"{run_dir} holds no complete checkpoint{flaws}.")
    if step is None:
        for folder, flaw in reversed(broken):
            if (step_of(folder) or 0) > found[0].step:
                raise UserError(
                    f"The newest checkpoint {folder} is damaged: {flaw}. Choose the one before it "
                    f"with --step {found[0].step}, or let the same train command go on from it."
                )
        return found[0]
    for checkpoint in found:
        if checkpoint.step == step:
            return checkpoint
    steps = ", ".join(str(c.step) for c in found)
    raise UserError(f"{run_dir} has no complete checkpoint of step {step}{about}; it has: {steps}.")


def _best_step(run_dir: Path) -> int:
    """The step with the lowest held-out loss, as the newest checkpoint has it."""
    newest = choose(run_dir, None)
    best: int | None = newest.trainer_state()["progress"].get("best_step")
    if not best:  # none, or the run's start
        raise UserError(
            f"{run_dir} has no best checkpoint: up to step {newest.step} no evaluation was better "
            "than the one before the first step (data.num_held_out, evaluate.every_steps)."
        )
    return best
