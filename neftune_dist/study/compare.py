"""Paired differences with 95 % intervals and p-values: closed-form variances, Holm's correction.

Runs of two alphas share seeds and items (documents, instructions, task items): a crossed design
with two sources of error.

    seeds   s^2 / n of the differences by seed
    items   n / (n - 1) times the sum of squared influences on the weighted mean: its linearisation
            (Taylor's; Cochran, Sampling Techniques, chapter 6), s^2 / n where weights are equal

The variances are added, which counts twice the error that belongs to neither alone: the interval is
on the wide side (Cameron, Gelbach and Miller, JBES 2011). It is Student's, with n - 1 degrees of
freedom, or Satterthwaite's for the sum.

Under 3 seeds their spread cannot be estimated. The interval is then over items alone, holds for
these very runs, and `Difference.over` says so.

Where an item has several answers, its figure is their mean, and the variance over items has two
parts (the law of total variance; Wang, arXiv 2512.21326): prediction noise, by which answers of one
model to one item differ, which falls with the number of answers; and item noise, which does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from neftune_dist.evaluation.intervals import LEVEL, smallest_visible, student
from neftune_dist.system.text import count_text

FEWEST_SEEDS = 3  # for an interval over seeds
FEWEST_ITEMS = 8  # for an interval over items
HELD_OUT, TRAIN = "held_out_loss", "train_loss"
_NO_ITEMS = np.empty(0)


@dataclass(frozen=True)
class Difference:
    """Difference of a measure between an alpha and the base; of a win rate, from one half.

    Attributes:
        measure: a name that `measures.measure` knows.
        alpha: compared with the base, the least alpha of the study.
        base: mean over the seeds at the base.
        value: mean over the seeds at `alpha`.
        by_seed: the paired difference at each seed.
        low: lower end of the 95 % interval of the mean difference; NaN without an interval.
        high: its upper end.
        p: two-sided p-value of no difference; NaN without an interval.
        over: what the interval covers: "seeds and items", "seeds", "items", or "" without one.
        num_items: how many different items were compared; 0 for a value of the whole run.
        error: standard error of the mean difference; NaN without an interval.
        visible: the smallest true difference that 4 of 5 such studies would see.
        item_error: the part of `error` that is item noise; NaN with one answer to an item.
        prediction_error: the part that is prediction noise; NaN with one answer to an item.
        p_holm: `p` corrected for the number of comparisons.
    """

    measure: str
    alpha: float
    base: float
    value: float
    by_seed: tuple[float, ...]
    low: float
    high: float
    p: float
    over: str
    num_items: int
    error: float = math.nan
    visible: float = math.nan
    item_error: float = math.nan
    prediction_error: float = math.nan
    p_holm: float = math.nan

    @property
    def mean(self) -> float:
        """Mean difference over the seeds."""
        return float(np.mean(self.by_seed))

    @property
    def excludes_0(self) -> bool:
        """Whether there is an interval and it excludes 0."""
        return self.low > 0 or self.high < 0

    @property
    def why_untested(self) -> str:
        """The reason where there is no interval; empty with one."""
        if self.over:
            return ""
        if self.num_items:
            return f"{count_text(self.num_items, 'item')}, at least {FEWEST_ITEMS} needed"
        return f"{count_text(len(self.by_seed), 'seed')}, at least {FEWEST_SEEDS} needed"

    @property
    def is_significant(self) -> bool:
        """Whether the interval excludes 0 and Holm's p-value is below 0.05."""
        return self.excludes_0 and self.p_holm < LEVEL


