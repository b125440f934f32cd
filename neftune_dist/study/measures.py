"""The measures that are compared, item by item where there are items, and their differences.

Only some of an evaluation's statistics are compared, since every further comparison is another
chance of a false effect: of the lengths the characters, of the repetitions that of 2-grams. Tables
show the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from neftune_dist.evaluation.win_rate import Judgement, length_controlled_influences, win_rate
from neftune_dist.study.compare import (
    HELD_OUT,
    TRAIN,
    Difference,
    corrected,
    difference,
    paired,
)
from neftune_dist.study.results import Run, alphas_of, seeds_of

Judged = Mapping[tuple[float, int], Sequence[Judgement]]  # by alpha and seed, against the base
_ItemValues = tuple[np.ndarray, np.ndarray]  # (num_items,): values, weights

TASK, RAW, LENGTH_CONTROLLED = "task ", "win_rate", "win_rate_length_controlled"
LENGTH = "characters"


@dataclass(frozen=True)
class Measure:
    """A measure's label and number format.

    Attributes:
        name: in a `Difference`.
        label: in reports.
        better: 1 where more is better, -1 where less is, 0 where neither.
        group: losses | answers | abilities | judged.
        digits: after the decimal point.
        unit: appended to a difference.
        words: for less and for more.
        scale: from the stored value to the shown one.
    """

    name: str
    label: str
    better: int
    group: str
    digits: int = 4
    unit: str = ""
    words: tuple[str, str] = ("lower", "higher")
    scale: float = 1.0

    def shown(self, value: float, sign: bool = False) -> str:
        """Format a value without its unit; with a sign for a difference."""
        return f"{value:{'+' if sign else ''}.{self.digits}f}"


_FIXED = {
    m.name: m
    for m in (
        Measure(HELD_OUT, "held-out loss", -1, "losses"),
        Measure(TRAIN, "loss of training documents, noise off", 0, "losses"),
        Measure(
            LENGTH, "length of answers", 0, "answers", 1, " characters", ("smaller", "greater")
        ),
        Measure("repetition_2_percent", "repetition of 2-grams", -1, "answers", 3, " points"),
        Measure("log_diversity", "log-diversity", 0, "answers", 3),
        Measure("rouge_l", "ROUGE-L", 1, "answers"),
        Measure("bleu", "BLEU", 1, "answers"),
        Measure("cut", "answers cut at the limit", -1, "answers", 2, " points", scale=100.0),
        Measure("exact_match", "exact match", 1, "answers", 2, " points", scale=100.0),
        Measure(RAW, "win rate", 1, "judged", 2, " points", scale=100.0),
        Measure(LENGTH_CONTROLLED, "win rate at equal lengths", 1, "judged", 2, " points"),
    )
}


def measure(name: str) -> Measure:
    """The measure of that name; tasks' names begin with `TASK`."""
    if name.startswith(TASK):
        task = name.removeprefix(TASK)
        return Measure(name, f"accuracy on {task}", 1, "abilities", 2, " points", scale=100.0)
    return _FIXED[name]


def differences(runs: Sequence[Run], judged: Judged) -> list[Difference]:
    """Differences of every alpha from the least one in all measures that all runs have, with Holm's
    correction."""
    alphas, seeds = alphas_of(runs), seeds_of(runs)
    by_place = {(run.alpha, run.seed): run for run in runs}
    tasks = dict.fromkeys(task for run in runs for task in run.part("tasks"))
    found: list[Difference | None] = []
    for alpha in alphas[1:]:
        ours, theirs = ([by_place[a, seed] for seed in seeds] for a in (alpha, alphas[0]))
        for name in [*_FIXED, *(TASK + task for task in tasks)]:
            if measure(name).group != "judged":
                found.append(_difference(name, alpha, ours, theirs))
        judgements = [judged[alpha, seed] for seed in seeds if (alpha, seed) in judged]
        if len(judgements) == len(seeds):
            found += _won(alpha, judgements)
    return corrected([d for d in found if d is not None])


def _difference(
    name: str, alpha: float, ours: Sequence[Run], theirs: Sequence[Run]
) -> Difference | None:
    items = [[_items(run, name) for run in runs] for runs in (ours, theirs)]
    if any(item is None for of_runs in items for item in of_runs):
        if name != HELD_OUT:
            return None
        losses = np.array([[run.last for run in runs] for runs in (ours, theirs)])
        return difference(
            name,
            alpha,
            base=float(losses[1].mean()),
            value=float(losses[0].mean()),
            by_seed=losses[0] - losses[1],
            influences=None,
        )
    values, weights = (
        np.array([[item[part] for item in of_runs if item] for of_runs in items]) for part in (0, 1)
    )
    values = values * measure(name).scale
    return paired(name, alpha, values[0], values[1], np.minimum(weights[0], weights[1]))


def _items(run: Run, name: str) -> _ItemValues | None:
    """A run's values and weights of a measure; None where the evaluation has none."""
    if run.evaluation is None:
        return None
    items = run.evaluation.items
    rows: Sequence[float | bool | None]
    if name in (HELD_OUT, TRAIN):
        documents = np.array(items.get("held_out" if name == HELD_OUT else "train") or [])
        if not len(documents):
            return None
        return documents[:, 0] / np.maximum(documents[:, 1], 1), documents[:, 1]
    if name.startswith(TASK):
        rows = (items.get("tasks") or {}).get(name.removeprefix(TASK)) or []
    elif name == "exact_match":
        rows = [answer["correct"] for answer in run.evaluation.answers]
    else:
        rows = (items.get("answers") or {}).get(name) or []
    values = np.array([np.nan if row is None else float(row) for row in rows])
    known = ~np.isnan(values)
    return (values, known.astype(np.float64)) if known.any() else None


def _won(alpha: float, judgements: Sequence[Sequence[Judgement]]) -> list[Difference | None]:
    """Win rates against the base, less one half: raw, and at equal lengths."""
    scale = measure(RAW).scale
    preferences = np.array(
        [[np.nan if j.preference is None else j.preference - 1 for j in of] for of in judgements]
    )
    half = np.full_like(preferences, scale / 2)
    known = (~np.isnan(preferences)).astype(np.float64)
    raw = paired(RAW, alpha, scale * preferences, half, known)
    controlled = np.array([win_rate(of).length_controlled for of in judgements], dtype=np.float64)
    if np.isnan(controlled).any():
        return [raw]
    # The same instructions are judged at all seeds: their errors are correlated.
    influences = np.mean([length_controlled_influences(of) for of in judgements], axis=0)
    return [
        raw,
        difference(
            LENGTH_CONTROLLED,
            alpha,
            base=scale / 2,
            value=float(controlled.mean()),
            by_seed=controlled - scale / 2,
            influences=influences[known.any(axis=0)],
        ),
    ]
