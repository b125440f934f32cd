"""A run's directory and its checkpoints as far as names and settings tell, without torch:
RUN_DIR/checkpoints/step_00000020."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from neftune_dist.config import OptimConfig
from neftune_dist.system.records import EVALUATIONS, SAMPLES, STEPS

RUN_CONFIG, MODEL_FOLDER = "config.yaml", "model"
MANIFEST = "manifest.json"  # in a checkpoint, written last
_STEP = re.compile(r"step_(\d{8,})")


def run_claim(run_dir: Path) -> tuple[Path, tuple[str, ...], str, str]:
    """The arguments of `storage.claim` and `check_claim` for a run's directory: what a run replaces
    in it, and its mark."""
    # Checkpoints, too, show that a directory is a run's: of an earlier version, or copied.
    replaced = (RUN_CONFIG, MODEL_FOLDER, STEPS, EVALUATIONS, SAMPLES)
    names = () if newest_step(run_dir) else replaced
    return run_dir, names, "neftune_run.json", f"run_dir={run_dir}"


def step_of(folder: Path) -> int | None:
    """The step in the name of a published checkpoint; None for any other name."""
    match = _STEP.fullmatch(folder.name)
    return int(match[1]) if match else None


def bytes_per_parameter(optim: OptimConfig) -> int:
    """What a checkpoint holds of each trained parameter: it and two moments, in float32 unless the
    moments are in bf16."""
    return 8 if optim.states == "bf16" else 12


def newest_step(run_dir: Path) -> int:
    """The step of the newest published checkpoint, unread; 0 where there is none."""
    steps = [0]
    with suppress(OSError):
        for folder in (run_dir / "checkpoints").iterdir():
            step = step_of(folder)
            if step is not None and (folder / MANIFEST).is_file():
                steps.append(step)
    return max(steps)
