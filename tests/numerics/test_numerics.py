from __future__ import annotations

import threading
import time
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from threadpoolctl import threadpool_info

from onnx_lowrank.numerics import parallel, spectrum
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.factors import (
    balanced_pair,
    relative_error,
    squared_singular_values,
)
from onnx_lowrank.numerics.parallel import map_layers, working_set
from onnx_lowrank.numerics.spectrum import gram
from tests.helpers.models import known_rank, uniform

DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]
SHAPES = [(1, 40, 24), (1, 24, 40), (1, 32, 32), (5, 20, 12), (1, 1, 9), (1, 9, 1), (3, 1, 1)]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def decaying(shape: tuple[int, ...], rng: np.random.Generator, dtype: npt.DTypeLike) -> Array:
    """Matrices whose singular values fall from 1 to 1e-4."""
    *lead, m, n = shape
    u, _, vt = np.linalg.svd(rng.standard_normal((*lead, m, n)), full_matrices=False)
    product: Array = (u * np.logspace(0, -4, min(m, n))) @ vt
    return product.astype(dtype)


def direct_error(stack: Array, first: Array, second: Array) -> float:
    exact = stack.astype(np.float64)
    product = first.astype(np.float64) @ second.astype(np.float64)
    return float(np.linalg.norm((exact - product).ravel()) / np.linalg.norm(exact.ravel()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_spectrum_is_that_of_numpy(
    shape: tuple[int, int, int], dtype: type, rng: np.random.Generator
) -> None:
    stack = decaying(shape, rng, dtype)
    values = np.linalg.svd(stack.astype(np.float64), compute_uv=False)
    squares = squared_singular_values(stack)
    assert squares.shape == (min(shape[1:]),)
    np.testing.assert_allclose(squares, (values**2).sum(axis=0), rtol=1e-6, atol=1e-14)
    assert (np.diff(squares) <= 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n"), [(40, 24), (24, 40), (32, 32)])
def test_what_is_beyond_the_rank_is_exactly_zero(
    m: int, n: int, dtype: type, rng: np.random.Generator
) -> None:
    squares = squared_singular_values(known_rank(m, n, 6, rng, dtype, batch=(2,)))
    assert (squares[:6] > 0).all()
    assert not squares[6:].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_matrices(dtype: type) -> None:
    stack: Array = np.zeros((2, 6, 4), dtype)
    assert not squared_singular_values(stack).any()
    first, second = balanced_pair(stack, 3, dtype)
    assert not first.any()
    assert not (first.astype(np.float64) @ second.astype(np.float64)).any()
    assert relative_error(stack, first, second) == 0.0


def test_empty_matrices_have_no_values() -> None:
    assert squared_singular_values(np.zeros((2, 0, 4), np.float32)).shape == (0,)
    assert squared_singular_values(np.zeros((0, 3, 4), np.float32)).tolist() == [0, 0, 0]


def test_gram_in_blocks_is_that_of_the_whole(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spectrum, "BLOCK", 50)  # 7 rows at a time
    matrix = uniform((31, 7), rng)
    exact = matrix.astype(np.float64)
    np.testing.assert_allclose(gram(matrix), exact.T @ exact, rtol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_pair_is_as_near_as_eckart_and_young_allow(
    shape: tuple[int, int, int], dtype: type, rng: np.random.Generator
) -> None:
    stack = decaying(shape, rng, dtype)
    exact = stack.astype(np.float64)
    u, values, vt = np.linalg.svd(exact, full_matrices=False)
    for rank in {1, max(1, min(shape[1:]) // 2), min(shape[1:])}:
        first, second = balanced_pair(stack, rank, np.float64)
        assert first.shape == (*shape[:2], rank)
        assert second.shape == (shape[0], rank, shape[2])
        best = (u[..., :rank] * values[..., None, :rank]) @ vt[..., :rank, :]
        optimum = np.linalg.norm((exact - best).ravel())
        got = np.linalg.norm((exact - first @ second).ravel())
        assert got <= optimum * (1 + 1e-6) + 1e-7 * np.linalg.norm(exact.ravel())


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_both_factors_have_the_same_scale(
    shape: tuple[int, int], dtype: type, rng: np.random.Generator
) -> None:
    stack = decaying((1, *shape), rng, dtype)
    first, second = balanced_pair(stack, 10, np.float64)
    roots = np.sqrt(np.linalg.svd(stack[0].astype(np.float64), compute_uv=False)[:10])
    for factor in (first[0], second[0]):
        found = np.linalg.svd(factor, compute_uv=False)
        np.testing.assert_allclose(found, roots, rtol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "most"),
    [(np.float32, 1e-6), (np.float64, 1e-13), (np.float16, 2e-3), (ml_dtypes.bfloat16, 1e-2)],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_is_exact(
    shape: tuple[int, int, int], dtype: type, most: float, rng: np.random.Generator
) -> None:
    stack = uniform(shape, rng, dtype)
    first, second = balanced_pair(stack, min(shape[1:]), dtype)
    assert first.dtype == second.dtype == stack.dtype
    assert direct_error(stack, first, second) <= most


def test_an_ill_conditioned_weight_stays_exact_at_full_rank(rng: np.random.Generator) -> None:
    stack = (uniform((1, 64, 32), rng, np.float64) * np.logspace(0, -20, 32)).astype(np.float32)
    first, second = balanced_pair(stack, 32, np.float32)
    assert np.isfinite(first).all()
    assert np.isfinite(second).all()
    assert direct_error(stack, first, second) <= 1e-6


@pytest.mark.parametrize("scale", [60000.0, 1e-4])
def test_float16_factors_stay_within_the_range(scale: float, rng: np.random.Generator) -> None:
    stack = (uniform((1, 300, 200), rng) * scale).astype(np.float16)
    first, second = balanced_pair(stack, 200, np.float16)
    assert np.isfinite(first).all()
    assert np.isfinite(second).all()
    assert direct_error(stack, first, second) < 5e-3


@pytest.mark.parametrize("dtype", DTYPES)
def test_relative_error_is_the_error_of_the_stored_factors(
    dtype: type, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spectrum, "BLOCK", 50)
    stack = decaying((3, 20, 12), rng, dtype)
    first, second = balanced_pair(stack, 2, dtype)
    expected = direct_error(stack, first, second)
    assert expected > 0.1
    assert relative_error(stack, first, second) == pytest.approx(expected, rel=1e-9)


def test_relative_error_of_a_wrong_pair_for_zeros_is_infinite() -> None:
    zero, one = np.zeros((1, 2, 2)), np.ones((1, 2, 1))
    assert relative_error(zero, one, np.ones((1, 1, 2))) == float("inf")


def test_a_memory_mapped_view_is_read_where_it_is(rng: np.random.Generator, tmp_path: Any) -> None:
    weight = known_rank(40, 24, 5, rng)
    weight.tofile(tmp_path / "weight")
    mapped = np.memmap(tmp_path / "weight", np.float32, "r", shape=(40, 24)).T[None]
    first, second = balanced_pair(mapped, 5, np.float32)
    assert direct_error(weight.T[None], first, second) < 1e-6


# --- layers in parallel


def test_answers_come_in_the_order_of_the_items() -> None:
    def work(item: int) -> int:
        time.sleep(0.002 * (item % 3))
        return item * item

    found = list(map_layers(work, list(range(20)), lambda _: 1, workers=4))
    assert found == [(item, item * item) for item in range(20)]


def test_no_items_no_answers() -> None:
    assert list(map_layers(lambda item: item, [], lambda _: 1)) == []


def test_an_exception_comes_through_and_drops_the_rest() -> None:
    begun = []

    def work(item: int) -> int:
        begun.append(item)
        if item == 2:
            raise OSError("disk is full")
        return item

    answers = map_layers(work, list(range(50)), lambda _: 1, workers=2)
    with pytest.raises(OSError, match="disk is full"):
        list(answers)
    assert len(begun) < 10


def test_stopping_early_drops_the_rest() -> None:
    begun = []
    answers = map_layers(lambda item: begun.append(item), list(range(50)), lambda _: 1, workers=2)
    next(answers)
    answers.close()  # type: ignore[attr-defined]
    assert len(begun) < 10


def test_memory_is_never_exceeded_unless_by_a_single_item(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "MEMORY", 100)
    lock, running, peaks = threading.Lock(), [], []
    together = threading.Barrier(3, timeout=120)

    def work(item: int) -> None:
        with lock:
            running.append(item)
            peaks.append(tuple(running))
        time.sleep(0.002)
        if item == 5:  # the three smallest run at the same time, however busy the machine is
            together.wait()
        with lock:
            running.remove(item)

    items = [250, 60, 60, 30, 30, 30, 120, 5, 5, 5]
    found = [item for item, _ in map_layers(work, items, lambda item: item, workers=4)]
    assert found == items
    assert all(sum(peak) <= 100 or len(peak) == 1 for peak in peaks)
    assert (5, 5, 5) in peaks


def test_each_worker_has_one_blas_thread() -> None:
    def threads(_: int) -> set[int]:
        return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}

    for _, found in map_layers(threads, [1, 2, 3], lambda _: 1, workers=2):
        assert found == {1}


def test_working_set_covers_the_gram_matrix_and_both_factors() -> None:
    m, n = 300, 200
    assert working_set(m, n) >= 8 * (n * n + n * (m + n))
    assert working_set(m, n) == working_set(n, m)
