"""Singular values, and the Gram matrices that they come from.

The squared singular values of ``W[m, n]`` are the eigenvalues of the smaller of ``WᵀW`` and
``WWᵀ`` (Golub & Van Loan, Matrix Computations, 4th ed., §8.6.3).  Accumulated in float64, the
Gram matrix of a float32, float16 or bfloat16 weight resolves singular values down to 1e-8 of the
largest, below the rounding of the weight itself (6e-8 for float32).  A float64 weight needs the
singular values themselves; it goes through LAPACK's ``gesdd``.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.linalg
import scipy.linalg.blas

__all__ = ["BLOCK", "gram", "row_blocks", "squared_singular_values", "unit"]

# Rows that are converted to float64 at a time, in elements: 16 MB.
BLOCK = 1 << 21

# Sums of squares of numbers up to 2**300 stay far within float64.
_SAFE_EXPONENT = 300


def row_blocks(rows: int, columns: int) -> list[slice]:
    """Slices over the rows of a matrix, each of about 2 M elements."""
    step = max(1, BLOCK // max(columns, 1))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def gram(matrix: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """The Gram matrix ``MᵀM`` of ``M[rows, columns]`` in float64, shape [columns, columns].

    Only the upper triangle is computed and set.  ``M`` may be a memory-mapped view; it is read
    once, in blocks of rows, and never copied whole.
    """
    rows, columns = matrix.shape
    total = np.zeros((columns, columns), dtype=np.float64, order="F")
    for block in row_blocks(rows, columns):
        part = np.asarray(matrix[block], dtype=np.float64)
        # In Fortran order the C-ordered block is its own transpose: no copy.
        total = scipy.linalg.blas.dsyrk(1.0, part.T, beta=1.0, c=total, trans=0, overwrite_c=1)
    return total


def squared_singular_values(stack: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Squared singular values of ``W[e, m, n]``, falling, summed over the e slices: shape [s].

    s is ``min(m, n)``.  The i-th entry is the sum over the slices of the square of their i-th
    singular value, so that a rank shared by all slices holds the sum of the first entries.
    Values below the rounding error of the method are set to exactly 0.  Of a float64 weight
    whose squares leave the range of float64 they are in another unit (see `unit`).
    """
    total = np.zeros(min(stack.shape[1:]), dtype=np.float64)
    scale = unit(stack)
    for matrix in stack:
        total += _of_one(matrix, scale)
    return total


def unit(stack: npt.NDArray[Any]) -> float:
    """A power of two by which a stack is multiplied so that its squares can be summed.

    1 but for float64 weights of more than 1e90 or less than 1e-90.
    """
    if stack.dtype != np.float64 or stack.size == 0:
        return 1.0
    exponent = math.frexp(max(float(stack.max()), -float(stack.min())))[1]
    return 1.0 if abs(exponent) <= _SAFE_EXPONENT else math.ldexp(1.0, min(-exponent, 1000))


def _of_one(matrix: npt.NDArray[Any], scale: float) -> npt.NDArray[np.float64]:
    size = min(matrix.shape)
    if size == 0:
        return np.zeros(0)
    if matrix.dtype == np.float64:
        values = scipy.linalg.svdvals(matrix, check_finite=False) * scale
        floor = max(matrix.shape) * np.finfo(np.float64).eps * values[0]
        return np.where(values > floor, values, 0.0) ** 2
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    squares = scipy.linalg.eigvalsh(gram(tall), lower=False, overwrite_a=True, check_finite=False)[
        ::-1
    ]
    floor = size * np.finfo(np.float64).eps * max(squares[0], 0.0)
    return np.where(squares > floor, squares, 0.0)
