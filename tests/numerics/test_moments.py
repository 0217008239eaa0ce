from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st

from onnx_lowrank.numerics import moments as module
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.moments import Accumulator, Moments
from onnx_lowrank.numerics.output_pca import output_pair, output_squares
from onnx_lowrank.numerics.ranks import energy_at
from onnx_lowrank.numerics.stacks import achieved_error, fitted_pair, squares
from tests.helpers.models import known_rank

SEEDS = st.integers(0, 2**32 - 1)
SHAPES = st.tuples(st.integers(1, 24), st.integers(1, 24))
# Wide, tall and square maps.
SIDES = [(12, 20), (20, 12), (15, 15)]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)


def correlated(rng: np.random.Generator, rows: int, m: int, decay: float = 3.0) -> Array:
    """Rows whose covariance has eigenvalues from 1 to 10^-decay, with a mean."""
    basis = np.linalg.qr(rng.standard_normal((m, m)))[0]
    spread = np.logspace(0, -decay / 2, m)
    centred = rng.standard_normal((rows, m)) * spread
    return np.asarray((centred + 0.3 * rng.standard_normal(m)) @ basis)


def moments_of(rows: Array) -> Moments:
    exact = rows.astype(np.float64)
    return Moments(exact.T @ exact / len(rows), exact.mean(axis=0), len(rows))


def error_on(rows: Array, matrix: Array, approximation: Array) -> float:
    exact = rows.astype(np.float64) @ matrix.astype(np.float64)
    return float(np.linalg.norm(exact - rows @ approximation) / np.linalg.norm(exact))


# --- gathering


@given(seed=SEEDS, m=st.integers(1, 9), sizes=st.lists(st.integers(0, 11), min_size=1, max_size=6))
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_sums_in_blocks_are_those_of_all_rows(
    dtype: type, seed: int, m: int, sizes: list[int]
) -> None:
    rng = np.random.default_rng(seed)
    parts: list[Array] = [rng.standard_normal((size, m)).astype(dtype) for size in sizes]
    accumulator = Accumulator(m)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", 4)
        for part in parts:
            accumulator.add(part)
        found = accumulator.moments()
    if not sum(sizes):
        assert found is None
        return
    assert found is not None
    expected = moments_of(np.concatenate(parts))
    within = 1e-12 if dtype is np.float64 else 1e-5
    np.testing.assert_allclose(found.second, expected.second, rtol=within, atol=within)
    np.testing.assert_allclose(found.mean, expected.mean, rtol=within, atol=within)
    assert found.rows == sum(sizes)
    assert (found.second == found.second.T).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", [1e30, 1e-30])
@pytest.mark.filterwarnings("error")
def test_squares_beyond_float32(dtype: type, scale: float, rng: np.random.Generator) -> None:
    rows: Array = (rng.standard_normal((50, 4)) * scale).astype(dtype)
    accumulator = Accumulator(4)
    accumulator.add(rows)
    found = accumulator.moments()
    assert found is not None
    np.testing.assert_allclose(found.second, moments_of(rows).second, rtol=1e-6, atol=0)


@pytest.mark.filterwarnings("error")
def test_squares_beyond_float64_are_an_error() -> None:
    accumulator = Accumulator(2)
    accumulator.add(np.full((3, 2), 1e200))
    with pytest.raises(FloatingPointError, match="beyond float64"):
        accumulator.moments()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_what_is_not_finite_is_an_error_at_once(dtype: type, bad: float) -> None:
    with pytest.raises(FloatingPointError, match="NaN or Inf"):
        Accumulator(2).add(np.array([[1.0, bad]], dtype))


