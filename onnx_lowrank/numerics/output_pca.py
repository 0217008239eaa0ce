"""The pair of a given rank that is closest in its outputs on given inputs.

For ``Y = X W`` with ``C = E[xᵀ x]`` the best rank-k map is ``W V Vᵀ``, V the k leading
eigenvectors of ``Wᵀ C W``: the projection of the outputs on their own principal components
(Eckart & Young on ``X W``).  It equals truncating the whitened weight (SVD-LLM, Wang et al., ICLR
2025) by algebra, and needs no Cholesky factor and no inverse, so that a singular C does no harm
(`onnx_lowrank.numerics.components`).  The energies are in float64: they are squares, and a tail of
1e-4 of the energy has singular values of 1e-2 of the largest, far above 1e-8.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.components import Components
from onnx_lowrank.numerics.engine import PROCESSOR, Engine
from onnx_lowrank.numerics.moments import Moments

__all__ = ["output_energies", "output_pair", "output_squares"]

Float64 = npt.NDArray[np.float64]


def output_squares(matrix: Array, moments: Moments) -> Float64:
    """Eigenvalues of ``Wᵀ C W``, falling: the energy of the outputs by principal component.

    Args:
        matrix: ``W[m, n]``.
        moments: C of the inputs.

    Returns:
        shape [min(m, n)]; values below the rounding error are exactly 0.
    """
    return Components(matrix, moments).squares


def output_pair(
    matrix: Array,
    moments: Moments,
    rank: int,
    dtype: npt.DTypeLike,
    engine: Engine = PROCESSOR,
) -> tuple[Array, Array]:
    """``A[m, k]`` and ``B[k, n]`` with ``A @ B = W V Vᵀ``, balanced and rotated.

    Components without any energy add nothing.  The rotation of the rank axis leaves the product as
    it is (see `onnx_lowrank.numerics.rotation`).
    """
    basis = Components(matrix, moments, engine=engine).basis(rank)
    return basis.pair(matrix, rank, dtype, engine)


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
