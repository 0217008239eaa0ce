"""Confidence intervals by resampling (Efron, 1979)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["median_interval"]


def median_interval(
    values: npt.NDArray[np.float64], level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Median and the percentile bootstrap interval around it.

    Args:
        values: the sample, shape [n], n at least 1.
        level: probability that the interval is meant to have, in (0, 1).
        resamples: how many samples of size n are drawn with replacement.
        seed: of the draws.

    Returns:
        Median, lower and upper end.
    """
    rng = np.random.default_rng(seed)
    drawn = rng.choice(values, (resamples, len(values)), replace=True)
    tail = 50.0 * (1.0 - level)
    low, high = np.percentile(np.median(drawn, axis=1), [tail, 100.0 - tail])
    return float(np.median(values)), float(low), float(high)
