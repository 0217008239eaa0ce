"""What errors of a map do to the outputs of its model: pure arithmetic on second moments.

A map ``W[m, n]`` that is replaced by ``W − E`` gives errors ``x E`` on inputs x.  With
``C = E[xᵀx]`` of the inputs, and G[n, n] of what the model's outputs feel of errors at the map's
outputs (`onnx_lowrank.numerics.fisher`), taken as independent as in K-FAC (J. Martens & R. Grosse,
ICML 2015), the mean square of what they feel of E is ``tr(G Eᵀ C E)``.  It holds for any E: what a
lower rank leaves out, or what a coarser number format rounds off.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.moments import Moments

__all__ = ["Weigh", "felt_error", "felt_tails", "plainly"]

Float64 = npt.NDArray[np.float64]
Weigh = Callable[[Float64], Float64]
"""``Lᵀ X`` of ``X[n, k]``, with ``G = L Lᵀ``."""

# A loss below this share of all there is to lose is rounding.
_ROUNDING = 1e-12


def plainly(array: Float64) -> Float64:
    """G = 1: all errors are felt alike."""
    return array


def felt_error(error: Array, moments: Moments, weigh: Weigh = plainly) -> float:
    """``tr(G Eᵀ C E)``.

    Args:
        error: ``E[m, n]``.
        moments: C of the inputs.
        weigh: multiplies with Lᵀ.
    """
    return max(_total(np.asarray(error, np.float64), moments, weigh), 0.0)


def felt_tails(matrix: Array, vectors: Array, moments: Moments, weigh: Weigh = plainly) -> Float64:
    """``tr(G Eᵀ C E)`` of ``E = W (1 − V_r V_rᵀ)`` for every rank r, from a few products.

    With ``M = Wᵀ C W`` it is ``tr(G M) − 2 Σ_{i≤r} vᵢᵀ G M vᵢ + Σ_{i,j≤r} (VᵀGV)ᵢⱼ (VᵀMV)ᵢⱼ``.

    Args:
        matrix: ``W[m, n]``.
        vectors: ``V[n, k]``, orthonormal columns or zeros, to the rounding of float32 at least.
        moments: C of the inputs, which need not be those that V was found with.
        weigh: multiplies with Lᵀ.

    Returns:
        shape [k + 1], for r = 0…k; never rising.
    """
    exact = np.asarray(matrix, np.float64)
    basis = np.asarray(vectors, np.float64)
    if vectors.dtype != np.float64:
        # One step of Newton and Schulz: orthonormal to the square of the rounding.
        basis = basis @ (1.5 * np.eye(basis.shape[1]) - 0.5 * (basis.T @ basis))
    made = moments.applied(exact)  # C W
    turned, felt = weigh(exact.T), weigh(basis)  # (W L)ᵀ and Lᵀ V: a product each, where G has two
    inner = made @ basis  # C W V
    total = _total(exact, moments, weigh, made, turned)
    crossed = np.cumsum(np.einsum("nk,nk->k", felt, turned @ inner))
    both = (felt.T @ felt) * ((exact @ basis).T @ inner)
    kept = np.cumsum(2.0 * np.tril(both, -1).sum(axis=1) + both.diagonal())
    tails = np.concatenate([[total], total - 2.0 * crossed + kept])
    tails = np.minimum.accumulate(tails)
    return np.where(tails > _ROUNDING * max(total, 0.0), tails, 0.0)


def _total(
    exact: Float64,
    moments: Moments,
    weigh: Weigh,
    made: Float64 | None = None,
    turned: Float64 | None = None,
) -> float:
    """``tr(G Wᵀ C W)`` of ``W[m, n]``, by the smaller side.

    Args:
        exact: W.
        moments: C of the inputs.
        weigh: multiplies with Lᵀ.
        made: ``C W``, where it is known.
        turned: ``Lᵀ Wᵀ``, where it is known.
    """
    m, n = exact.shape
    turned = weigh(exact.T) if turned is None else turned
    if weigh is plainly or n <= m:
        made = moments.applied(exact) if made is None else made
        return float(np.vdot(weigh(made.T), turned))
    return float(np.vdot(moments.applied(turned.T), turned.T))
