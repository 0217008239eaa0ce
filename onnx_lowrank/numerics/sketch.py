"""Leading components from a few products with a block of vectors, where a few hold enough.

Subspace iteration from a random start (N. Halko, P. G. Martinsson, J. A. Tropp, SIAM Review 53,
2011, algorithm 4.4) with a width that grows until it holds what is asked for.  With Q orthonormal,
``‖W − QQᵀW‖² = ‖W‖² − ‖QᵀW‖²``, and singular values of ``QᵀW`` are never above those of W: the
energy that is found is a lower bound, however good the sketch is, and ``‖W‖²`` less that energy is
lost.  The search ends where one more product changes the loss by less than `_SETTLED`.  All
products are in float32, whose rounding is far below the loss at which a sketch is accepted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.components import Basis
from onnx_lowrank.numerics.spectrum import squared_norm

__all__ = ["Sketch", "sketch"]

Float64 = npt.NDArray[np.float64]

# Columns to begin with, and how many there are beside those that are asked for.
_START, _BESIDE = 40, 8
# Share of the smaller side beyond which one reduction of the Gram matrix is sooner done.
_WIDEST = 0.125
# Below this side the Gram matrix is sooner done than looking for something else.
_SMALL = 512
# Passes with one width.
_PASSES = 5
# Change of the lost energy by one more product, as a share of it, that is none.
_SETTLED = 1e-3
# Lost energy, as a share of the total, that float32 tells from rounding.
_LEAST = 1e-4
# Energies above it are beyond products in float32.
_LARGEST = 1e36


@dataclass(frozen=True, eq=False)
class Sketch:
    """What was found.

    Attributes:
        squares: energies of the leading components, falling; each at most the true one.
        rest: energy outside of them.
        basis: the components.
    """

    squares: Float64
    rest: float
    basis: Basis


def sketch(
    matrix: Array, *, energy: float | None = None, rank: int | None = None, seed: int = 0
) -> Sketch | None:
    """The leading components of ``W[m, n]``; None where a sketch does not find them quickly.

    Args:
        matrix: W; may be a memory-mapped view.
        energy: the share of ``‖W‖²`` that they have to hold, or
        rank: how many there have to be.
        seed: of the start.

    Returns:
        at least the components that are needed; None where these are too many, lose too little
        to be told from rounding, or are not settled soon, and where W is small, in float64, not
        finite, or above 1e18.
    """
    if matrix.dtype == np.float64 or min(matrix.shape) < _SMALL:
        return None
    widest = int(_WIDEST * min(matrix.shape))
    start = _START if rank is None else rank + _BESIDE
    if start > widest:
        return None
    total = squared_norm(matrix)
    if not 0.0 < total < _LARGEST:
        return None
    transposed = matrix.shape[0] < matrix.shape[1]
    tall = np.asarray(matrix.T if transposed else matrix, np.float32)
    rng = np.random.default_rng(seed)
    vectors = _random(rng, tall.shape[1], start)
    known: Float64 | None = None
    passes = needed = 0
    while passes < _PASSES:
        made = tall @ vectors
        if known is not None:
            # What the projection on these vectors holds: more than the last pass knew of.
            held = np.einsum("mk,mk->k", made, made, dtype=np.float64)
            lost = total - float(held[:needed].sum())
            if lost < _LEAST * total:
                return None
            if float((held - known)[:needed].sum()) <= _SETTLED * lost:
                kept = needed + _BESIDE // 2
                squares = np.minimum.accumulate(held[:kept])
                rest = max(total - float(squares.sum()), 0.0)
                return Sketch(squares, rest, Basis(vectors[:, :kept].copy(), transposed))
        left, _ = np.linalg.qr(made)
        made = tall.T @ left
        if not passes and rank is None:
            # About what is known after this pass; enough to see that too many are needed.
            rough = np.linalg.eigvalsh((made.T @ made).astype(np.float64))[::-1]
            if _needed(rough, total, energy or 1.0) + _BESIDE > widest:
                return None
        right, corner = np.linalg.qr(made)
        turn, values, _ = np.linalg.svd(corner)
        known, vectors = values.astype(np.float64) ** 2, right @ turn
        passes += 1
        needed = rank or _needed(known, total, energy or 1.0)
        width = len(known)
        if needed + _BESIDE > widest:
            return None
        if needed + _BESIDE > width:
            wider = min(max(2 * width, needed + needed // 8 + _BESIDE), widest)
            vectors = np.hstack([vectors, _random(rng, tall.shape[1], wider - width)])
            known, passes = None, 0
    return None


def _needed(squares: Float64, total: float, energy: float) -> int:
    """How many components hold a share of the energy; where too few are known at least so many."""
    lost = total - np.cumsum(squares)
    limit = (1.0 - energy) * total
    enough = np.flatnonzero(lost <= limit)
    if len(enough):
        return int(enough[0]) + 1
    # Values fall; the last ones of an early pass are too small, those in the middle are not.
    typical = max(float(squares[len(squares) // 2]), 1e-12 * total)
    return len(squares) + 1 + int((lost[-1] - limit) / typical)


def _random(rng: np.random.Generator, rows: int, columns: int) -> Array:
    return rng.standard_normal((rows, columns), np.float32) / np.float32(np.sqrt(rows))
