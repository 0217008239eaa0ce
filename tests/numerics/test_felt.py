"""What errors do to the outputs of a model, against sums over rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.components import Components
from onnx_lowrank.numerics.felt import felt_error, felt_tails
from onnx_lowrank.numerics.fisher import PLAIN, Fisher
from onnx_lowrank.numerics.joint import joint_pair, joint_tails
from onnx_lowrank.numerics.moments import Moments

SEEDS = st.integers(0, 2**32 - 1)


def moments_of(rows: Array) -> Moments:
    return Moments(rows.T @ rows / len(rows), rows.mean(axis=0), len(rows))


def felt_by(felt: Array) -> Fisher:
    """Coordinates with ``G = F Fᵀ``."""
    return Fisher(np.asarray(np.linalg.cholesky(felt @ felt.T), np.float64))


def rows_of(rng: np.random.Generator, count: int, m: int) -> Array:
    return np.asarray((rng.standard_normal((count, m)) * np.logspace(0, -1, m)) + 0.2)


def test_of_any_error_it_is_the_mean_square_of_what_is_felt() -> None:
    rng = np.random.default_rng(3)
    rows, error, felt = rows_of(rng, 500, 6), rng.standard_normal((6, 4)), rng.normal(size=(4, 9))
    expected = np.square(rows @ error @ felt).sum(axis=1).mean()
    found = felt_error(error, moments_of(rows), felt_by(felt).turned)
    assert found == pytest.approx(float(expected))
    plain = np.square(rows @ error).sum(axis=1).mean()
    assert felt_error(error, moments_of(rows)) == pytest.approx(float(plain))


@given(seed=SEEDS, m=st.integers(1, 9), n=st.integers(1, 9), weighed=st.booleans())
def test_the_tails_of_all_ranks_are_the_errors_of_their_pairs(
    seed: int, m: int, n: int, weighed: bool
) -> None:
    rng = np.random.default_rng(seed)
    matrix, fitted = rng.standard_normal((m, n)), moments_of(rows_of(rng, 200, m))
    unseen = moments_of(rows_of(rng, 50, m))
    felt = rng.standard_normal((n, n + 2))
    weigh = (felt_by(felt) if weighed else PLAIN).turned
    basis = Components(matrix, fitted).basis(min(m, n))
    tails = felt_tails(matrix, basis.vectors, unseen, weigh)
    narrow = felt_tails(matrix, basis.narrow().vectors, unseen, weigh)
    assert tails.shape == (min(m, n) + 1,)
    assert (np.diff(tails) <= 0.0).all()
    expected = [felt_error(matrix, unseen, weigh)]
    for rank in range(1, min(m, n) + 1):
        first, second = basis.pair(matrix, rank, np.float64)
        expected.append(felt_error(matrix - first @ second, unseen, weigh))
    expected = np.minimum.accumulate(expected).tolist()
    np.testing.assert_allclose(tails, expected, atol=1e-10 * expected[0])
    # The rounding of the vectors to float32 hardly shows.
    np.testing.assert_allclose(narrow, tails, atol=1e-6 * expected[0])


@given(seed=SEEDS)
def test_maps_that_share_their_first_factor(seed: int) -> None:
    rng = np.random.default_rng(seed)
    fitted, unseen = moments_of(rows_of(rng, 100, 7)), moments_of(rows_of(rng, 40, 7))
    matrices = [rng.standard_normal((7, n)) for n in (3, 5)]
    scales = rng.uniform(0.5, 2.0, 2).tolist()
    weighs = []
    for matrix in matrices:
        felt = rng.standard_normal((matrix.shape[1], 8))
        weighs.append(felt_by(felt).turned)
    tails = joint_tails(matrices, scales, fitted, unseen, 5, weighs)
    for rank in range(1, 6):
        first, seconds = joint_pair(matrices, scales, fitted, rank, np.float64)
        together = sum(
            felt_error(matrix - first @ second, unseen, weigh)
            for matrix, second, weigh in zip(matrices, seconds, weighs, strict=True)
        )
        if rank == 1:
            assert tails[1] == pytest.approx(min(together, tails[0]), rel=1e-6)
        assert tails[rank] <= together * (1 + 1e-6) + 1e-9 * tails[0]
