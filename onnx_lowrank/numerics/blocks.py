"""Integers of 4, 6 or 8 bits in blocks: codes of a matrix with one scale for a few of its rows.

``W[i, j] ≈ s[i // block, j] · (q[i, j] − z[i // block, j])``, the blockwise form of ONNX's
DequantizeLinear (opset 21) along axis 0, the axis that a product ``x·W`` sums over.  Symmetric
codes are signed and have no z; asymmetric ones are unsigned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from onnx_lowrank.numerics.arrays import Array

__all__ = ["Bits", "Blocks", "levels", "pack4", "round_blocks", "unpack4"]

Bits = Literal[4, 6, 8]
Float64 = npt.NDArray[np.float64]
Codes = npt.NDArray[np.integer[Any]]

# Ranges to try, as shares of the largest magnitude of a block: with few levels it pays to clip.
_CLIPS: dict[int, Float64] = {
    4: np.linspace(1.0, 0.6, 17),
    6: np.linspace(1.0, 0.8, 9),
    8: np.linspace(1.0, 0.9, 5),
}
# Least weight of a row, as a share of the largest weight.
_LEAST = 1e-6
# Smallest range of a block; what is below it is 0.
_TINY = np.finfo(np.float32).smallest_normal
# Scale of a block of zeros, at most: kernels take zero points away from sums of codes in floats,
# and what that rounds is multiplied by the scale.
_OF_ZEROS = 2.0**-14  # the smallest that float16 holds in full
# Scales are kept in float16 while none is below its smallest normal number or above its largest.
_HALF = np.finfo(np.float16)


@dataclass(frozen=True, eq=False)
class Blocks:
    """A matrix of integer codes with scales.

    Attributes:
        codes: q[m, n], one element for each code: int8 if symmetric, else uint8.
        scales: s[⌈m / block⌉, n], above 0, float16 or float32.
        zeros: z of the same shape, uint8; None where symmetric.
        bits: of a code.
        block: rows that share a scale; the last block may have fewer.
    """

    codes: Codes
    scales: npt.NDArray[np.float16] | npt.NDArray[np.float32]
    zeros: npt.NDArray[np.uint8] | None
    bits: Bits
    block: int

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the matrix."""
        m, n = self.codes.shape
        return m, n

    @property
    def nbytes(self) -> int:
        """Bytes of the packed codes, the scales and the zero points."""
        zeros = 0 if self.zeros is None else -(-self.zeros.size * self.bits // 8)
        return -(-self.codes.size * self.bits // 8) + self.scales.nbytes + zeros

    def values(self) -> npt.NDArray[np.float32]:
        """The matrix that the codes stand for, as a runtime computes it in float32."""
        whole = self.codes.astype(np.float32)
        if self.zeros is not None:
            whole -= self._rows(self.zeros).astype(np.float32)
        whole *= self._rows(self.scales).astype(np.float32)
        return whole

    def _rows(self, array: Array) -> Array:
        return np.repeat(array, self.block, axis=0)[: len(self.codes)]


def levels(bits: Bits, symmetric: bool) -> tuple[int, int]:
    """The least code and the largest one."""
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if symmetric else (0, (1 << bits) - 1)


def round_blocks(
    matrix: Array,
    bits: Bits,
    block: int,
    *,
    weights: Float64 | None = None,
    symmetric: bool = True,
    one: bool = False,
) -> Blocks:
    """Round to nearest; of several ranges each block takes the one with the least error.

    Args:
        matrix: ``W[m, n]``, finite.
        bits: of a code.
        block: rows that share a scale; above m it is m.
        weights: weight of each row's square error, shape [m], such as the diagonal of C; default:
            all equal.
        symmetric: False gives each block a zero point.
        one: whether all of the matrix shares one scale, whatever the block.

    Raises:
        ValueError: the matrix is empty, or the block is below 1.
    """
    m, n = matrix.shape
    if not m or not n or block < 1:
        raise ValueError(f"expected a matrix and a block of 1 row or more, got {m}×{n}, {block}")
    if one:
        each = None if weights is None else np.repeat(weights, n)
        column = np.asarray(matrix).reshape(-1, 1)
        flat = round_blocks(column, bits, m * n, weights=each, symmetric=symmetric)
        each_zero = None if flat.zeros is None else flat.zeros.repeat(n).reshape(1, n)
        each_scale = flat.scales.repeat(n).reshape(1, n)
        return Blocks(flat.codes.reshape(m, n), each_scale, each_zero, bits, m)
    block = min(block, m)
    groups = -(-m // block)
    stack = np.zeros((groups * block, n), np.float32)
    stack[:m] = matrix
    stack = stack.reshape(groups, block, n)
    counts = np.zeros(groups * block, np.float32)
    counts[:m] = 1.0
    if weights is not None and np.max(weights) > 0.0:  # an input that is always 0 counts a little
        counts[:m] = np.maximum(weights / np.max(weights), _LEAST)
    counts = counts.reshape(groups, block, 1)
    low, high = levels(bits, symmetric)
    smallest = np.minimum(stack.min(axis=1), 0.0)
    largest = np.maximum(stack.max(axis=1), 0.0)
    if symmetric:
        # A little beyond the positive end: it is met half a step early, the negative one exactly.
        reach = np.maximum(-smallest, largest) / (high + 0.5)
    else:
        reach = (largest - smallest) / high
    reach = np.where(reach < _TINY, np.float32(0.0), reach)  # its inverse would overflow
    none = min(_OF_ZEROS, float(reach.min(initial=_OF_ZEROS, where=reach > 0.0)))
    scales = np.full((groups, n), none, np.float32)
    zeros = np.zeros((groups, n), np.float32)
    codes = np.zeros(stack.shape, np.float32)
    best = np.full((groups, n), np.inf, np.float32)
    # Errors in units of each block's range: their squares stay within float32.
    unit = np.divide(1.0, reach, out=np.zeros_like(reach), where=reach > 0.0)[:, None]
    half = _fits_half(reach * _CLIPS[bits].min(), reach)
    for clip in _CLIPS[bits]:
        scale = np.where(reach > 0.0, reach * np.float32(clip), none).astype(np.float32)
        if half:
            scale = scale.astype(np.float16).astype(np.float32)
        zero = np.zeros_like(scale) if symmetric else np.clip(np.rint(-smallest / scale), 0, high)
        found = np.clip(np.rint(stack / scale[:, None]) + zero[:, None], low, high)
        off = ((found - zero[:, None]) * scale[:, None] - stack) * unit
        error = (off * off * counts).sum(axis=1)
        better = error < best
        best = np.where(better, error, best)
        scales, zeros = np.where(better, scale, scales), np.where(better, zero, zeros)
        codes = np.where(better[:, None], found, codes)
    return Blocks(
        codes=codes.reshape(-1, n)[:m].astype(np.int8 if symmetric else np.uint8),
        scales=scales.astype(np.float16) if half else scales,
        zeros=None if symmetric else zeros.astype(np.uint8),
        bits=bits,
        block=block,
    )


def _fits_half(least: Array, most: Array) -> bool:
    """Whether scales between these keep their digits in float16; those of zeros do not count."""
    known = least[most > 0.0]
    if not known.size:
        return True
    return bool(known.min() >= float(_HALF.smallest_normal) and most.max() <= float(_HALF.max))


def pack4(codes: Codes) -> npt.NDArray[np.uint8]:
    """Two codes of 4 bits in each byte, in row-major order, the first one in its low half.

    Returns:
        shape [⌈size / 2⌉]; a code that is left over has 0 beside it.
    """
    flat = codes.reshape(-1).astype(np.uint8) & 0xF
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    return np.asarray(flat[::2] | flat[1::2] << 4, np.uint8)


def unpack4(packed: npt.NDArray[np.uint8], shape: tuple[int, ...], *, signed: bool) -> Codes:
    """What `pack4` packed, in a shape."""
    flat = np.stack([packed & 0xF, packed >> 4], axis=1).reshape(-1)[: int(np.prod(shape))]
    if not signed:
        return flat.reshape(shape)
    return np.where(flat > 7, flat.astype(np.int16) - 16, flat).astype(np.int8).reshape(shape)
