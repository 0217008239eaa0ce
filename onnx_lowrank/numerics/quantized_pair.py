"""Pairs of few bits: A is rounded, B is fitted to the rounded A, then B is rounded.

For inputs with moments C the best second factor behind a first one Â is the regression of ``x W``
on ``x Â``, ``B = (Âᵀ C Â + λI)⁻¹ (Âᵀ C W + λB₀)``, and the moments of what B is multiplied with are
``Âᵀ C Â``: B is rounded by GPTQ on those.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg

from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.blocks import Bits, Blocks, round_blocks
from onnx_lowrank.numerics.gptq import Inverse, gptq
from onnx_lowrank.numerics.moments import Moments

__all__ = ["refitted_second", "rounded", "rounded_second"]

# λ as a share of the mean square of a channel of the bottleneck; keeps B₀ where no sample decides.
_RIDGE = 1e-4


def rounded(
    matrix: Array,
    moments: Moments | Inverse | None,
    bits: Bits,
    block: int,
    *,
    one: bool = False,
    zeros: bool = False,
) -> Blocks:
    """Codes of a weight, or of a first factor.

    Args:
        matrix: ``A[m, k]``.
        moments: C of the inputs; None rounds to nearest.
        bits: of a code.
        block: rows that share a scale.
        one: whether all of the matrix shares one scale.
        zeros: whether each block has a zero point.
    """
    if moments is None:
        return round_blocks(matrix, bits, block, symmetric=not zeros, one=one)
    return gptq(matrix, moments, bits, block, symmetric=not zeros, one=one)


def rounded_second(
    matrix: Array,
    first: Array,
    second: Array,
    moments: Moments | None,
    bits: Bits,
    block: int,
    *,
    one: bool = False,
    zeros: bool = False,
) -> Blocks:
    """Codes of a second factor that is fitted to its first one as it is.

    Args:
        matrix: ``W[m, n]`` that the pair stands for.
        first: ``Â[m, k]``, what the codes of the first factor stand for.
        second: ``B[k, n]``, which what no sample tells apart is left at.
        moments: C of the inputs; None fits to the weight and rounds to nearest.
        bits: of a code.
        block: rows that share a scale.
        one: whether all of the factor shares one scale.
        zeros: whether each block has a zero point.
    """
    fitted = refitted_second(matrix, first, second, moments)
    if moments is None:
        return round_blocks(fitted, bits, block, symmetric=not zeros, one=one)
    return gptq(fitted, moments.through(first), bits, block, symmetric=not zeros, one=one)


def refitted_second(matrix: Array, first: Array, second: Array, moments: Moments | None) -> Array:
    """The best second factor for a given first one, shape [k, n], float64.

    Args:
        matrix: ``W[m, n]``.
        first: ``Â[m, k]``.
        second: ``B₀[k, n]``, which the ridge draws to.
        moments: C of the inputs; None fits to the weight.
    """
    a = np.asarray(first, np.float64)
    felt = a if moments is None else moments.applied(a)
    gram = a.T @ felt
    ridge = _RIDGE * float(np.trace(gram)) / max(len(gram), 1)
    if not ridge > 0.0:
        return np.asarray(second, np.float64)
    gram[np.diag_indices(len(gram))] += ridge
    wanted = felt.T @ np.asarray(matrix, np.float64) + ridge * np.asarray(second, np.float64)
    return np.asarray(scipy.linalg.solve(gram, wanted, assume_a="pos", check_finite=False))
