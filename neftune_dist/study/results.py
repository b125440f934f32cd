"""What finished runs and their evaluations say, read from their folders; and whether runs can be
compared: they may differ in alpha and seed alone, and must have seen the same documents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from neftune_dist.checkpoint.run_files import run_config
from neftune_dist.config import Config, UserError, differences, read_json
from neftune_dist.evaluation.results import FORMS
from neftune_dist.study.grid import evaluation_folder
from neftune_dist.system.records import EVALUATIONS, STEPS, read_records

# What changes nothing that is trained, and what a study changes itself.
_FREE = (
    "run_dir",
    "data.cache_dir",
    "noise.alpha",
    "noise.seed",
    "train.hang_minutes",
    "train.seed",
)
_FREE_SECTIONS = ("logging.", "checkpoint.", "evaluate.", "judge.")
_NUMBERS = ("loss", "num_tokens", "num_supervised_tokens", "noise_norm", "noise_law")  # of a step
_SAME_LOSS = 1e-3  # relative, before training: other hardware, not other weights


@dataclass(frozen=True)
class Evaluation:
    """A folder that `neftune-dist evaluate` made: summary.json, items.json, answers.json."""

    summary: dict[str, Any]
    items: dict[str, Any]
    answers: list[dict[str, Any]]


@dataclass(frozen=True)
class Run:
    """A finished run's records. Losses are means over supervised tokens.

    Attributes:
        steps: the records of metrics.jsonl.
        held_out: step and loss, noise off, as training went on.
        evaluation: None without an evaluation of its last step.
    """

    alpha: float
    seed: int
    folder: Path
    config: Config
    steps: list[dict[str, Any]]
    held_out: list[tuple[int, float | None]]
    evaluation: Evaluation | None

    @property
    def first(self) -> float:
        """Held-out loss before training."""
        return _number(self.held_out[0][1])

    @property
    def last(self) -> float:
        """Held-out loss after training."""
        return _number(self.held_out[-1][1])

    @property
    def training(self) -> float:
        """Loss over the last tenth of the steps, noise on; skipped steps may have none."""
        tail = self.steps[-max(1, len(self.steps) // 10) :]
        losses = [step["loss"] for step in tail if step["loss"] is not None]
        return fmean(losses) if losses else math.nan

    def mean(self, key: str) -> float:
        """Mean of a record's key over the steps: `noise_norm`, `noise_law`."""
        return fmean(step[key] for step in self.steps)

    def part(self, name: str) -> dict[str, Any]:
        """A part of the evaluation's summary; empty where it was not evaluated."""
        return (self.evaluation.summary.get(name) or {}) if self.evaluation else {}

    @property
    def documents(self) -> list[tuple[int, int, int]]:
        """(step, tokens, supervised tokens) of each step; equal for equal documents."""
        return [(s["step"], s["num_tokens"], s["num_supervised_tokens"]) for s in self.steps]

    @property
    def name(self) -> str:
        """The name of its directory."""
        return self.folder.name


def alphas_of(runs: Sequence[Run]) -> list[float]:
    """Ascending; the first one is what the others are compared with."""
    return sorted({run.alpha for run in runs})


def seeds_of(runs: Sequence[Run]) -> list[int]:
    """Ascending."""
    return sorted({run.seed for run in runs})


def read_run(folder: Path, alpha: float, seed: int) -> Run:
    """A finished run, with its evaluation where there is one. Raises `UserError`."""
    steps = _rows(folder / STEPS, _NUMBERS)
    evaluations = _rows(folder / EVALUATIONS, ("held_out_loss",))
    held_out = {row["step"]: row["held_out_loss"] for row in evaluations}
    if not steps or not {0, steps[-1]["step"]} <= held_out.keys():
        raise UserError(f"{folder} lacks the held-out loss before or after its training.")
    last = steps[-1]["step"]
    run = Run(
        alpha=alpha,
        seed=seed,
        folder=folder,
        config=run_config(folder),
        steps=steps,
        held_out=sorted((step, loss) for step, loss in held_out.items() if step <= last),
        evaluation=_evaluation(evaluation_folder(folder, last)),
    )
    if math.isnan(run.first + run.last + run.training):
        raise UserError(f"{folder} has no finite loss before or after its training.")
    return run


def check_comparable(runs: Sequence[Run]) -> None:
    """Refuse runs that differ in more than alpha and seed. Raises `UserError` naming two of them.

    Documents and steps are compared among the runs of a seed; what was evaluated, among all."""
    for run in runs:
        first = next(other for other in runs if other.seed == run.seed)
        others = [
            key
            for key in differences(runs[0].config.to_dict(), run.config.to_dict())
            if key not in _FREE and not key.startswith(_FREE_SECTIONS)
        ]
        if others:
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            _refuse(runs[0], run, f"{others[0]}{more}")
        if run.documents != first.documents:
            _refuse(first, run, "their documents or steps")
        if abs(run.first - first.first) > _SAME_LOSS * abs(first.first):
            losses = f"{first.first:.4f} and {run.first:.4f}"
            _refuse(first, run, f"their held-out loss before training ({losses})")
    evaluated = [run for run in runs if run.evaluation]
    for what, of in _EVALUATED.items():
        # What is missing is left out of the report, which says so.
        having = [(run, its) for run in evaluated if (its := _of(run, of)) is not None]
        for run, its in having:
            if its != having[0][1]:
                _refuse(having[0][0], run, f"{what} that they were evaluated on")


def _refuse(one: Run, two: Run, what: str) -> None:
    raise UserError(
        f"Runs {one.name} and {two.name} differ in {what}, so they are not compared: "
        "set another run_dir."
    )


_EVALUATED: dict[str, Callable[[Evaluation], Any]] = {
    "the held-out documents": lambda e: [tokens for _, tokens in e.items["held_out"]],
    "the training documents": lambda e: [tokens for _, tokens in e.items["train"]],
    "the instructions": lambda e: [a["instruction"] for a in e.answers] or None,
    "the tasks": lambda e: {name: len(items) for name, items in e.items["tasks"].items()},
}


def _of(run: Run, what: Callable[[Evaluation], Any]) -> Any:
    """The value; None where the evaluation lacks it."""
    assert run.evaluation is not None
    try:
        return what(run.evaluation)
    except (KeyError, TypeError):  # no such part, or null
        return None


def _evaluation(folder: Path) -> Evaluation | None:
    if not (folder / "summary.json").exists():
        return None
    names = ["summary.json", "items.json"]
    if (folder / "answers.json").exists():
        names.append("answers.json")
    fix = "remove the folder, and the study's command evaluates that run again"
    summary, items, *answers = (read_json(folder / n, FORMS[n], fix=fix) for n in names)
    return Evaluation(summary, items, answers[0] if answers else [])


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _rows(path: Path, numbers: Sequence[str]) -> list[dict[str, Any]]:
    try:
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
