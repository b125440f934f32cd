"""Finished runs and their evaluations, read from their folders, and whether they can be compared:
they may differ in alpha and seed alone, and must have seen the same documents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from neftune_dist.checkpoint.run_files import run_config
from neftune_dist.config import Config, UserError, differences, read_json
from neftune_dist.config.errors import brief
from neftune_dist.evaluation.results import PARTS, read_results
from neftune_dist.study.grid import evaluation_folder
from neftune_dist.system.records import EVALUATIONS, STEPS, read_records

# Settings that change nothing that is trained, and those that a study changes itself.
_FREE = (
    *("run_dir", "data.cache_dir", "train.hang_minutes"),
    *("noise.alpha", "noise.seed", "train.seed"),
)
_FREE_SECTIONS = ("logging.", "checkpoint.", "evaluate.", "judge.")
_NUMBERS = ("loss", "num_tokens", "num_supervised_tokens", "noise_norm", "noise_law")  # of a step
_STATE = {"versions?": {str: str}, "device?": str, "identity?": dict, "world_size?": int}
_AGAIN = "remove the folder, and the study's command evaluates that run again"
_SAME_LOSS = 1e-3  # relative, before training: other hardware, not other weights


@dataclass(frozen=True)
class Run:
    """A finished run's records. Losses are means over supervised tokens.

    Attributes:
        alpha: of its noise.
        seed: `train.seed`.
        folder: its directory.
        config: its configuration.
        steps: the records of metrics.jsonl.
        held_out: (step, loss) with the noise off, as training went on; NaN where not finite.
        summary: summary.json of the evaluation at its last step; empty without one.
        items: its items.json.
        answers: its answers.json.
        settings: its settings.json.
        state: trainer_state.json of the last step's checkpoint; empty where it was removed.
    """

    alpha: float
    seed: int
    folder: Path
    config: Config
    steps: list[dict[str, Any]]
    held_out: list[tuple[int, float]]
    summary: dict[str, Any] = field(default_factory=dict)
    items: dict[str, Any] = field(default_factory=dict)
    answers: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)

    @property
    def first(self) -> float:
        """Held-out loss before training."""
        return self.held_out[0][1]

    @property
    def last(self) -> float:
        """Held-out loss after training."""
        return self.held_out[-1][1]

    @property
    def training(self) -> float:
        """Loss over the last tenth of the steps, noise on; skipped steps may have none."""
        return _mean("loss", self.steps[-max(1, len(self.steps) // 10) :])

    @property
    def num_samples(self) -> int:
        """Answers to each instruction."""
        return int(self.figures("answers").get("num_samples", 1))

    def mean(self, key: str) -> float:
        """Mean of a record's key over the steps: `noise_norm`, `noise_law`."""
        return _mean(key, self.steps)

    def figures(self, part: str) -> dict[str, float]:
        """Numbers of a part of the evaluation's summary; of a task its accuracy."""
        found = self.summary.get(part) or {}
        if part == "tasks":
            return {name: task["accuracy"] for name, task in found.items()}
        return {key: value for key, value in found.items() if isinstance(value, int | float)}

    @property
    def documents(self) -> list[tuple[int, int, int]]:
        """(step, tokens, supervised tokens) of each step; equal for equal documents."""
        return [(s["step"], s["num_tokens"], s["num_supervised_tokens"]) for s in self.steps]


def _mean(key: str, steps: Sequence[Mapping[str, Any]]) -> float:
    known = [step[key] for step in steps if step[key] is not None]
    return fmean(known) if known else math.nan


def alphas_of(runs: Sequence[Run]) -> list[float]:
    """Alphas of the runs, ascending; the others are compared with the first."""
    return sorted({run.alpha for run in runs})


def seeds_of(runs: Sequence[Run]) -> list[int]:
    """Seeds of the runs, ascending."""
    return sorted({run.seed for run in runs})


