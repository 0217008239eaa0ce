"""Codes and scales that are found again, each one given all others: coordinate descent.

GPTQ decides about every row once, when most other rows are not rounded yet, with scales of the
plain matrix.  Behind it ``E‖x (W − Ŵ)‖² = tr(EᵀCE)`` still falls by going through the rows again:
given all other rows the best code of row i is that of ``ŵ_i + (C E)_i / C_ii`` to nearest
(K. Behdin et al., "QuantEase", 2023), and given the codes ``q`` of a block its best scale moves by
``qᵀ(C E) / qᵀCq``.  Neither ever raises the error under the C that it is done with.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.blocks import Blocks, levels

__all__ = ["descended"]

Float32 = npt.NDArray[np.float32]

# Times that all rows are gone through, and the least gain of one time that is worth another.
_SWEEPS, _GAIN = 4, 0.02
# Rows whose changes reach the others in one product.
_PANEL = 32


def descended(
    matrix: Array,
    second: Array,
    blocks: Blocks,
    *,
    damping: float = 0.0,
    one: bool = False,
) -> Blocks:
    """Better codes and scales of the same matrix; zero points stay.

    Args:
        matrix: ``W[m, n]``.
        second: ``C[m, m]`` of the inputs.
        blocks: codes of the matrix to start with.
        damping: added to the diagonal of C.
        one: whether all of the matrix shares one scale.
    """
    m, block = len(matrix), blocks.block
    codes, scales = blocks.codes.astype(np.float32), blocks.scales.astype(np.float32)
    low, high = (np.full_like(scales, end) for end in levels(blocks.bits, blocks.zeros is None))
    if blocks.zeros is not None:  # codes are counted from it
        zeros = blocks.zeros.astype(np.float32)
        low, high = low - zeros, high - zeros
        codes -= np.repeat(zeros, block, axis=0)[:m]
    off = np.asarray(matrix, np.float32) - codes * np.repeat(scales, block, axis=0)[:m]
    felt = np.zeros_like(off)  # C E
    for rows in _parts(0, m, _PANEL):
        felt += _columns(second, rows, damping) @ off[rows]
    error = float(np.vdot(off, felt))
    for _ in range(_SWEEPS):
        before = error
        for group, whole in enumerate(_parts(0, m, block)):
            ends = low[group], high[group]
            for rows in _parts(whole.start, whole.stop, _PANEL):
                columns = _columns(second, rows, damping)
                moved = _recoded(codes[rows], felt[rows], columns[rows], scales[group], ends)
                felt -= columns @ moved
                off[rows] -= moved
            own = codes[whole]
            columns = _columns(second, whole, damping)
            change = _rescaled(
                (own * felt[whole]).sum(axis=0),
                (own * (columns[whole] @ own)).sum(axis=0),
                scales[group],
                half=blocks.scales.dtype == np.float16,
                one=one,
            )
            scales[group] += change
            moved = own * change
            felt -= columns @ moved
            off[whole] -= moved
        error = float(np.vdot(off, felt))
        if not error < (1.0 - _GAIN) * before:
            break
    if blocks.zeros is not None:
        codes += np.repeat(zeros, block, axis=0)[:m]
    return replace(
        blocks,
        codes=codes.astype(blocks.codes.dtype),
        scales=scales.astype(np.float16) if blocks.scales.dtype == np.float16 else scales,
    )


def _parts(start: int, stop: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]


def _columns(second: Array, rows: slice, damping: float) -> Float32:
    """Columns of C in float32, with what is added to the diagonal."""
    found = second[:, rows].astype(np.float32)
    places = np.arange(rows.start, rows.stop)
    found[places, places - rows.start] += np.float32(damping)
    return found


def _recoded(
    codes: Float32,
    felt: Float32,
    second: Float32,
    scale: Float32,
    ends: tuple[Float32, Float32],
) -> Float32:
    """Take the best codes of rows one after the other, in place; what is added to their values.

    Args:
        codes: of the rows, shape [p, n].
        felt: ``C E`` of the rows.
        second: C between the rows, shape [p, p].
        scale: of the rows, shape [n].
        ends: the least code and the largest one, shape [n] each.
    """
    felt = felt.copy()
    moved = np.zeros_like(felt)
    for row, weight in enumerate(second.diagonal()):
        if not weight > 0.0:
            continue  # an input that is always 0
        best = np.rint(codes[row] + felt[row] / (weight * scale))
        np.clip(best, *ends, out=best)
        np.multiply(best - codes[row], scale, out=moved[row])
        codes[row] = best
        felt[row + 1 :] -= second[row + 1 :, row, None] * moved[row]
    return moved


def _rescaled(along: Float32, square: Float32, scale: Float32, *, half: bool, one: bool) -> Float32:
    """What is added to the scale of each column, shape [n]; 0 where that gains nothing.

    Args:
        along: ``qᵀ(C E)``, shape [n].
        square: ``qᵀCq``, shape [n].
        scale: as it is, shape [n].
        half: whether it is kept in float16.
        one: whether all columns have the same.
    """
    if one:
        along, square = (np.full_like(part, part.sum()) for part in (along, square))
    best = scale + np.divide(along, square, out=np.zeros_like(along), where=square > 0.0)
    best = np.clip(best, 0.5 * scale, 2.0 * scale)  # never 0, nor another sign
    if half:
        with np.errstate(over="ignore"):
            best = best.astype(np.float16).astype(np.float32)
    change = best - scale
    with np.errstate(over="ignore", invalid="ignore"):
        gains = change * (2.0 * along - change * square) > 0.0
    return np.asarray(np.where(gains & np.isfinite(best), change, 0.0), np.float32)
