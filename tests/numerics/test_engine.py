"""The functions behind which spectra and factors are computed, on every device that is here."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_lowrank.errors import InputError
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.engine import PROCESSOR, Engine, engine_of

# How far answers may be from those of the processor, as a share of the largest one.
WITHIN = {"float64": 1e-13, "float32": 2e-6}


@pytest.fixture(params=["cpu", "torch:cpu"])
def engine(request: pytest.FixtureRequest) -> Engine:
    if request.param != "cpu":
        pytest.importorskip("torch", reason="torch is not installed")
    return engine_of(request.param)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("stored", ["float16", "float32", "float64"])
def test_gram(engine: Engine, dtype: str, stored: str, rng: np.random.Generator) -> None:
    matrix: Array = rng.standard_normal((2100, 40)).astype(stored)  # three blocks of float32
    matrix.setflags(write=False)  # as a mapped one
    for own in (matrix, np.asfortranarray(matrix), matrix[::2, 3:]):
        found = engine.gram(own, dtype)
        exact: Array = own.astype(np.float64).T @ own.astype(np.float64)
        assert found.dtype == dtype
        np.testing.assert_allclose(found, exact, rtol=0, atol=WITHIN[dtype] * exact.max())
    assert engine.gram(matrix[:0], dtype).tolist() == np.zeros((40, 40)).tolist()


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_product(engine: Engine, dtype: str, rng: np.random.Generator) -> None:
    left: Array = rng.standard_normal((30, 70)).astype(dtype)
    right: Array = rng.standard_normal((50, 70)).astype(dtype)
    found = engine.product(left, right.T)
    assert found.dtype == dtype
    exact: Array = left.astype(np.float64) @ right.T.astype(np.float64)
    np.testing.assert_allclose(found, exact, rtol=0, atol=WITHIN[dtype] * np.abs(exact).max())


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("size", [1, 2, 90])
def test_reduce(engine: Engine, dtype: str, size: int, rng: np.random.Generator) -> None:
    half = rng.standard_normal((size + 5, size))
    square: Array = (half.T @ half).astype(dtype)
    expected: Array = np.linalg.eigvalsh(square.astype(np.float64))[::-1]
    upper = np.triu(square) + np.tril(np.full_like(square, np.nan), -1)  # is not read
    reduced = engine.reduce(upper)
    assert reduced.memory > 0
    within = WITHIN[dtype] * expected[0] * 5
    np.testing.assert_allclose(reduced.values(), expected, rtol=0, atol=within)
    for count in {1, (size + 1) // 2, size}:
        values, vectors = reduced.leading(count)
        assert (values.dtype.name, vectors.dtype.name) == ("float64", dtype)
        np.testing.assert_allclose(values, expected[:count], rtol=0, atol=within)
        np.testing.assert_allclose(square @ vectors, vectors * values, rtol=0, atol=5 * within)
        np.testing.assert_allclose(vectors.T @ vectors, np.eye(count), atol=50 * WITHIN[dtype])


def test_one_engine_for_each_name() -> None:
    assert engine_of("cpu") is PROCESSOR
    with pytest.raises(InputError, match=r"expected cpu, or a device|package torch"):
        engine_of("no such device")
