"""Student's distribution: 95 % intervals, p-values and power. (SciPy is not a dependency.)"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

LEVEL, POWER = 0.05, 0.8
_ANGLES = np.linspace(-np.pi / 2, np.pi / 2, 20_001)


def student(t: float, degrees: float) -> tuple[float, float]:
    """Student's 97.5 % quantile and the two-sided p-value of `t`."""
    points, below = _distribution(degrees)
    return quantile(1 - LEVEL / 2, degrees), float(2 * np.interp(-t, points, below))


def quantile(share: float, degrees: float) -> float:
    """The value below which this share of Student's distribution lies."""
    points, below = _distribution(degrees)
    return float(np.interp(share, below, points))


def smallest_visible(degrees: float) -> float:
    """The smallest true difference that 4 of 5 studies would see, in standard errors.

    t_0.975 + t_0.8, with the degrees of freedom of the standard error: then a 95 % interval
    excludes 0 with a probability of 80 % (the minimum detectable effect; Bloom, Evaluation Review
    19, 1995). It is for one comparison; Holm's correction asks for more.
    """
    return quantile(1 - LEVEL / 2, degrees) + quantile(POWER, degrees)


@lru_cache(maxsize=256)
def _distribution(degrees: float) -> tuple[np.ndarray, np.ndarray]:
    """Points, and the probability below each, integrated numerically.

    With t = sqrt(degrees) tan(angle), the angle's density is proportional to
    cos(angle) ** (degrees - 1): bounded, on a bounded interval.
    """
    degrees = min(degrees, 10_000.0)  # normal to 4 digits; the grid is still fine enough
    density = np.cos(_ANGLES) ** (degrees - 1)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return np.sqrt(degrees) * np.tan(_ANGLES), below / below[-1]