def read_run(folder: Path, alpha: float, seed: int) -> Run:
    """Read a finished run, with its evaluation where there is one. Raises `UserError`."""
    if not folder.exists():
        raise UserError(f"{folder} is missing: the study's command makes it without --report-only.")
    steps = _rows(folder / STEPS, _NUMBERS)
    evaluations = _rows(folder / EVALUATIONS, ("held_out_loss",))
    held_out = {row["step"]: row["held_out_loss"] for row in evaluations}
    if not steps or not {0, steps[-1]["step"]} <= held_out.keys():
        raise UserError(f"{folder} lacks the held-out loss before or after its training.")
    last = steps[-1]["step"]
    losses = [
        (step, math.nan if loss is None else loss)
        for step, loss in sorted(held_out.items())
        if step <= last
    ]
    place = evaluation_folder(folder, last)
    found = read_results(place, _AGAIN) if (place / "summary.json").exists() else {}
    state = folder / "checkpoints" / place.name / "trainer_state.json"
    if state.exists():
        found["state"] = read_json(state, _STATE)
    run = Run(alpha, seed, folder, run_config(folder), steps, losses, **found)
    if math.isnan(run.first + run.last + run.training):
        raise UserError(f"{folder} has no finite loss before or after its training.")
    return run


def check_comparable(runs: Sequence[Run]) -> None:
    """Refuse runs that differ in more than alpha and seed. Raises `UserError` naming two of them.

    Documents and steps are compared among the runs of a seed, the evaluated items among all."""
    for run in runs:
        first = next(other for other in runs if other.seed == run.seed)
        if others := _changed(runs[0].config, run.config):
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            _refuse(runs[0], run, f"{others[0]}{more}")
        if run.documents != first.documents:
            _refuse(first, run, "their documents or steps")
        if abs(run.first - first.first) > _SAME_LOSS * abs(first.first):
            losses = f"{first.first:.4f} and {run.first:.4f}"
            _refuse(first, run, f"their held-out loss before training ({losses})")
    for name, identity in _EVALUATED.items():
        # A missing part is left out of the report, which says so.
        having = [(run, found) for run in runs if (found := identity(run))]
        for run, found in having:
            if found != having[0][1]:
                _refuse(having[0][0], run, f"the {name} that they were evaluated on")


def check_as_asked(run: Run, asked: Config) -> None:
    """Refuse a run that was made with other settings than those asked for, which would have no
    effect on its report. Raises `UserError`."""
    made_with = {key: _value(run.config, key) for key in _changed(asked, run.config)}
    for part in filter(None, map(run.settings.get, PARTS)):  # as it was evaluated
        made_with |= {key: value for key, value in part.items() if key.startswith("evaluate.")}
    for key, made in made_with.items():
        wanted = _value(asked, key)
        if wanted not in ("auto", made):  # a run has what was decided
            raise UserError(
                f"{run.folder} was made with {key}={brief(made)}, not {brief(wanted)}: restore it, "
                "or set another run_dir."
            )


def _value(config: Config, key: str) -> Any:
    found: Any = config.to_dict()
    for name in key.split("."):
        found = (found or {}).get(name)
    return found


def _changed(one: Config, two: Config) -> list[str]:
    """Keys in which runs must not differ that are compared."""
    changed = differences(one.to_dict(), two.to_dict())
    return [key for key in changed if key not in _FREE and not key.startswith(_FREE_SECTIONS)]


def _refuse(one: Run, two: Run, difference: str) -> None:
    raise UserError(
        f"Runs {one.folder.name} and {two.folder.name} differ in {difference}, so they are not "
        "compared: set another run_dir."
    )


# What must be equal of an evaluation's items; empty where there are none.
_EVALUATED: dict[str, Callable[[Run], Any]] = {
    "held-out documents": lambda run: [n for _, n in run.items.get("held_out", ())],
    "training documents": lambda run: [n for _, n in run.items.get("train", ())],
    "instructions": lambda run: [answer["instruction"] for answer in run.answers],
    "tasks": lambda run: {name: len(items) for name, items in run.items.get("tasks", {}).items()},
}


def _rows(path: Path, numbers: Sequence[str]) -> list[dict[str, Any]]:
    try:
        path.stat()
        found = read_records(path, numbers)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    last = found.rows[-1]["step"] if found.rows else 0
    missing = found.num_missing(last) if path.name == STEPS else 0
    if lost := max(found.num_lost, missing):
        raise UserError(
            f"{path} is damaged: {lost} of its records are lost, without which runs cannot be "
            f"compared. Remove {path.parent}, and the study makes that run again."
        )
    return found.rows
