"""Rounding whose errors are compensated: GPTQ on the second moments of the inputs.

E. Frantar, S. Ashkboos, T. Hoefler, D. Alistarh, "GPTQ: accurate post-training quantization for
generative pre-trained transformers", ICLR 2023.  The rows of ``W[m, n]`` are rounded one after the
other; the error of a row is spread over the rows that are not rounded yet, such that
``E‖x (W − Ŵ)‖²`` under ``C = E[xᵀ x]`` stays least.  With ``C⁻¹ = Uᵀ U``, U upper triangular, row i
off by e takes ``e / U[i, i] · U[i, j]`` off each later row j.

The inputs with the largest mean square are first, when most rows can still compensate them.  The
scales are those of the plain matrix, so that the blocks stay blocks in the file (“static groups”).
Codes and scales are then found again given all others (`onnx_lowrank.numerics.code_descent`), which
takes another 8 to 40 % off the error of weights of 4 bits.

All of it is in float32.  Neither the scale of C nor that of a column of W changes the codes: both
are brought near 1 by powers of two where squares could leave the range of float32.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import scipy.linalg

from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.blocks import Bits, Blocks, levels, round_blocks
from onnx_lowrank.numerics.code_descent import descended
from onnx_lowrank.numerics.moments import Moments
from onnx_lowrank.numerics.spectrum import unit

__all__ = ["Inverse", "gptq"]

Float64 = npt.NDArray[np.float64]

# What is added to the diagonal of C, as a share of its mean.
_DAMPING = 0.01
# Rows after which their errors are spread over all later rows in one product.
_PANEL = 128
# Columns whose largest magnitude is between 2**-30 and 2**30 stay as they are; then a scale below
# 2**-60, of a block that counts nothing beside its column, is that.
_SAFE_EXPONENT, _LEAST_SCALE = 30, np.float32(2.0**-60)


class Inverse:
    """What rounding needs of the moments C, for any number of weights with the same inputs.

    Attributes:
        weights: the diagonal of C, shape [m].
        order: of the rows, those with the largest weight first.
        upper: U with ``C⁻¹ = Uᵀ U`` in that order; None where every row is on its own: only the
            diagonal of C is kept, or it is 0.
        second: C, times a power of two where it is far from 1.
        damping: what is added to its diagonal.
    """

    def __init__(self, moments: Moments) -> None:
        known = moments.second if moments.diagonal else np.diagonal(moments.second)
        size = unit(known, np.float32)
        self.second = second = moments.second if size == 1.0 else moments.second * size
        self.damping = 0.0
        self.weights = np.maximum(second if moments.diagonal else np.diagonal(second), 0.0)
        self.order = np.argsort(-self.weights, kind="stable")
        self.upper: npt.NDArray[np.float32] | None = None
        if not moments.diagonal and self.weights.max() > 0.0:
            self.damping = _DAMPING * float(np.trace(second)) / len(second)
            self.upper = _inverse_root(second, self.order, self.damping)


def gptq(
    matrix: Array,
    moments: Moments | Inverse,
    bits: Bits,
    block: int,
    *,
    symmetric: bool = True,
    one: bool = False,
) -> Blocks:
    """Codes of a matrix for inputs with known second moments.

    Args:
        matrix: ``W[m, n]``, finite.
        moments: C of its inputs, shrunk where there are few rows (see `Moments.fitting`), or what
            is needed of it.  Where only the diagonal is kept rows are rounded to nearest.
        bits: of a code.
        block: rows that share a scale.
        symmetric: False gives each block a zero point.
        one: whether all of the matrix shares one scale.

    Raises:
        ValueError: as `round_blocks`.
    """
    known = moments if isinstance(moments, Inverse) else Inverse(moments)
    grid = round_blocks(matrix, bits, block, weights=known.weights, symmetric=symmetric, one=one)
    if known.upper is None:
        return grid
    sizes = _sizes(matrix, one)
    if grid.scales.dtype == np.float16 or (sizes == 1.0).all():
        return _compensated(matrix, known, known.upper, grid, one)
    scales = np.maximum((grid.scales * sizes).astype(np.float32), _LEAST_SCALE)
    near = np.asarray(matrix, np.float64) * sizes
    found = _compensated(near, known, known.upper, replace(grid, scales=scales), one)
    return replace(found, scales=(found.scales / sizes).astype(np.float32))


def _sizes(matrix: Array, one: bool) -> Float64:
    """A power of two for each column, which brings it near 1; 1 where it is not far from that."""
    most = np.maximum(matrix.max(axis=0), -matrix.min(axis=0)).astype(np.float64)
    exponents = np.frexp(np.full_like(most, most.max()) if one else most)[1]
    return np.ldexp(1.0, np.where(np.abs(exponents) > _SAFE_EXPONENT, -exponents, 0))


def _compensated(
    matrix: Array, known: Inverse, upper: npt.NDArray[np.float32], grid: Blocks, one: bool
) -> Blocks:
    """Codes for given scales, each rounded for what those before it are off; then found again."""
    bits, symmetric, order = grid.bits, grid.zeros is None, known.order
    rest = np.asarray(matrix, np.float64)[order].astype(np.float32)
    scales = grid.scales.astype(np.float32)[order // grid.block]
    zeros = None if grid.zeros is None else grid.zeros.astype(np.float32)[order // grid.block]
    low, high = levels(bits, symmetric)
    codes = np.empty(rest.shape, grid.codes.dtype)
    for start in range(0, len(rest), _PANEL):
        end = min(start + _PANEL, len(rest))
        off = np.empty((end - start, rest.shape[1]), np.float32)
        for row in range(start, end):
            zero = np.float32(0.0) if zeros is None else zeros[row]
            code = np.clip(np.rint(rest[row] / scales[row]) + zero, low, high)
            codes[row] = code
            wrong = (rest[row] - (code - zero) * scales[row]) / upper[row, row]
            rest[row + 1 : end] -= upper[row, row + 1 : end, None] * wrong
            off[row - start] = wrong
        rest[end:] -= upper[start:end, end:].T @ off
    found = np.empty_like(codes)
    found[order] = codes
    blocks = Blocks(found, grid.scales, grid.zeros, bits, grid.block)
    return descended(matrix, known.second, blocks, damping=known.damping, one=one)


def _inverse_root(
    second: Float64, order: npt.NDArray[np.intp], damping: float
) -> npt.NDArray[np.float32]:
    """U, upper triangular, with ``C⁻¹ = Uᵀ U``, of damped C with rows and columns in an order."""
    damped = second[np.ix_(order, order)]
    damped[np.diag_indices(len(damped))] += damping
    # With rows and columns reversed C = L Lᵀ; turned back that is C = R Rᵀ with R upper triangular,
    # and U = R⁻¹: one factorization, and no inverse of C.
    lower = scipy.linalg.cholesky(damped[::-1, ::-1], lower=True, check_finite=False)
    size = len(damped)
    inverse = scipy.linalg.solve_triangular(
        lower[::-1, ::-1], np.eye(size), lower=False, check_finite=False
    )
    return np.asarray(inverse, np.float32)
