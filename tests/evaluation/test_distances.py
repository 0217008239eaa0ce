"""Distances of arrays: blocks give what the whole gives, and whatever the scale is."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

from onnx_lowrank.evaluation import distances
from onnx_lowrank.evaluation.distances import apart, largest_of, squares


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_blocks_are_one_vector(
    scale: float, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distances, "BLOCK", 7)
    a, b = rng.standard_normal((2, 40))
    most, relative, cosine = apart(
        scale * a, scale * b, largest_of(scale * np.concatenate([a, b]), np.float64), np.float64
    )
    assert most == pytest.approx(scale * np.abs(a - b).max())
    assert relative == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a))
    assert cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert squares(a, b) == pytest.approx((a @ a, (a - b) @ (a - b)))


def test_the_largest_of_small_types() -> None:
    assert largest_of(np.array([-128, 5], np.int8), np.float64) == 128.0
    assert largest_of(np.array([-2.5, 1.0], ml_dtypes.bfloat16), np.float64) == 2.5
    assert largest_of(np.array([3 + 4j]), np.complex128) == 5.0
    assert largest_of(np.zeros(0), np.float64) == 0.0


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_has_no_largest(odd: float) -> None:
    assert largest_of(np.array([1.0, odd, 2.0]), np.float64) == math.inf
