"""Units: which are left out first, what that loses, and what makes up for them."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.units import Units


def rows_of(seed: int, m: int, count: int) -> Array:
    rng = np.random.default_rng(seed)
    return np.asarray(rng.normal(size=(count, m)) @ rng.normal(size=(m, m)) / np.sqrt(m))


def test_the_loss_is_that_of_the_pair() -> None:
    rng = np.random.default_rng(0)
    h, w = rows_of(1, 12, 400), rng.normal(size=(12, 5))
    second = h.T @ h / len(h)
    units = Units.of(w, second)
    assert sorted(units.order) == list(range(12))
    for kept in range(13):
        first, rest = units.pair(w, second, kept)
        off = np.square(h @ w - h @ first @ rest).sum() / len(h)
        assert units.lost[kept] == pytest.approx(off, rel=2e-3, abs=2e-3)
    assert (np.diff(units.lost) <= 0.0).all()


def test_a_step_of_many_units_keeps_count() -> None:
    rng = np.random.default_rng(0)
    h, w = rows_of(2, 300, 3000), rng.normal(size=(300, 7))
    second = h.T @ h / len(h)
    units = Units.of(w, second)
    for kept in (299, 250, 120, 3):
        first, rest = units.pair(w, second, kept)
        off = np.square(h @ w - h @ first @ rest).sum() / len(h)
        assert units.lost[kept] == pytest.approx(off, rel=0.05, abs=1e-4 * units.lost[0])


def test_copies_and_units_that_are_always_zero_cost_nothing() -> None:
    rng = np.random.default_rng(3)
    h = rng.normal(size=(500, 10))
    h[:, 7] = h[:, 2] * 3.0
    h[:, 4] = 0.0
    w = rng.normal(size=(10, 6))
    second = h.T @ h / len(h)
    units = Units.of(w, second)
    assert units.lost[8] < 1e-3 * units.lost[0]
    assert 4 in units.order[8:]
    first, rest = units.pair(w, second, 8)
    assert np.abs(h @ w - h @ first @ rest).max() < 1e-2


def test_energies_add_up() -> None:
    rng = np.random.default_rng(0)
    h, w = rows_of(1, 9, 100), rng.normal(size=(9, 4))
    second = h.T @ h / len(h)
    squares = Units.of(w, second).squares(0.5)
    assert squares.sum() == pytest.approx(np.square(h @ w).sum() / len(h) + 0.5)
    assert (squares >= 0.0).all()
