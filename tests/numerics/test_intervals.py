"""Medians and what is kept of a distribution."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from onnx_lowrank.numerics.intervals import kept_values, median_interval, share_interval


def test_the_interval_holds_the_median() -> None:
    median, low, high = median_interval(np.array([5.0, 1.0, 3.0, 2.0, 4.0]))
    assert low <= median == 3.0 <= high


@pytest.mark.parametrize(("count", "of"), [(0, 1), (15, 16), (16, 16), (200, 256)])
def test_the_interval_of_a_share_is_that_of_scipy(count: int, of: int) -> None:
    expected = binomtest(count, of).proportion_ci(method="wilson")
    assert share_interval(count / of, of) == pytest.approx((expected.low, expected.high))


def test_values_are_kept_rising_with_both_ends() -> None:
    assert kept_values(np.array([3.0, 1.0, 2.0])) == (1.0, 2.0, 3.0)
    assert kept_values(np.zeros(0)) == ()
    many = np.random.default_rng(0).permutation(np.arange(1000.0))
    kept = kept_values(many, 11)
    assert len(kept) == 11
    assert (kept[0], kept[-1]) == (0.0, 999.0)
    assert abs(np.median(kept) - np.median(many)) < 10
