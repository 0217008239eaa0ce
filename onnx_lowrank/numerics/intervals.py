"""How certain a median is."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

__all__ = ["median_interval"]


def median_interval(
    values: npt.NDArray[np.float64], level: float = 0.95
) -> tuple[float, float, float]:
    """Median and the interval around it that two order statistics give, whatever the distribution.

    How many of n values are below the true median is binomial; its normal approximation says which
    two of the ordered values hold it (Conover, Practical Nonparametric Statistics, 3.2).

    Args:
        values: the sample, shape [n], n at least 1.
        level: probability that the interval holds the true median, in (0, 1).

    Returns:
        Median, lower and upper end; of few values the smallest and the largest.
    """
    ordered = np.sort(values)
    count = len(ordered)
    wide = NormalDist().inv_cdf(0.5 + level / 2.0) * math.sqrt(count)
    low = max(0, math.floor((count - wide) / 2.0))
    return float(np.median(ordered)), float(ordered[low]), float(ordered[count - 1 - low])