@given(indices=st.lists(st.integers(-5, 4), min_size=1, max_size=30), kind=st.sampled_from("iq"))
def test_one_hot_rows_by_their_indices(indices: list[int], kind: str) -> None:
    accumulator = Accumulator(5, diagonal=True)
    accumulator.add(np.array(indices[:3], kind))
    accumulator.add(np.array(indices[3:], kind))
    found = accumulator.moments()
    assert found is not None
    expected = moments_of(np.eye(5)[indices])
    assert found.diagonal
    np.testing.assert_allclose(found.full().second, expected.second)
    np.testing.assert_allclose(found.mean, expected.mean)
    np.testing.assert_allclose(
        found.about(found.mean).second, expected.about(expected.mean).second, atol=1e-15
    )
    matrix = np.arange(15.0).reshape(5, 3)
    np.testing.assert_allclose(found.applied(matrix), expected.applied(matrix))
    assert found.trace == pytest.approx(1.0)


@given(seed=SEEDS, sizes=st.lists(st.integers(0, 9), min_size=1, max_size=4))
def test_combined_moments_are_those_of_all_rows(seed: int, sizes: list[int]) -> None:
    rng = np.random.default_rng(seed)
    parts = [rng.standard_normal((size, 3)) for size in sizes]
    found = Moments.combined([moments_of(part) if len(part) else None for part in parts])
    if not sum(sizes):
        assert found is None
        return
    assert found is not None
    expected = moments_of(np.concatenate(parts))
    np.testing.assert_allclose(found.second, expected.second, atol=1e-14)
    np.testing.assert_allclose(found.mean, expected.mean, atol=1e-14)
    assert found.rows == expected.rows


def test_one_hot_and_other_rows_together(rng: np.random.Generator) -> None:
    hot, rows = np.array([0, 2, 2]), rng.standard_normal((5, 3))
    counts = Accumulator(3, diagonal=True)
    counts.add(hot)
    found = Moments.combined([counts.moments(), moments_of(rows)])
    assert found is not None
    expected = moments_of(np.concatenate([np.eye(3)[hot], rows]))
    np.testing.assert_allclose(found.second, expected.second)
    np.testing.assert_allclose(found.mean, expected.mean)


def test_centred_moments_are_the_covariance(rng: np.random.Generator) -> None:
    rows = correlated(rng, 200, 5)
    found = moments_of(rows)
    np.testing.assert_allclose(
        found.about(found.mean).second, np.cov(rows.T, bias=True), atol=1e-14
    )


def test_moments_about_any_centre(rng: np.random.Generator) -> None:
    rows, centre = correlated(rng, 200, 5), rng.normal(size=5)
    found, direct = moments_of(rows).about(centre), moments_of(rows - centre)
    np.testing.assert_allclose(found.second, direct.second, atol=1e-12)
    np.testing.assert_allclose(found.mean, direct.mean, atol=1e-12)
    assert found.rows == direct.rows


# --- shrinkage


def test_many_rows_are_not_shrunk(rng: np.random.Generator) -> None:
    found = moments_of(correlated(rng, 100_000, 6))
    assert found.shrunk() is found
    some = moments_of(correlated(rng, 59, 6))
    moved = np.linalg.norm(some.shrunk().second - some.second)
    assert 0 < moved < 0.1 * np.linalg.norm(some.second)


@given(seed=SEEDS, m=st.integers(2, 30), rows=st.integers(1, 29))
def test_few_rows_become_well_conditioned_and_keep_their_energy(
    seed: int, m: int, rows: int
) -> None:
    found = moments_of(np.random.default_rng(seed).standard_normal((rows, m)))
    shrunk = found.shrunk()
    assert shrunk.trace == pytest.approx(found.trace)
    values = np.linalg.eigvalsh(shrunk.second)
    if rows < m:
        assert values[0] > 0
        assert values[-1] / values[0] < 50 * m
    assert shrunk.rows == found.rows
    np.testing.assert_array_equal(shrunk.mean, found.mean)


@pytest.mark.parametrize("rows", [4, 20, 100])
def test_shrinking_comes_closer_to_the_truth(rows: int) -> None:
    # The truth is a multiple of I: what the estimator draws towards.
    off = np.array([0.0, 0.0])
    for seed in range(20):
        found = moments_of(np.random.default_rng(seed).standard_normal((rows, 20)))
        for index, one in enumerate((found, found.shrunk())):
            off[index] += np.linalg.norm(one.second - np.eye(20)) ** 2
    assert off[1] < 0.2 * off[0]


