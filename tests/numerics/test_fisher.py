"""Coordinates of outputs, and rows that stand for more of them."""

from __future__ import annotations

import numpy as np

from onnx_lowrank.numerics.fisher import folded


def test_folded_rows_have_the_same_second_moments_in_the_mean() -> None:
    rng = np.random.default_rng(5)
    rows = (rng.normal(size=(50, 4)) @ rng.normal(size=(4, 6))).astype(np.float32)
    rows[::7] *= 10.0  # a few rows hold most
    wanted = rows.T @ rows
    tries = [folded(rows, 8, np.random.default_rng(seed)) for seed in range(2000)]
    assert {(own.shape, own.dtype) for own in tries} == {((8, 6), np.dtype(np.float32))}
    found = np.mean([own.T @ own for own in tries], axis=0)
    assert np.linalg.norm(found - wanted) < 0.03 * np.linalg.norm(wanted)
    plainly = np.array([rows[start::8].sum(axis=0) for start in range(8)])
    assert np.linalg.norm(plainly.T @ plainly - wanted) > 0.1 * np.linalg.norm(wanted)


def test_no_more_rows_than_wanted_stay_as_they_are() -> None:
    rows = np.arange(12.0).reshape(4, 3)
    assert folded(rows, 4, np.random.default_rng(0)) is rows
    assert len(folded(rows, 3, np.random.default_rng(0))) == 3


def test_a_row_that_is_not_finite_shows_in_what_is_folded() -> None:
    rows = np.ones((9, 2))
    rows[4, 1], rows[7, 1] = np.inf, -np.inf
    with np.errstate(invalid="ignore"):
        assert not np.isfinite(folded(rows, 3, np.random.default_rng(0))).all()
