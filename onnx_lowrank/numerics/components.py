"""Principal components: of a weight by itself, or of its outputs on given inputs.

By Eckart and Young (Psychometrika 1, 1936) the rank-k matrix closest to W in the Frobenius norm is
``(W V) Vᵀ`` with V the k leading eigenvectors of ``WᵀW``, which needs no inverse and stays exact
however small the singular values are; of the outputs of inputs with ``C = E[xᵀx]`` it is the same
with those of ``WᵀCW``.  Where the other side is the smaller one its eigenvectors are taken: of the
weight by itself those of ``WWᵀ``, as the transpose has the same pair the other way round; of
outputs, with any ``C = R Rᵀ``, the eigenvectors u of ``Rᵀ W Wᵀ R`` give ``v = Wᵀ R u / σ``.

The energies are computed first, the vectors once a rank is known (`onnx_lowrank.numerics.lapack`).
Where one share of the energy or one rank is all that is asked about, both are first tried in
float32, which takes half the time and half the memory.  Its rounding moves the energy outside of
the first k components by less than `SURE` (tests hold a quarter of that), so that a rank whose
energy, and that of the rank below, are further than that from the share is the rank of float64.
For any other the energies are taken again, in float64, from the vectors that float32 gave: what
errors of vectors change of them is of second order (Golub & Van Loan, §8.1), below `FINE`.  Only a
share that is nearer than that to the energy of a rank has all of the work done in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.engine import PROCESSOR, Engine, Reduced
from onnx_lowrank.numerics.moments import Moments
from onnx_lowrank.numerics.rotation import rotated_first, rotated_second
from onnx_lowrank.numerics.spectrum import row_blocks, squared_norm, unit

__all__ = ["FINE", "NOISE", "SURE", "Basis", "Components"]

Float64 = npt.NDArray[np.float64]

SURE = 2e-6, 2e-5
"""How far rounding in float32 may move a sum of energies, as a share of all and of the largest."""
FINE = 1e-7
"""The same for energies of float32's vectors, as a share of all."""
NOISE = 2e-6
"""Energy that float32 does not tell from rounding, as a share of the largest."""
# Lost energy, as a share of all, below which float32 is not tried.
_LEAST = 1e-3
# Sums of squares between which float32 neither overflows nor loses what counts.
_SMALLEST, _LARGEST = 1e-20, 1e30


@dataclass(frozen=True, eq=False)
class Basis:
    """Leading components of a map ``W[m, n]``.

    Attributes:
        vectors: ``V[n, k]``, orthonormal columns, or zeros for a component without energy; of the
            transpose ``[m, k]``.
        transposed: whether they are those of ``Wᵀ``.
    """

    vectors: Array
    transposed: bool = False

    @property
    def rank(self) -> int:
        """How many components there are."""
        return int(self.vectors.shape[1])

    def narrow(self) -> Basis:
        """The same in float32, for factors that are stored in float32 or less."""
        return Basis(np.ascontiguousarray(self.vectors, np.float32), self.transposed)

    def pair(
        self, matrix: Array, rank: int, dtype: npt.DTypeLike, engine: Engine = PROCESSOR
    ) -> tuple[Array, Array]:
        """``A[m, k]`` and ``B[k, n]`` with ``A @ B`` closest to W, balanced and rotated.

        The square root of the singular values goes into each factor, so that both have the same
        scale and survive a cast to float16; the rank axis is rotated, so that all of its channels
        have (see `onnx_lowrank.numerics.rotation`).
        """
        tall = matrix.T if self.transposed else matrix
        # Float32 is enough for what is stored in no more than that.
        work = np.promote_types(self.vectors.dtype, np.float32)
        if np.dtype(dtype) == np.float64:
            work = np.dtype(np.float64)
        vectors = self.vectors[:, :rank].astype(work, copy=False)
        projected = np.empty((len(tall), rank), work)
        for block in row_blocks(*tall.shape):
            projected[block] = engine.product(np.asarray(tall[block], work), vectors)
        # The columns of W V are U Σ: their norms are the singular values.
        safe = unit(projected, work)
        scale = np.sqrt(np.linalg.norm(projected * safe if safe != 1.0 else projected, axis=0))
        scale = scale / math.sqrt(safe)
        inverse = np.divide(1.0, scale, out=np.zeros_like(scale), where=scale > 0)
        first, second = projected * inverse, vectors * scale
        if self.transposed:
            first, second = second, first
        first, second = rotated_first(first), rotated_second(second.T)
        return first.astype(dtype, copy=False), second.astype(dtype, copy=False)


