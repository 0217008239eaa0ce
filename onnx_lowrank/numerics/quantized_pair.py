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
from onnx_lowrank.numerics.gptq import gptq
from onnx_lowrank.numerics.moments import Moments

__all__ = ["quantized_pair", "refitted_second"]

# λ as a share of the mean square of a channel of the bottleneck; keeps B₀ where no sample decides.
_RIDGE = 1e-4


def quantized_pair(
    matrix: Array, first: Array, second: Array, moments: Moments | None, bits: Bits, block: int
) -> tuple[Blocks, Blocks]:
    """Codes of both factors of a pair.

    Args:
        matrix: ``W[m, n]`` that the pair stands for.
        first: ``A[m, k]``.
        second: ``B[k, n]``.
        moments: C of the inputs, centred and shrunk; None rounds both to nearest, B refitted to
            the weight.
        bits: of a code.
        block: rows that share a scale.
    """
    if moments is None:
        codes = round_blocks(first, bits, block)
        b = refitted_second(matrix, codes.values(), second, None)
        return codes, round_blocks(b, bits, block)
    codes = gptq(first, moments, bits, block)
    rounded = codes.values().astype(np.float64)
    b = refitted_second(matrix, rounded, second, moments)
    hidden = rounded.T @ moments.applied(rounded)
    inner = Moments(hidden, moments.mean @ rounded, moments.rows)
    return codes, gptq(b, inner, bits, block)


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
