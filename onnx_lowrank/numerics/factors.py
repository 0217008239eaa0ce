"""The best pair of a given rank by the weight alone, and how far it is from the matrix."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.components import Components
from onnx_lowrank.numerics.engine import PROCESSOR, Engine
from onnx_lowrank.numerics.spectrum import row_blocks, unit

__all__ = ["balanced_pair", "relative_error", "squared_singular_values"]


def squared_singular_values(stack: Array) -> npt.NDArray[np.float64]:
    """Squared singular values of ``W[e, m, n]``, falling, summed over the e slices: shape [s].

    s is ``min(m, n)``.  The i-th entry is the sum over the slices of the square of their i-th
    singular value, so that a rank shared by all slices holds the sum of the first entries.
    """
    total = np.zeros(min(stack.shape[1:]), dtype=np.float64)
    for matrix in stack:
        total += Components(matrix).squares
    return total


def balanced_pair(
    stack: Array, rank: int, dtype: npt.DTypeLike, engine: Engine = PROCESSOR
) -> tuple[Array, Array]:
    """Factors ``A[e, m, k]`` and ``B[e, k, n]`` with ``W ≈ A @ B`` for every slice.

    Args:
        stack: ``W[e, m, n]``, finite; may be a memory-mapped view.
        rank: k, at most ``min(m, n)``.
        dtype: type of the factors.
        engine: does the work.
    """
    slices, m, n = stack.shape
    first = np.empty((slices, m, rank), dtype)
    second = np.empty((slices, rank, n), dtype)
    for index, matrix in enumerate(stack):
        asked = None if np.dtype(dtype) == np.float64 else rank
        basis = Components(matrix, rank=asked, engine=engine).basis(rank)
        first[index], second[index] = basis.pair(matrix, rank, dtype, engine)
    return first, second


def relative_error(stack: Array, first: Array, second: Array) -> float:
    """``‖W − A·B‖ / ‖W‖`` (Frobenius) over all slices, from the factors as they are stored.

    0 for a matrix of zeros that is represented exactly, infinity for one that is not.
    """
    error = norm = 0.0
    scale = unit(stack)
    for matrix, a, b in zip(stack, first, second, strict=True):
        right = np.asarray(b, np.float64)
        for block in row_blocks(*matrix.shape):
            exact = np.asarray(matrix[block], np.float64)
            difference = np.asarray(a[block], np.float64) @ right
            np.subtract(exact, difference, out=difference)
            if scale != 1.0:
                exact, difference = exact * scale, difference * scale
            norm += float(np.vdot(exact, exact))
            error += float(np.vdot(difference, difference))
    if norm == 0.0:
        return 0.0 if error == 0.0 else math.inf
    return math.sqrt(error / norm)
