"""Gram matrices, whose eigenvalues are squared singular values, and what they are summed from.

The squared singular values of ``W[m, n]`` are the eigenvalues of the smaller of ``WᵀW`` and
``WWᵀ`` (Golub & Van Loan, Matrix Computations, 4th ed., §8.6.3).  Accumulated in float64, the
Gram matrix of a float32, float16 or bfloat16 weight resolves singular values down to 1e-8 of the
largest, below the rounding of the weight itself (6e-8 for float32).  A float64 weight needs the
singular values themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_lowrank.numerics.fortran import add_gram

__all__ = ["BLOCK", "gram", "gram_parts", "row_blocks", "squared_norm", "unit"]

# Rows that are converted to float64 at a time, in elements: 16 MB.
BLOCK = 1 << 21
# Elements whose squares are added up in float32: the error of their sum stays below 1e-6 of it.
_SUMMED = 1 << 10
# Rows whose products are added up in float32 by one call.
_ADDED = 1 << 10

# Sums of squares of numbers up to a power of two that stay far within a type.
_SAFE_EXPONENTS = {np.dtype(np.float64): 300, np.dtype(np.float32): 30}


def row_blocks(rows: int, columns: int) -> list[slice]:
    """Slices over the rows of a matrix, each of about 2 M elements."""
    step = max(1, BLOCK // max(columns, 1))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def gram(
    matrix: npt.NDArray[Any], dtype: npt.DTypeLike = np.float64
) -> npt.NDArray[np.floating[Any]]:
    """The Gram matrix ``MᵀM`` of ``M[rows, columns]``, shape [columns, columns].

    ``M`` may be a memory-mapped view; it is read once, in blocks of rows, and never copied whole.

    Args:
        matrix: M.
        dtype: float64, or float32 for what needs no more; squares have to be within its range.
    """
    columns = matrix.shape[1]
    total = np.zeros((columns, columns), dtype)
    for part in gram_parts(matrix, dtype):
        add_gram(total, part)
    for block in row_blocks(columns, columns):
        corner = total[block, block]
        corner += np.triu(corner, 1).T
        total[block.stop :, block] = total[block, block.stop :].T
    return total


def gram_parts(
    matrix: npt.NDArray[Any], dtype: npt.DTypeLike
) -> Iterator[npt.NDArray[np.floating[Any]]]:
    """Blocks of rows whose Gram matrices add up to that of the matrix, in float64 or float32."""
    rows, columns = matrix.shape
    # Sums of more numbers would be rounded too often in float32.
    double = np.dtype(dtype).itemsize == 8
    step = max(1, min(max(1, BLOCK // max(columns, 1)), rows if double else _ADDED))
    for start in range(0, rows, step):
        yield np.asarray(matrix[start : start + step], dtype)


def squared_norm(matrix: npt.NDArray[Any]) -> float:
    """``‖M‖²`` (Frobenius) of float32 or less; infinity or NaN where M is not finite.

    Infinity as well where squares are beyond float32.  The error is below 1e-6 of it.
    """
    total = 0.0
    if matrix.flags.f_contiguous:
        matrix = matrix.T
    for block in row_blocks(*matrix.shape):
        flat = np.asarray(matrix[block], np.float32).reshape(-1)
        even = flat.size - flat.size % _SUMMED
        with np.errstate(over="ignore", invalid="ignore"):
            whole = flat[:even].reshape(-1, _SUMMED)
            total += float(np.einsum("ij,ij->i", whole, whole).sum(dtype=np.float64))
            total += float(np.vdot(flat[even:], flat[even:]))
    return total


def unit(stack: npt.NDArray[Any], dtype: npt.DTypeLike = np.float64) -> float:
    """A power of two by which a stack is multiplied so that its squares can be summed.

    Args:
        stack: finite numbers.
        dtype: what they are summed in, float64 or float32.

    Returns:
        1 but for numbers of more than 1e90 or less than 1e-90; in float32 1e9 and 1e-9.
    """
    work = np.dtype(dtype)
    if stack.size == 0 or (work == np.float64 and stack.dtype != np.float64):
        return 1.0
    exponent = math.frexp(max(float(stack.max()), -float(stack.min())))[1]
    if abs(exponent) <= _SAFE_EXPONENTS[work]:
        return 1.0
    return math.ldexp(1.0, min(-exponent, 1000 if work == np.float64 else 126))
