from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax

from onnx_lowrank.numerics.divergence import are_shares, divergences, surprises


@given(st.integers(1, 40), st.integers(2, 30), st.integers(0, 99), st.floats(0.01, 80.0))
def test_against_the_plain_formula(rows: int, classes: int, seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    a, b = scale * rng.standard_normal((2, rows, classes))
    p, q = log_softmax(a, axis=-1), log_softmax(b, axis=-1)
    expected = (np.exp(p) * (p - q)).sum(axis=-1)
    np.testing.assert_allclose(divergences(a, b), expected, rtol=1e-9, atol=1e-9)
    right = rng.integers(0, classes, rows)
    np.testing.assert_allclose(surprises(a, right), -p[np.arange(rows), right], atol=1e-9)
    assert np.all(divergences(a, a) == 0.0)


@pytest.mark.parametrize("apart", [1e-3, 0.1, 3.0, 60.0])
def test_float32_loses_next_to_nothing(apart: float) -> None:
    rng = np.random.default_rng(1)
    a = 4.0 * rng.standard_normal((3, 9000)).astype(np.float32)
    b = (a + apart * rng.standard_normal(a.shape) + 7.0).astype(np.float32)
    exact = divergences(a.astype(np.float64), b.astype(np.float64))
    np.testing.assert_allclose(divergences(a, b), exact, rtol=2e-4)
    assert np.all(divergences(a, a) == 0.0)


def test_float32_that_overflows_is_done_in_float64() -> None:
    a = np.array([[0.0, 1.0], [3.0, 300.0]], np.float32)
    b = np.array([[0.0, 200.0], [400.0, 3.0]], np.float32)
    exact = divergences(a.astype(np.float64), b.astype(np.float64))
    np.testing.assert_allclose(divergences(a, b), exact)


def test_blocks_of_rows_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 11, 7)).astype(np.float16)
    whole = divergences(a, b), surprises(a, np.arange(11) % 7), are_shares(a)
    monkeypatch.setattr("onnx_lowrank.numerics.divergence.BLOCK", 20)
    parts = divergences(a, b), surprises(a, np.arange(11) % 7), are_shares(a)
    for one, other in zip(whole[:2], parts[:2], strict=True):
        assert np.array_equal(one, other)
    assert whole[2] == parts[2] is False


def test_ruled_out_classes() -> None:
    """-inf in logits is a share of 0: alike in both it is nothing, in the second alone infinite."""
    a = np.array([[1.0, 2.0, -np.inf]])
    b = np.array([[2.0, 1.0, -np.inf]])
    assert math.isfinite(divergences(a, b)[0])
    assert divergences(np.array([[0.0, 0.0, 0.0]]), b)[0] == math.inf
    assert surprises(b, np.array([2]))[0] == math.inf


def test_nan() -> None:
    a, bad = np.array([[1.0, 2.0]]), np.array([[np.nan, 2.0]])
    assert divergences(a, bad)[0] == divergences(bad, a)[0] == math.inf
    assert divergences(bad, bad)[0] == 0.0
    assert surprises(bad, np.array([1]))[0] == math.inf


def test_shares() -> None:
    logits = np.random.default_rng(0).standard_normal((2, 5, 4))
    p, q = np.exp(log_softmax(logits, axis=-1))
    assert are_shares(p)
    assert are_shares(p.astype(np.float16))
    assert not are_shares(logits[0])
    assert not are_shares(np.full((1, 4), np.nan))
    np.testing.assert_allclose(divergences(p, q, shares=True), divergences(*logits), atol=1e-9)
    zero = np.array([[1.0, 0.0]])
    assert divergences(zero, zero, shares=True)[0] == 0.0