def paired(
    measure: str, alpha: float, values: np.ndarray, base: np.ndarray, weights: np.ndarray
) -> Difference | None:
    """Compare a measure that is a weighted mean over items, such as token losses of documents.

    Args:
        measure: its name. Losses are continuous: documents with equal losses at every seed are
            copies of one, and count as one item.
        alpha: of `values`.
        values: (num_seeds, num_items), the mean over each item's own weight, or (num_seeds,
            num_items, num_answers).
        base: the same at the base.
        weights: the same shape: supervised tokens of a document, 1 for an answer, 0 where either
            run has no value; `values` and `base` may be NaN there.

    Returns:
        The difference; None where a seed has no item with a value.
    """
    values, base, weights = np.atleast_3d(values), np.atleast_3d(base), np.atleast_3d(weights)
    known = weights > 0
    if not known.any(axis=(1, 2)).all():
        return None
    differences = np.where(known, values - base, 0.0)  # of answers
    of_item = known / np.maximum(known.sum(axis=2, keepdims=True), 1)  # an answer's share
    values, base = ((np.where(known, side, 0.0) * of_item).sum(axis=2) for side in (values, base))
    weights = weights.max(axis=2)
    shares = weights / weights.sum(axis=1, keepdims=True)
    means, base_means = (values * shares).sum(axis=1), (base * shares).sum(axis=1)
    by_seed = means - base_means
    influences = (shares * (values - base - by_seed[:, None])).mean(axis=0)
    # The mean over seeds first: answers to an item have the same draws at all seeds.
    within = differences - (values - base)[:, :, None]
    deviations = (shares[:, :, None] * of_item * within).mean(axis=0)  # (num_items, num_answers)
    num_answers = deviations.shape[1]
    prediction = (
        num_answers / (num_answers - 1) * (deviations**2).sum() if num_answers > 1 else math.nan
    )
    is_known = known.any(axis=(0, 2))  # (num_items,)
    if measure in (HELD_OUT, TRAIN):
        columns = np.concatenate([values, base, weights])
        _, document = np.unique(columns, axis=1, return_inverse=True)
        influences = np.bincount(document.ravel(), influences)
        is_known = np.bincount(document.ravel(), is_known) > 0
    return difference(measure, alpha, means, base_means, influences[is_known], prediction)


def difference(
    measure: str,
    alpha: float,
    values: np.ndarray,
    base: np.ndarray,
    influences: np.ndarray = _NO_ITEMS,
    prediction: float = math.nan,
) -> Difference:
    """Put an interval around the mean difference over the seeds.

    Args:
        measure: its name.
        alpha: of `values`.
        values: (num_seeds,), the measure at each seed.
        base: the same at the base.
        influences: (num_items,), each item's share in the deviation of the mean; empty where the
            measure has no items.
        prediction: the part of the variance over items that is prediction noise.
    """
    by_seed, num_items = values - base, len(influences)
    sources = {}  # name: variance of the mean, degrees of freedom
    if len(by_seed) >= FEWEST_SEEDS:
        sources["seeds"] = by_seed.var(ddof=1) / len(by_seed), len(by_seed) - 1
    if num_items >= FEWEST_ITEMS:
        variance = num_items / (num_items - 1) * (influences**2).sum()
        sources["items"] = variance, num_items - 1
    low = high = p = error = visible = of_items = math.nan
    mean = float(by_seed.mean())
    variance = float(sum(of for of, _ in sources.values()))
    if variance:
        degrees = variance**2 / sum(of**2 / free for of, free in sources.values())
        error = math.sqrt(variance)
        factor, p = student(abs(mean) / error, degrees)
        low, high = mean - factor * error, mean + factor * error
        visible = smallest_visible(degrees) * error
    elif sources:  # the same difference everywhere
        low, high, p = mean, mean, float(mean == 0)
    if "items" in sources:
        of_items = math.sqrt(max(0.0, sources["items"][0] - prediction))
    return Difference(
        measure,
        alpha,
        base=float(base.mean()),
        value=float(values.mean()),
        by_seed=tuple(by_seed.tolist()),
        low=low,
        high=high,
        p=p,
        over=" and ".join(sources),
        num_items=num_items,
        error=error,
        visible=visible,
        item_error=math.nan if math.isnan(prediction) else of_items,
        prediction_error=math.sqrt(prediction),
    )


def corrected(differences: Sequence[Difference]) -> list[Difference]:
    """All differences, with Holm's p-values (Scandinavian Journal of Statistics 1979)."""
    known = sorted((d.p, i) for i, d in enumerate(differences) if not math.isnan(d.p))
    result, greatest = list(differences), 0.0
    for rank, (p, i) in enumerate(known):
        greatest = max(greatest, min(1.0, (len(known) - rank) * p))
        result[i] = replace(differences[i], p_holm=greatest)
    return result