class Components:
    """The components of a matrix ``W[m, n]``.

    Attributes:
        squares: energy of each, falling, shape [min(m, n)]: squared singular values of W, or of
            ``√C W``.  Values below the rounding error are exactly 0.  Of a float64 weight whose
            squares leave the range of float64 they are in another unit (see
            `onnx_lowrank.numerics.spectrum.unit`).
    """

    squares: Float64

    def __init__(
        self,
        matrix: Array,
        moments: Moments | None = None,
        *,
        energy: float | None = None,
        rank: int | None = None,
        beside: float = 0.0,
        engine: Engine = PROCESSOR,
    ) -> None:
        """Find the energies.

        Args:
            matrix: W, finite; may be a memory-mapped view.
            moments: C of the inputs; None takes the weight by itself.
            energy: the only share of the energy that is asked about, if so, or
            rank: the only number of components that is.  The energies are then those of float32
                where these tell it: those that it does not tell from rounding share what is left.
            beside: energy that any rank holds beside that of the components.
            engine: does the work, but for a float64 weight by itself.
        """
        self._matrix, self._engine = matrix, engine
        self._reduced: Reduced | None = None
        self._root: Float64 | None = None
        self._plain = moments is None
        m, n = matrix.shape
        if min(m, n) == 0:
            self.squares = np.zeros(0)
            return
        if moments is None and matrix.dtype == np.float64:
            values = np.linalg.svd(matrix, compute_uv=False) * unit(matrix)
            floor = max(m, n) * np.finfo(np.float64).eps * values[0]
            self.squares = np.where(values > floor, values, 0.0) ** 2
            return
        asked = rank is not None or (energy is not None and 1.0 - energy >= _LEAST)
        if moments is None:
            tall = matrix if m >= n else matrix.T
            if asked and _SMALLEST < squared_norm(matrix) < _LARGEST:
                self._reduce(engine.gram(tall, np.float32))
                if self._told(energy, rank, beside, partial(_weight_energies, tall)):
                    return
            self._reduce(engine.gram(tall))
            return
        square, self._root = _outputs(matrix, moments, engine)
        if asked and _SMALLEST < float(np.trace(square)) < _LARGEST:
            self._reduce(square.astype(np.float32))
            if self._told(energy, rank, beside, partial(_output_energies, square)):
                return
        self._reduce(square)

    def _reduce(self, square: Array) -> None:
        """The energies, by a matrix that they are the eigenvalues of, which is overwritten."""
        self._reduced = None  # an earlier one takes as much memory
        self._reduced = self._engine.reduce(square)
        squares = self._reduced.values()
        largest = max(float(squares[0]), 0.0)
        if square.dtype == np.float32:
            self._floor = NOISE * largest
            small = squares < self._floor
            squares[small] = max(float(squares[small].mean()), 0.0) if small.any() else 0.0
            self.squares = squares
            return
        self._floor = len(squares) * float(np.finfo(np.float64).eps) * largest
        self.squares = np.where(squares > self._floor, squares, 0.0)

    def _told(
        self,
        energy: float | None,
        rank: int | None,
        beside: float,
        energies: Callable[[Float64 | None], Float64],
    ) -> bool:
        """Whether the energies tell what is asked, though they are rounded.

        Args:
            energy: the share, or
            rank: the number.
            beside: energy that any rank holds beside that of the components.
            energies: of orthonormal columns in float64; of None the energy of all.
        """
        if rank is not None:
            tails = _tails(self.squares)
            return bool(self.squares[rank - 1] > self._floor and tails[rank] >= _LEAST * tails[0])
        assert energy is not None
        sure = SURE[0] * float(self.squares.sum()) + SURE[1] * float(self.squares[0])
        needed, near = _needed(self.squares, energy, beside, sure)
        if self.squares[needed - 1] <= self._floor:
            return False
        if not near or self._reduced is None:
            return not near
        # One more than is needed: that may be the rank.
        known = min(needed + 1, len(self.squares))
        vectors = np.asarray(self._reduced.leading(known)[1], np.float64)
        corner = np.linalg.cholesky(vectors.T @ vectors)
        own = energies(np.linalg.solve(corner, vectors.T).T)
        total, rest = float(energies(None)[0]), float(self.squares[known:].sum())
        left = max(total - float(own.sum()), 0.0)
        others = self.squares[known:] * (left / rest if rest > 0.0 else 0.0)
        self.squares = np.concatenate([own, others])
        return not _needed(self.squares, energy, beside, FINE * total)[1]

    @property
    def memory(self) -> int:
        """Bytes that are held for `basis`."""
        reduced = 0 if self._reduced is None else self._reduced.memory
        return reduced + (0 if self._root is None else self._root.nbytes)

    def basis(self, rank: int) -> Basis:
        """The leading components, at most ``min(m, n)``."""
        m, n = self._matrix.shape
        if self._reduced is None:  # a float64 weight, or an empty one
            if m >= n:
                return Basis(np.linalg.svd(self._matrix, full_matrices=False)[2][:rank].T)
            return Basis(np.linalg.svd(self._matrix, full_matrices=False)[0][:, :rank], True)
        values, vectors = self._reduced.leading(rank)
        if self._plain:
            return Basis(vectors, m < n)
        if self._root is None:
            return Basis(vectors)
        inverse = np.zeros(rank)  # from the m×m side: v = Wᵀ R u / σ
        kept = values > self._floor
        inverse[kept] = 1.0 / np.sqrt(values[kept])
        exact = np.asarray(self._matrix, np.float64)
        vectors = np.asarray(vectors, np.float64)
        made = self._engine.product(exact.T, self._engine.product(self._root, vectors))
        return Basis(made * inverse)