def test_nothing_to_shrink() -> None:
    for found in (Moments(np.ones((1, 1)), np.ones(1), 1), Moments(np.ones(4), np.ones(4), 1)):
        assert found.shrunk() is found
    zero = Moments(np.zeros((3, 3)), np.zeros(3), 5)
    assert not zero.shrunk().second.any()


# --- fitting


@given(seed=SEEDS, shape=SHAPES, diagonal=st.booleans())
def test_squares_are_the_energies_of_the_outputs(
    seed: int, shape: tuple[int, int], diagonal: bool
) -> None:
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal(shape)
    if diagonal:
        own = Moments(rng.random(shape[0]), np.zeros(shape[0]), 5)
        root = np.diag(np.sqrt(own.second))
    else:
        rows = correlated(rng, 40, shape[0])
        own, root = moments_of(rows), rows / np.sqrt(40)
    found = output_squares(matrix, own)
    values = np.linalg.svd(root @ matrix, compute_uv=False) ** 2
    expected = np.zeros(min(shape))
    expected[: len(values)] = values[: len(expected)]
    assert (np.diff(found) <= 0).all()
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-12 * expected[0])


@given(seed=SEEDS, shape=SHAPES, share=st.floats(0, 1))
def test_the_predicted_error_is_the_error_on_the_same_samples(
    seed: int, shape: tuple[int, int], share: float
) -> None:
    rng = np.random.default_rng(seed)
    m, n = shape
    rank = max(1, round(share * min(m, n)))
    matrix = rng.standard_normal((m, n))
    rows = correlated(rng, 60, m)
    own = moments_of(rows)
    first, second = output_pair(matrix, own, rank, np.float64)
    predicted = np.sqrt(max(0.0, 1.0 - energy_at(output_squares(matrix, own), rank)))
    assert error_on(rows, matrix, first @ second) == pytest.approx(predicted, abs=1e-6)
    achieved = achieved_error(matrix[None], first[None], second[None], [own])
    assert achieved == pytest.approx(predicted, abs=1e-6)


@given(seed=SEEDS, side=st.sampled_from(SIDES), rank=st.integers(1, 10))
def test_no_other_projection_is_closer(seed: int, side: tuple[int, int], rank: int) -> None:
    rng = np.random.default_rng(seed)
    matrix, rows = rng.standard_normal(side), correlated(rng, 80, side[0])
    first, second = output_pair(matrix, moments_of(rows), rank, np.float64)
    best = error_on(rows, matrix, first @ second)
    for _ in range(5):
        basis = np.linalg.qr(rng.standard_normal((side[1], rank)))[0]
        assert best <= error_on(rows, matrix, matrix @ basis @ basis.T) + 1e-12
        bent_first = first + 1e-3 * rng.standard_normal(first.shape)
        assert best <= error_on(rows, matrix, bent_first @ second) + 1e-12
    plain = np.linalg.svd(matrix)
    near = (plain[0][:, :rank] * plain[1][:rank]) @ plain[2][:rank]
    assert best <= error_on(rows, matrix, near) + 1e-12


@given(seed=SEEDS, side=st.sampled_from(SIDES), rank=st.integers(1, 12))
def test_it_is_the_truncated_svd_of_the_whitened_weight(
    seed: int, side: tuple[int, int], rank: int
) -> None:
    """SVD-LLM: S Sᵀ = C, truncate Sᵀ W, multiply by S⁻ᵀ."""
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal(side)
    own = moments_of(correlated(rng, 200, side[0], decay=2.0))
    white = np.linalg.cholesky(own.second)
    u, values, vt = np.linalg.svd(white.T @ matrix, full_matrices=False)
    truncated = (u[:, :rank] * values[:rank]) @ vt[:rank]
    expected = scipy.linalg.solve_triangular(white.T, truncated, lower=False)
    first, second = output_pair(matrix, own, rank, np.float64)
    gap = (values[rank - 1] - values[rank]) / values[0] if rank < len(values) else 1.0
    if gap > 1e-4:  # else the two may cut between equal values
        np.testing.assert_allclose(first @ second, expected, atol=1e-7)


