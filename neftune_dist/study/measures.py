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
from neftune_dist.study.compare import HELD_OUT, TRAIN, Difference, corrected, difference, paired
from neftune_dist.study.grid import plain
from neftune_dist.study.results import Run, alphas_of, seeds_of

Judged = Mapping[tuple[float, int], Sequence[Judgement]]  # by alpha and seed, against the base

TASK, RAW, LENGTH_CONTROLLED = "task ", "win_rate", "win_rate_length_controlled"
LENGTH_MATCHED = "win_rate_length_matched"
LENGTH = "characters"


@dataclass(frozen=True)
class Measure:
    """A measure's label and number format.

    Attributes:
        label: in reports.
        better: 1 where more is better, -1 where less is, 0 where neither.
        group: losses | answers | abilities | judged.
        digits: after the decimal point.
        unit: appended to a difference.
        words: for less and for more.
        scale: from the stored value to the shown one.
    """

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

    def shown_range(self, low: float, high: float, sign: bool = True) -> str:
        """Format an interval without its unit."""
        return f"{self.shown(low, sign)} to {self.shown(high, sign)}"


_FIXED = {
    HELD_OUT: Measure("held-out loss", -1, "losses"),
    TRAIN: Measure("loss of training documents, noise off", 0, "losses"),
    LENGTH: Measure(
        "length of answers", 0, "answers", 1, " characters", words=("smaller", "greater")
    ),
    "repetition_2_percent": Measure("repetition of 2-grams", -1, "answers", 3, " points"),
    "log_diversity": Measure("log-diversity", 0, "answers", 3),
    "rouge_l": Measure("ROUGE-L", 1, "answers"),
    "bleu": Measure("BLEU", 1, "answers"),
    "cut": Measure("answers cut at the limit", -1, "answers", 2, " points", scale=100.0),
    "exact_match": Measure("exact match", 1, "answers", 2, " points", scale=100.0),
    RAW: Measure("win rate", 1, "judged", 2, " points", scale=100.0),
    LENGTH_CONTROLLED: Measure("win rate at equal lengths", 1, "judged", 2, " points"),
    LENGTH_MATCHED: Measure(
        "win rate over pairs of like lengths", 1, "judged", 2, " points", scale=100.0
    ),
}


def measure(name: str) -> Measure:
    """The measure of that name; tasks' names begin with `TASK`."""
    if name.startswith(TASK):
        label = f"accuracy on {name.removeprefix(TASK)}"
        return Measure(label, 1, "abilities", 2, " points", scale=100.0)
    return _FIXED[name]


def differences(runs: Sequence[Run], judged: Judged) -> list[Difference]:
    """Differences of every alpha from the least one in all measures that all runs have, with Holm's
    correction."""
    alphas, seeds, names = alphas_of(runs), seeds_of(runs), _names(runs)
    by_place = {(run.alpha, run.seed): run for run in runs}
    found: list[Difference | None] = []
    for alpha in alphas[1:]:
        ours, theirs = ([by_place[a, seed] for seed in seeds] for a in (alpha, alphas[0]))
        found += [_difference(name, alpha, ours, theirs) for name in names]
        judgements = [judged[alpha, seed] for seed in seeds if (alpha, seed) in judged]
        if len(judgements) == len(seeds):
            found += _won(alpha, judgements)
    return corrected([d for d in found if d is not None])


def untested(runs: Sequence[Run], found: Sequence[Difference]) -> list[str]:
    """Why measures that some runs have are not among the differences, a line each."""
    compared = {(d.measure, d.alpha) for d in found}
    lines = []
    for name in _names(runs):
        items = [_items(run, name) for run in runs]
        having = sum(item is not None and item.size > 0 for item in items)
        missing = [a for a in alphas_of(runs)[1:] if (name, a) not in compared]
        if having and missing:
            why = f"{having} of {len(runs)} runs have values"
            if having == len(runs):
                why = "at a seed, no item has a value in both runs"
            label = measure(name).label
            alphas = ", ".join(map(plain, missing))
            lines.append(f"{label[0].upper()}{label[1:]}, alpha {alphas}: {why}.")
    return lines


def _names(runs: Sequence[Run]) -> list[str]:
    """Measures of the evaluations, without those of the judge."""
    tasks = dict.fromkeys(TASK + task for run in runs for task in run.figures("tasks"))
    return [name for name in [*_FIXED, *tasks] if measure(name).group != "judged"]


def _difference(
    name: str, alpha: float, ours: Sequence[Run], theirs: Sequence[Run]
) -> Difference | None:
    items = [_items(run, name) for run in (*ours, *theirs)]
    if all(item is not None for item in items):
        num_answers = ours[0].num_samples if measure(name).group == "answers" else 1
        # Side, seed, value or weight, item, answer.
        stacked = np.array(items).reshape(2, len(ours), 2, -1, num_answers)
        (values, base), weights = measure(name).scale * stacked[:, :, 0], stacked[:, :, 1]
        return paired(name, alpha, values, base, weights.min(axis=0))
    if name != HELD_OUT:
        return None
    values, base = np.array([run.last for run in (*ours, *theirs)]).reshape(2, -1)
    return difference(name, alpha, values, base)


def _items(run: Run, name: str) -> np.ndarray | None:
    """Values and weights of a measure, (2, num_items); None where the run's evaluation has none."""
    rows: Sequence[float | bool | None]
    if name in (HELD_OUT, TRAIN):
        documents = np.array(run.items.get("held_out" if name == HELD_OUT else "train") or [])
        if not len(documents):
            return None
        sums, tokens = documents.T
        return np.array([sums / np.maximum(tokens, 1), tokens])
    if name.startswith(TASK):
        rows = run.items.get("tasks", {}).get(name.removeprefix(TASK), [])
    else:
        rows = run.items.get("answers", {}).get(name, [])
    values = np.array(rows, dtype=float)  # None: NaN
    known = ~np.isnan(values)
    return np.array([values, known]) if known.any() else None


def _won(alpha: float, judgements: Sequence[Sequence[Judgement]]) -> list[Difference | None]:
    """Win rates against the base, less one half: raw, at equal lengths, and over pairs of like
    lengths."""
    scale = measure(RAW).scale
    shape = len(judgements), -1, 1 + max(j.sample for j in judgements[0])  # seed, item, answer
    preferences = np.array([j.preference for of in judgements for j in of], float).reshape(shape)
    matched = np.array([j.is_length_matched for of in judgements for j in of]).reshape(shape)
    half, known = np.full_like(preferences, scale / 2), ~np.isnan(preferences)
    raw, like = (
        paired(name, alpha, scale * (preferences - 1), half, weights.astype(float))
        for name, weights in ((RAW, known), (LENGTH_MATCHED, known & matched))
    )
    controlled = np.array([win_rate(of)["length_controlled"] for of in judgements], dtype=float)
    if np.isnan(controlled).any():
        return [raw]
    # The same instructions are judged at all seeds: their errors are correlated.
    influences = np.mean([length_controlled_influences(of) for of in judgements], axis=0)
    influences = influences[known.any(axis=(0, 2))]
    halves = half[:, 0, 0]
    return [raw, difference(LENGTH_CONTROLLED, alpha, controlled, halves, influences), like]