def _tails(squares: Float64) -> Float64:
    """The energy outside of the first k, for k from 0, shape [s + 1]."""
    return np.append(np.cumsum(squares[::-1])[::-1], 0.0)


def _needed(squares: Float64, energy: float, beside: float, sure: float) -> tuple[int, bool]:
    """The rank that holds a share, and whether it is not sure: so far may each sum be off."""
    tails = _tails(squares)
    limit = (1.0 - energy) * (tails[0] + beside)
    needed = max(1, int(np.argmax(tails <= limit)))
    return needed, bool((np.abs(tails[needed - 1 : needed + 1] - limit) <= sure).any())


def _weight_energies(tall: Array, columns: Float64 | None) -> Float64:
    """``‖W v‖²`` of every column v; of None ``‖W‖²``, shape [1]."""
    total = np.zeros(1 if columns is None else columns.shape[1])
    for block in row_blocks(*tall.shape):
        part = np.asarray(tall[block], np.float64)
        if columns is None:
            total += np.vdot(part, part)
        else:
            made = part @ columns
            total += np.einsum("ij,ij->j", made, made)
    return total


def _output_energies(square: Float64, columns: Float64 | None) -> Float64:
    """``vᵀ S v`` of every column v; of None the trace of S, shape [1]."""
    if columns is None:
        return np.array([np.trace(square)])
    return np.asarray(np.einsum("ij,ij->j", columns, square @ columns))


def _outputs(matrix: Array, moments: Moments, engine: Engine) -> tuple[Float64, Float64 | None]:
    """``Wᵀ C W`` or, where that is the larger, its m×m counterpart and a root R of C."""
    m, n = matrix.shape
    exact = np.asarray(matrix, np.float64)
    if n <= m:
        return engine.product(exact.T, moments.applied(exact, engine)), None
    root = _root(moments)
    half = engine.product(root.T, exact)  # [m, n]
    return engine.product(half, half.T), root


def _root(moments: Moments) -> Float64:
    """Some R with ``C = R Rᵀ``."""
    if moments.diagonal:
        return np.diag(np.sqrt(moments.second))
    try:
        return np.asarray(np.linalg.cholesky(moments.second))
    except np.linalg.LinAlgError:  # singular, or by rounding a little less than that
        values, vectors = np.linalg.eigh(moments.second)
        return np.asarray(vectors * np.sqrt(np.maximum(values, 0.0)))