@pytest.mark.parametrize("side", SIDES)
def test_singular_moments_do_no_harm(side: tuple[int, int], rng: np.random.Generator) -> None:
    m, n = side
    matrix = rng.standard_normal((m, n))
    rows = rng.standard_normal((300, 4)) @ rng.standard_normal((4, m))  # rank 4
    rows[:, 0] = 0.0  # and one element that is never there
    own = moments_of(rows)
    assert np.count_nonzero(output_squares(matrix, own)) == 4
    for rank in (2, 4, 9):
        first, second = output_pair(matrix, own, rank, np.float32)
        assert np.isfinite(first).all()
        assert np.isfinite(second).all()
        if rank >= 4:
            assert error_on(rows, matrix, first @ second) < 1e-5


@pytest.mark.parametrize("side", SIDES)
def test_weights_and_inputs_of_zeros(side: tuple[int, int], rng: np.random.Generator) -> None:
    matrix, own = np.zeros(side), moments_of(rng.standard_normal((50, side[0])))
    assert not output_squares(matrix, own).any()
    first, second = output_pair(matrix, own, 3, np.float32)
    assert not (first @ second).any()
    assert achieved_error(matrix[None], first[None], second[None], [own]) == 0.0
    nothing = Moments(np.zeros((side[0], side[0])), np.zeros(side[0]), 5)
    first, second = output_pair(rng.standard_normal(side), nothing, 3, np.float32)
    assert np.isfinite(first).all()
    assert np.isfinite(second).all()


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_a_weight_of_that_rank_stays_what_it_is(
    side: tuple[int, int], dtype: type, rng: np.random.Generator
) -> None:
    matrix = known_rank(*side, 4, rng, dtype)
    own = moments_of(correlated(rng, 100, side[0]))
    assert np.count_nonzero(output_squares(matrix, own) > 1e-12) == 4
    first, second = output_pair(matrix, own, 4, dtype)
    assert first.dtype == second.dtype == dtype
    product = first.astype(np.float64) @ second.astype(np.float64)
    off = np.linalg.norm(product - matrix.astype(np.float64))
    limits: dict[type, float] = {np.float32: 1e-6, np.float16: 2e-3}
    limit = limits.get(dtype, 2e-2)
    assert off < limit * np.linalg.norm(matrix.astype(np.float64))


@given(seed=SEEDS, side=st.sampled_from(SIDES), rank=st.integers(1, 10))
def test_slices_are_fitted_each_to_its_own_inputs(
    seed: int, side: tuple[int, int], rank: int
) -> None:
    rng = np.random.default_rng(seed)
    stack = rng.standard_normal((3, *side)) * np.array([1, 5, 0.1])[:, None, None]
    own = [moments_of(correlated(rng, 300, side[0], decay=1.0)) for _ in range(3)]
    first, second = fitted_pair(stack, own, rank, np.float64)
    predicted = np.sqrt(max(0.0, 1 - energy_at(squares(stack, own), rank)))
    assert achieved_error(stack, first, second, own) == pytest.approx(predicted, abs=1e-6)


def test_errors_of_slices_are_pooled_by_energy(rng: np.random.Generator) -> None:
    stack = np.stack([np.zeros((4, 4)), np.eye(4)])  # the first gives nothing: it cannot be off
    own = [moments_of(rng.standard_normal((50, 4)))] * 2
    zeros = np.zeros((2, 4, 1)), np.zeros((2, 1, 4))
    assert achieved_error(stack, *zeros, own) == pytest.approx(1.0)
    assert achieved_error(stack[:1], zeros[0][:1] + 1, zeros[1][:1] + 1, own[:1]) == np.inf
