"""Student's distribution, for 95 % intervals and p-values. (SciPy is not a dependency.)"""

from __future__ import annotations

import numpy as np

LEVEL = 0.05
_ANGLES = np.linspace(-np.pi / 2, np.pi / 2, 20_001)


def student(t: float, degrees: float) -> tuple[float, float]:
    """Student's 97.5 % quantile and the two-sided p-value of `t`, integrated numerically.

    With t = sqrt(degrees) tan(angle), the angle's density is proportional to
    cos(angle) ** (degrees - 1): bounded, on a bounded interval.
    """
    degrees = min(degrees, 10_000.0)  # normal to 4 digits; the grid is still fine enough
    density = np.cos(_ANGLES) ** (degrees - 1)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    below /= below[-1]
    points = np.sqrt(degrees) * np.tan(_ANGLES)
    quantile = float(np.interp(1 - LEVEL / 2, below, points))
    return quantile, float(2 * np.interp(-t, points, below))
