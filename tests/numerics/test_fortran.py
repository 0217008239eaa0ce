"""Routines of BLAS and LAPACK by their addresses."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.fortran import add_gram, solve


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "view",
    ["whole", "transposed", "rows", "columns", "of the transpose", "every other", "one row", "one"],
)
def test_a_gram_matrix_is_added_wherever_the_part_lies(
    dtype: npt.DTypeLike, view: str, rng: np.random.Generator
) -> None:
    whole: Array = rng.standard_normal((12, 20)).astype(dtype)
    part = {
        "whole": whole,
        "transposed": whole.T,
        "rows": whole[3:7],
        "columns": whole[:, 3:7],
        "of the transpose": whole.T[2:9],
        "every other": whole[::2, ::3],
        "one row": whole[3:4],
        "one": whole[::5, 4:5],
    }[view]
    before = part.copy()
    total: Array = np.ones((part.shape[1],) * 2, dtype)
    add_gram(total, part)
    expected = 1.0 + before.astype(np.float64).T @ before
    np.testing.assert_allclose(np.triu(total), np.triu(expected), rtol=1e-5, atol=1e-5)
    assert (np.tril(total, -1) == np.tril(np.ones_like(total), -1)).all()
    np.testing.assert_array_equal(part, before)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_nothing_adds_nothing(shape: tuple[int, int]) -> None:
    total = np.ones((shape[1],) * 2, np.float32)
    add_gram(total, np.zeros(shape, np.float32))
    assert (total == 1.0).all()


def test_what_lapack_does_not_solve_is_an_error() -> None:
    indefinite = -np.eye(2)
    with pytest.raises(np.linalg.LinAlgError, match="dpotrf returned 1"):
        solve("dpotrf", b"L", 2, indefinite, 2)
