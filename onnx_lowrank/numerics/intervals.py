"""How certain a median or a share is, and what is kept of the values that a median is of."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

__all__ = ["MOST_KEPT", "kept_values", "median_interval", "share_interval"]

MOST_KEPT = 256
"""So many values are kept of a distribution."""


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


def share_interval(share: float, count: int, level: float = 0.95) -> tuple[float, float]:
    """The interval around a share that was counted, such as 15 of 16.

    The score interval (E. B. Wilson, "Probable inference, the law of succession, and statistical
    inference", JASA 1927).  It takes what is counted for independent, so that of rows of one text
    it is too narrow.

    Args:
        share: what was counted over ``count``, in [0, 1].
        count: of how many, at least 1.
        level: probability that the interval holds the true share, in (0, 1).

    Returns:
        Lower and upper end, within [0, 1].
    """
    wide = NormalDist().inv_cdf(0.5 + level / 2.0) ** 2 / count
    middle = (share + wide / 2.0) / (1.0 + wide)
    half = math.sqrt(wide * (share * (1.0 - share) + wide / 4.0)) / (1.0 + wide)
    return max(0.0, middle - half), min(1.0, middle + half)


def kept_values(values: npt.NDArray[np.float64], most: int = MOST_KEPT) -> tuple[float, ...]:
    """The values, rising, to six digits; of more than ``most`` so many, evenly chosen.

    The smallest and the largest are always among them.

    Args:
        values: the sample, shape [n].
        most: how many to keep, at least 2.
    """
    ordered = np.sort(values)
    if len(ordered) > most:
        ordered = ordered[np.linspace(0, len(ordered) - 1, most).round().astype(int)]
    return tuple(float(f"{value:.6g}") for value in ordered)
