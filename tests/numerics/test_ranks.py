"""Rank choice: pure arithmetic, as properties."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_lowrank.numerics.factors import squared_singular_values
from onnx_lowrank.numerics.ranks import (
    break_even,
    energy_at,
    energy_rank,
    largest_rank,
    rounded,
)
from tests.helpers.models import known_rank

Squares = npt.NDArray[np.float64]

sizes = st.integers(1, 5000)
shares = st.floats(0.0, 2.0, exclude_min=True)
energies = st.floats(0.0, 1.0, exclude_min=True)
spectra = st.lists(st.floats(0.0, 1e12), min_size=1, max_size=30).map(
    lambda values: np.sort(np.array(values, np.float64))[::-1] ** 2
)
TINY = Fraction(1, 10**12)


def held(squares: Squares, rank: int) -> Fraction:
    """Share of the energy in the first ``rank``, without rounding."""
    exact = [Fraction(float(value)) for value in squares]
    return sum(exact[:rank], Fraction(0)) / sum(exact)


@given(spectra, energies)
def test_energy_is_met_and_by_no_smaller_rank(squares: Squares, energy: float) -> None:
    rank = energy_rank(squares, energy)
    assert 1 <= rank <= len(squares)
    if not squares.any():
        assert rank == 1
        return
    assert held(squares, rank) >= Fraction(energy) - TINY
    if rank > 1:
        assert held(squares, rank - 1) < Fraction(energy) + TINY


@given(spectra, energies, energies)
def test_more_energy_never_needs_a_smaller_rank(squares: Squares, a: float, b: float) -> None:
    assert energy_rank(squares, min(a, b)) <= energy_rank(squares, max(a, b))


@given(spectra)
def test_all_the_energy_is_in_all_nonzero_values(squares: Squares) -> None:
    assert energy_rank(squares, 1.0) == max(1, np.count_nonzero(squares))


@given(spectra, st.data())
def test_energy_at_is_the_share_that_is_held(squares: Squares, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, len(squares)))
    if not squares.any():
        assert energy_at(squares, rank) == 1.0
    else:
        assert energy_at(squares, rank) == pytest.approx(float(held(squares, rank)), abs=1e-12)


@pytest.mark.parametrize("r", [1, 3, 17, 32])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_full_energy_of_an_exactly_low_rank_weight_is_its_rank(r: int, dtype: type) -> None:
    weight = known_rank(48, 32, r, np.random.default_rng(r), dtype)
    assert energy_rank(squared_singular_values(weight[None]), 1.0) == r


@given(sizes, sizes, shares)
def test_largest_rank_is_within_the_share_and_the_next_is_not(m: int, n: int, share: float) -> None:
    rank = largest_rank(m, n, share)
    assert 0 <= rank <= min(m, n)
    budget = share * m * n
    assert rank * (m + n) <= budget * (1 + 1e-8) + 1e-8 * (m + n)
    if rank < min(m, n):
        assert (rank + 1) * (m + n) > budget


@given(sizes, sizes)
def test_break_even_is_where_the_parameters_are_equal(m: int, n: int) -> None:
    assert break_even(m, n) * (m + n) == pytest.approx(m * n)


@pytest.mark.parametrize(("m", "n"), [(0, 0), (0, 5), (5, 0)])
def test_an_empty_matrix_has_no_break_even(m: int, n: int) -> None:
    assert break_even(m, n) == 0.0
    assert largest_rank(m, n, 1.0) == 0


@pytest.mark.parametrize(
    ("m", "n", "share", "rank"),
    [
        (1000, 1000, 0.02, 10),  # 20,000 of 1,000,000
        (4096, 4096, 0.25, 512),  # 4,194,304 of 16,777,216
        (768, 768, 1.0, 384),
        (768, 3072, 1.0, 614),
        (768, 768, 0.9, 345),
        (100, 100, 0.9, 45),  # 0.9 · 50 is 45.00000000000001 or 44.99999999999999
        (10, 10, 0.6, 3),
        (1, 50, 1.0, 0),  # a single row has no smaller pair
        (50, 1, 1.0, 0),
        (1, 50, 2.0, 1),
        (64, 64, 2.0, 64),  # min gain -1: every layer at full rank
        (64, 64, 0.0, 0),
        (64, 64, -1.0, 0),
    ],
)
def test_largest_rank(m: int, n: int, share: float, rank: int) -> None:
    assert largest_rank(m, n, share) == rank


@given(sizes, sizes)
def test_twice_the_parameters_allow_full_rank(m: int, n: int) -> None:
    assert largest_rank(m, n, 2.0) == min(m, n)


@given(st.integers(1, 500), st.integers(1, 64), st.integers(0, 500), st.booleans())
def test_rounding_rules(rank: int, multiple: int, slack: int, up: bool) -> None:
    largest = rank + slack
    result = rounded(rank, multiple, largest, up=up)
    above = -(-rank // multiple) * multiple
    assert 1 <= result <= largest
    if up:
        assert result >= rank  # the energy is still held
        assert result == (above if above <= largest else rank)
    else:
        assert result <= rank  # the budget is not exceeded
        assert result % multiple == 0 or result == rank < multiple


@pytest.mark.parametrize(
    ("rank", "multiple", "largest", "up", "expected"),
    [
        (10, 8, 64, True, 16),
        (10, 8, 64, False, 8),
        (16, 8, 64, True, 16),
        (10, 8, 15, True, 10),
        (10, 8, 15, False, 8),
        (15, 8, 15, True, 15),
        (15, 8, 15, False, 8),
        (5, 8, 7, True, 5),
        (5, 8, 7, False, 5),
        (13, 1, 20, False, 13),
    ],
)
def test_rounded(rank: int, multiple: int, largest: int, up: bool, expected: int) -> None:
    assert rounded(rank, multiple, largest, up=up) == expected
