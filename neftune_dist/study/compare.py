"""Paired differences and how sure they are: bootstrap over seeds and items, Holm's correction.

A measure is taken of runs of two alphas, at the same seeds and of the same items (documents,
instructions, task items): a crossed design. What varies from seed to seed and what varies from item
to item are two errors, of which each has a bootstrap of its own, with one draw less than there are
seeds or items, which makes its variance unbiased (Rao and Wu, JASA 1988). The two variances are
added, which counts twice what belongs to neither alone: the interval errs on the wide side
(Cameron, Gelbach and Miller, JBES 2011). It is Student's, with Satterthwaite's degrees of freedom:
the bare percentiles of 3 seeds, which can go no further than the least and the greatest of them,
would hold the truth in three of four studies and not in 95 %.

Fewer than 3 seeds have no spread that could be trusted: then the seeds are taken as they are, the
interval is over items alone, and `Difference.over` says so. Every call draws the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

FEWEST_SEEDS = 3  # below, an interval over seeds means nothing
FEWEST_ITEMS = 8  # likewise over items
LEVEL = 0.05
_RESAMPLES = 2000  # a standard error to within 2 %
_CHUNK_COUNTS = 2_000_000  # drawn at once: 16 MB
_ANGLES = np.linspace(-np.pi / 2, np.pi / 2, 20_001)


@dataclass(frozen=True)
class Difference:
    """Of one measure, between one alpha and the base, or of a win rate from one half.

    Attributes:
        base, value: means over the seeds, at the base and at `alpha`.
        by_seed: of the paired difference.
        low, high: 95 % interval of the mean difference; None where nothing can be said.
        p: two-sided, of no difference; `p_holm`: after correction for all that were compared.
        over: what the interval covers: "seeds and items", "seeds", "items", or "" without one.
        num_items: that the measure is taken of; 0 where it is of a whole run.
    """

    measure: str
    alpha: float
    base: float
    value: float
    by_seed: tuple[float, ...]
    low: float | None
    high: float | None
    p: float | None
    over: str
    num_items: int
    p_holm: float | None = None

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return float(np.mean(self.by_seed))

    @property
    def excludes_0(self) -> bool:
        """Whether the interval does; False without one."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high

    @property
    def stands(self) -> bool:
        """Whether the interval excludes 0, and Holm's correction does not take that back."""
        return self.excludes_0 and self.p_holm is not None and self.p_holm < LEVEL


def paired(
    measure: str,
    alpha: float,
    values: np.ndarray,
    base: np.ndarray,
    weights: np.ndarray,
) -> Difference | None:
    """The difference of a measure that is a weighted mean over items, such as tokens' losses.

    Args:
        values, base: (num_seeds, num_items), means over an item's own weight.
        weights: the same shape, of both: supervised tokens of a document, 1 of an answer, 0 where
            either run has no value, which may then be NaN.

    Returns:
        None where a seed has no item with a value.
    """
    known = weights > 0
    if not known.any(axis=1).all():
        return None
    values, base = np.where(known, values, 0.0), np.where(known, base, 0.0)
    weights = weights.astype(np.float64)
    by_seed = _means(values - base, weights)
    errors = item_errors(values - base, weights)
    return concluded(
        measure,
        alpha,
        base=float(_means(base, weights).mean()),
        value=float(_means(values, weights).mean()),
        by_seed=by_seed,
        item_variance=errors,
        num_items=int(known.any(axis=0).sum()),
    )


def concluded(
    measure: str,
    alpha: float,
    *,
    base: float,
    value: float,
    by_seed: np.ndarray,
    item_variance: float | None,
    num_items: int,
) -> Difference:
    """The difference with its interval, from its values (num_seeds,) and the variance of their mean
    from item to item; None where that is not known."""
    seed_variance = _seed_variance(by_seed) if len(by_seed) >= FEWEST_SEEDS else None
    sources = [
        (name, variance, number - 1)
        for name, variance, number in (
            ("seeds", seed_variance, len(by_seed)),
            ("items", item_variance, num_items),
        )
        if variance is not None
    ]
    low = high = p = None
    if sources:
        mean = float(by_seed.mean())
        variance = sum(each for _, each, _ in sources)
        if variance:
            df = variance**2 / sum(each**2 / number for _, each, number in sources)
            reach, p = _student(abs(mean) / variance**0.5, df)
            low, high = mean - reach * variance**0.5, mean + reach * variance**0.5
        else:  # the same difference everywhere
            low, high, p = mean, mean, float(mean == 0)
    over = " and ".join(name for name, _, _ in sources)
    shown = tuple(float(each) for each in by_seed)
    return Difference(measure, alpha, base, value, shown, low, high, p, over, num_items)


def item_errors(differences: np.ndarray, weights: np.ndarray) -> float | None:
    """Variance from item to item of the mean over seeds, the items drawn together for all seeds:
    (num_seeds, num_items) in. None for too few items."""
    num_items = differences.shape[1]
    if (weights > 0).any(axis=0).sum() < FEWEST_ITEMS:
        return None
    draw = np.random.default_rng(0)
    means = []
    rows = max(1, _CHUNK_COUNTS // num_items)
    for first in range(0, _RESAMPLES, rows):
        num = min(rows, _RESAMPLES - first)
        chosen = draw.integers(0, num_items, (num, num_items - 1))
        chosen += num_items * np.arange(num)[:, None]
        counts = np.bincount(chosen.ravel(), minlength=num * num_items).reshape(num, num_items)
        total = counts @ weights.T
        with np.errstate(invalid="ignore", divide="ignore"):
            means.append(((counts @ (differences * weights).T) / total).mean(axis=1))
    # A draw may hold no item of which a seed has a value.
    return float(np.nanvar(np.concatenate(means)))


def corrected(differences: Sequence[Difference]) -> list[Difference]:
    """All of them with Holm's p-values, one family (Holm, Scandinavian J. of Statistics 1979)."""
    known = [i for i, each in enumerate(differences) if each.p is not None]
    known.sort(key=lambda i: differences[i].p or 0.0)
    result, greatest = list(differences), 0.0
    for rank, i in enumerate(known):
        greatest = max(greatest, min(1.0, (len(known) - rank) * (differences[i].p or 0.0)))
        result[i] = replace(differences[i], p_holm=greatest)
    return result


def _means(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Of each seed."""
    result: np.ndarray = (values * weights).sum(axis=1) / weights.sum(axis=1)
    return result


def _seed_variance(by_seed: np.ndarray) -> float:
    """Of the mean over seeds."""
    draw = np.random.default_rng(0)
    chosen = draw.integers(0, len(by_seed), (10 * _RESAMPLES, len(by_seed) - 1))
    return float(by_seed[chosen].mean(axis=1).var())


def _student(t: float, df: float) -> tuple[float, float]:
    """97.5 % point of Student's distribution, and the two-sided p-value of `t`.

    With t = sqrt(df) tan(angle), the density of the angle is cos(angle) ** (df - 1).
    """
    df = min(df, 10_000.0)  # there it is the normal one, and the grid still fine enough
    density = np.cos(_ANGLES) ** (df - 1)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    below /= below[-1]
    points = np.sqrt(df) * np.tan(_ANGLES)
    return (
        float(np.interp(1 - LEVEL / 2, below, points)),
        float(2 * np.interp(-t, points, below)),
    )
