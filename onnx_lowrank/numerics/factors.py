"""The best pair of a given rank, and how far it is from the matrix.

By Eckart and Young (Psychometrika 1, 1936) the rank-k matrix closest to W in the Frobenius norm
is ``U_k Σ_k V_kᵀ``.  With ``V_k`` the leading eigenvectors of ``WᵀW`` that is ``(W V_k) V_kᵀ``,
which needs no inverse and stays exact however small the singular values are.  The square root of
Σ goes into each factor, so that both have the same scale and survive a cast to float16, and the
rank axis is rotated, so that all of its channels have (see `onnx_lowrank.numerics.rotation`).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import scipy.linalg

from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.rotation import rotated_first, rotated_second
from onnx_lowrank.numerics.spectrum import gram, row_blocks, unit

__all__ = ["balanced_pair", "leading_eigenvectors", "relative_error"]

Float64 = npt.NDArray[np.float64]


def balanced_pair(stack: Array, rank: int, dtype: npt.DTypeLike) -> tuple[Array, Array]:
    """Factors ``A[e, m, k]`` and ``B[e, k, n]`` with ``W ≈ A @ B`` for every slice.

    Args:
        stack: ``W[e, m, n]``, finite; may be a memory-mapped view.
        rank: k, at most ``min(m, n)``.
        dtype: type of the factors.
    """
    slices, m, n = stack.shape
    first = np.empty((slices, m, rank), dtype)
    second = np.empty((slices, rank, n), dtype)
    for index, matrix in enumerate(stack):
        if m >= n:
            left, right = _tall_pair(matrix, rank)
        else:  # (Wᵀ)ᵀ: the pair of the transpose, swapped
            right, left = _tall_pair(matrix.T, rank)
        first[index], second[index] = rotated_first(left), rotated_second(right.T)
    return first, second


def _tall_pair(matrix: Array, rank: int) -> tuple[Float64, Float64]:
    """``L[rows, k]`` and ``R[columns, k]`` with ``M ≈ L @ R.T``, rows ≥ columns, balanced."""
    rows, columns = matrix.shape
    if matrix.dtype == np.float64:
        u, values, vt = scipy.linalg.svd(matrix, full_matrices=False, check_finite=False)
        root = np.sqrt(values[:rank])
        return u[:, :rank] * root, vt[:rank].T * root
    _, basis = leading_eigenvectors(gram(matrix), rank)
    projected = np.empty((rows, rank))
    for block in row_blocks(rows, columns):
        np.matmul(np.asarray(matrix[block], np.float64), basis, out=projected[block])
    # The columns of M V are U Σ: their norms are the singular values.
    root = np.sqrt(np.linalg.norm(projected, axis=0))
    inverse = np.divide(1.0, root, out=np.zeros_like(root), where=root > 0)
    return projected * inverse, basis * root


def leading_eigenvectors(upper: Float64, rank: int) -> tuple[Float64, Float64]:
    """The ``rank`` largest eigenvalues of a symmetric matrix, falling, and their eigenvectors.

    Args:
        upper: the matrix [s, s], of which the upper triangle is read; overwritten.
        rank: how many.

    Returns:
        values [rank] and vectors [s, rank].
    """
    size = upper.shape[0]
    # Divide and conquer finds all of them sooner than bisection finds more than a quarter.
    if rank > size // 4:
        values, vectors = scipy.linalg.eigh(
            upper, lower=False, driver="evd", overwrite_a=True, check_finite=False
        )
        values, vectors = values[size - rank :], vectors[:, size - rank :]
    else:
        values, vectors = scipy.linalg.eigh(
            upper,
            lower=False,
            driver="evr",
            subset_by_index=(size - rank, size - 1),
            overwrite_a=True,
            check_finite=False,
        )
    return values[::-1], np.ascontiguousarray(vectors[:, ::-1])


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
            difference = exact - np.asarray(a[block], np.float64) @ right
            if scale != 1.0:
                exact, difference = exact * scale, difference * scale
            norm += float(np.vdot(exact, exact))
            error += float(np.vdot(difference, difference))
    if norm == 0.0:
        return 0.0 if error == 0.0 else math.inf
    return math.sqrt(error / norm)
