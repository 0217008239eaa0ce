"""The pair of a given rank that is closest in its outputs on given inputs.

For ``Y = X W`` with ``C = E[xᵀ x]`` the best rank-k map is ``W V Vᵀ``, V the k leading
eigenvectors of ``Wᵀ C W``: the projection of the outputs on their own principal components
(Eckart & Young on ``X W``).  It equals truncating the whitened weight (SVD-LLM, Wang et al., ICLR
2025) by algebra, and needs no Cholesky factor and no inverse, so that a singular C does no harm.
Where n > m the m×m side is used: with ``C = Q Λ Qᵀ``, the eigenvectors u of ``√Λ Qᵀ W Wᵀ Q √Λ``
give ``v = Wᵀ Q √Λ u / σ``.  Everything is in float64: the eigenvalues are squares, and a tail of
1e-4 of the energy has singular values of 1e-2 of the largest, far above 1e-8.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import scipy.linalg

from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.factors import leading_eigenvectors
from onnx_lowrank.numerics.moments import Moments
from onnx_lowrank.numerics.rotation import rotated_first, rotated_second

__all__ = ["component_energies", "output_energies", "output_pair", "output_squares"]

Float64 = npt.NDArray[np.float64]


def output_squares(matrix: Array, moments: Moments) -> Float64:
    """Eigenvalues of ``Wᵀ C W``, falling: the energy of the outputs by principal component.

    Args:
        matrix: ``W[m, n]``.
        moments: C of the inputs.

    Returns:
        shape [min(m, n)]; values below the rounding error are exactly 0.
    """
    gram, _ = _gram(matrix, moments)
    if gram.size == 0:
        return np.zeros(0)
    squares = scipy.linalg.eigvalsh(gram, overwrite_a=True, check_finite=False)[::-1]
    return np.where(squares > _floor(squares), squares, 0.0).astype(np.float64)


def output_pair(
    matrix: Array, moments: Moments, rank: int, dtype: npt.DTypeLike
) -> tuple[Array, Array]:
    """``A[m, k]`` and ``B[k, n]`` with ``A @ B = W V Vᵀ``, balanced and rotated.

    Components without any energy add nothing.  The rotation of the rank axis leaves the product as
    it is (see `onnx_lowrank.numerics.rotation`).
    """
    basis = _basis(matrix, moments, rank)
    projected = np.asarray(matrix, np.float64) @ basis  # [m, k]
    scale = np.sqrt(np.linalg.norm(projected, axis=0))
    inverse = np.divide(1.0, scale, out=np.zeros_like(scale), where=scale > 0)
    first, second = rotated_first(projected * inverse), rotated_second((basis * scale).T)
    return first.astype(dtype), second.astype(dtype)


def component_energies(matrix: Array, fitted: Moments, other: Moments) -> Float64:
    """Energy of the outputs of other inputs by the components that fitted ones have.

    What a pair of rank k, fitted to some samples, loses on others is the sum of all but the first
    k of them; of the samples that it was fitted to it would lose less.

    Args:
        matrix: ``W[m, n]``.
        fitted: C of the inputs whose components are taken.
        other: C of the inputs whose energy is.

    Returns:
        shape [min(m, n)], in the order of the components.
    """
    projected = np.asarray(matrix, np.float64) @ _basis(matrix, fitted, min(matrix.shape))
    energies = np.einsum("mk,mk->k", projected, other.applied(projected))
    return np.asarray(np.maximum(energies, 0.0))


def _basis(matrix: Array, moments: Moments, rank: int) -> Float64:
    """The leading principal components of the outputs, V[n, rank]; zeros without any energy."""
    gram, root = _gram(matrix, moments)
    values, basis = leading_eigenvectors(gram, rank)
    if root is None:
        return np.asarray(basis)
    inverse = np.zeros(rank)  # from the m×m side: v = Wᵀ Q √Λ u / σ
    kept = values > _floor(values)
    inverse[kept] = 1.0 / np.sqrt(values[kept])
    return np.asarray((np.asarray(matrix, np.float64).T @ (root @ basis)) * inverse)


def output_energies(
    matrix: Array, first: Array, second: Array, moments: Moments, shift: Float64 | None = None
) -> tuple[float, float]:
    """``E‖x(W − A·B) − s‖²`` and ``E‖x W‖²``, from the factors as they are stored.

    Args:
        matrix: ``W[m, n]``.
        first: ``A[m, k]``.
        second: ``B[k, n]``.
        moments: of x.
        shift: s[n], which a bias adds; None adds nothing.
    """
    exact = np.asarray(matrix, np.float64)
    total = float(np.vdot(exact, moments.applied(exact)))
    difference = exact - np.asarray(first, np.float64) @ np.asarray(second, np.float64)
    error = float(np.vdot(difference, moments.applied(difference)))
    if shift is not None:
        error += float(shift @ (shift - 2.0 * (moments.mean @ difference)))
    return max(error, 0.0), max(total, 0.0)


def _gram(matrix: Array, moments: Moments) -> tuple[Float64, Float64 | None]:
    """``Wᵀ C W`` or, where that is the larger, its m×m counterpart and ``Q √Λ``."""
    m, n = matrix.shape
    exact = np.asarray(matrix, np.float64)
    if n <= m:
        return exact.T @ moments.applied(exact), None
    if moments.diagonal:
        root = np.diag(np.sqrt(moments.second))
    else:
        values, vectors = scipy.linalg.eigh(moments.second, check_finite=False)
        root = vectors * np.sqrt(np.maximum(values, 0.0))
    half = root.T @ exact  # [m, n]
    return half @ half.T, root


def _floor(squares: Array) -> float:
    largest = float(np.max(squares, initial=0.0))
    return len(squares) * float(np.finfo(np.float64).eps) * largest
