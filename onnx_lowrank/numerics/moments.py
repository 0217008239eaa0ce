"""Second moments of activations, gathered in passes over samples.

For rows x the output error of a map is ``E‖x W − x Ŵ‖² = tr((W−Ŵ)ᵀ C (W−Ŵ))`` with
``C = E[xᵀ x]``, so C[m, m] is all that has to be known of the data.  Where a bias can add the error
at the mean, ``E[x] (W−Ŵ)``, the pair is fitted to the covariance alone.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.engine import PROCESSOR, Engine

__all__ = ["BLOCK", "MEMORY", "Accumulator", "Moments", "Sums", "passes"]

Float64 = npt.NDArray[np.float64]
K = TypeVar("K", bound=Hashable)

# Rows multiplied at a time.  Products of float32 rows are summed in float32 within a block, where
# the error of a sum of 4096 terms is below 1e-5 of it at worst, and in float64 across blocks:
# twice the speed of float64 throughout, far below what a finite sample leaves uncertain.
BLOCK = 4096
# Sums of squares below this, as infinite ones, are taken again in float64.
_TINY = 1e-24
# Bytes of moments that are added up in one pass over samples: those of a decoder of 135 M
# parameters are, as another pass takes all derivatives again.
MEMORY = 2 << 30
# With so many rows for each element moments are not shrunk.
_ENOUGH = 10


@dataclass(frozen=True, eq=False)
class Moments:
    """Means over rows x of m elements.

    Attributes:
        second: ``C[m, m] = E[xᵀ x]``, or only its diagonal ``[m]`` where the others are 0 by
            nature (the one-hot rows of an embedding).
        mean: ``E[x]``, shape [m].
        rows: how many rows they are the means of.
        centre: subtracted from the rows before a map is fitted to them, shape [m]: a bias adds
            the map's output at the centre; None where there is no such bias.
    """

    second: Float64
    mean: Float64
    rows: int
    centre: Float64 | None = None

    @property
    def diagonal(self) -> bool:
        """Whether only the diagonal is kept."""
        return self.second.ndim == 1

    @property
    def trace(self) -> float:
        """``E‖x‖²``."""
        return float(self.second.sum() if self.diagonal else np.trace(self.second))

    @classmethod
    def combined(cls, parts: Sequence[Moments | None]) -> Moments | None:
        """The moments of several streams of rows together; None if there were no rows."""
        known = [part for part in parts if part is not None]
        if len(known) < 2:
            return known[0] if known else None
        rows = sum(part.rows for part in known)
        if len({part.diagonal for part in known}) > 1:  # a table that is also multiplied with
            known = [part.full() for part in known]
        second = sum(
            (part.rows / rows * part.second for part in known[1:]),
            known[0].rows / rows * known[0].second,
        )
        mean = sum(
            (part.rows / rows * part.mean for part in known[1:]),
            known[0].rows / rows * known[0].mean,
        )
        return cls(second, mean, rows)

    @classmethod
    def mapped(cls, a: Array) -> Moments:
        """Those of ``x·A`` for rows x that are all alike: ``AᵀA`` of ``A[l, m]``."""
        exact = a.astype(np.float64)
        return cls(exact.T @ exact, np.zeros(exact.shape[1]), 0)

    def full(self) -> Moments:
        """The same with all of C."""
        return Moments(np.diag(self.second), self.mean, self.rows) if self.diagonal else self

    def applied(self, matrix: Array, engine: Engine = PROCESSOR) -> Float64:
        """``C @ M`` for ``M[m, n]``, computed by an engine."""
        exact = np.asarray(matrix, np.float64)
        if self.diagonal:
            return self.second[:, None] * exact
        return np.asarray(engine.product(self.second, exact))

    def through(self, matrix: Array) -> Moments:
        """The moments of ``x·S`` for ``S[m, k]``."""
        s = np.asarray(matrix, np.float64)
        centre = None if self.centre is None else self.centre @ s
        return Moments(s.T @ self.applied(s), self.mean @ s, self.rows, centre)

    def of(self, elements: npt.NDArray[np.intp]) -> Moments:
        """The moments of some elements of the rows, by their numbers."""
        one = self.second[elements] if self.diagonal else self.second[np.ix_(elements, elements)]
        centre = None if self.centre is None else self.centre[elements]
        return Moments(one, self.mean[elements], self.rows, centre)

    def about(self, centre: Float64 | None) -> Moments:
        """The moments of the rows less a centre; None takes nothing off."""
        if centre is None:
            return self
        if self.diagonal:
            return self.full().about(centre)
        mean = self.mean - centre
        # E[(x−c)ᵀ(x−c)] = C − E[x]ᵀE[x] + (E[x]−c)ᵀ(E[x]−c)
        second = self.second - np.outer(self.mean, self.mean) + np.outer(mean, mean)
        return Moments(second, mean, self.rows)

    def fitting(self) -> Moments:
        """What a map is fitted to: the rows less their centre, shrunk."""
        return self.about(self.centre).shrunk()

    def shrunk(self) -> Moments:
        """C drawn towards ``tr(C)/m · I`` as far as so few rows ask for.

        Oracle approximating shrinkage (Chen, Wiesel, Eldar & Hero, IEEE Trans. Signal Processing
        58, 2010, eq. 23), up to `_ENOUGH` rows for each element.  It aims at C as a whole: of
        inputs near a plane it would drown a tail far below that many rows' noise, and the energy
        of the outputs is read off that tail.
        """
        size = len(self.mean)
        if self.diagonal or size < 2 or not 0 < self.rows < _ENOUGH * size:
            return self
        trace = self.trace
        squares = float(np.vdot(self.second, self.second))
        spread = squares - trace * trace / size
        above = (1.0 - 2.0 / size) * squares + trace * trace
        below = (self.rows + 1.0 - 2.0 / size) * spread
        share = 1.0 if below <= 0.0 else min(1.0, above / below)
        second = (1.0 - share) * self.second
        second[np.diag_indices(size)] += share * trace / size
        return Moments(second, self.mean, self.rows)


def passes(sizes: Mapping[K, int], memory: int | None = None) -> list[dict[K, int]]:
    """Streams of rows in groups whose moments fit in memory; what alone does not is left out.

    Args:
        sizes: stream -> elements of its rows.
        memory: bytes that moments may take at once, if that is less than `MEMORY`.
    """
    most = MEMORY if memory is None else min(memory, MEMORY)
    groups: list[dict[K, int]] = []
    room = 0
    for name, size in sizes.items():
        need = 8 * size * size
        if need > most:
            continue
        if need > room:
            groups.append({})
            room = most
        groups[-1][name] = size
        room -= need
    return groups


def _finite(rows: Array) -> bool:
    """Whether there is no NaN and no Inf: one pass without a mask, where squares can be summed."""
    if rows.dtype in (np.float32, np.float64) and rows.flags.c_contiguous:
        with np.errstate(over="ignore", invalid="ignore"):
            if np.isfinite(np.vdot(rows, rows)):
                return True
    return bool(np.isfinite(rows).all())


def _gram(block: Array) -> Array:
    """``Σ xᵀx``; numpy calls ssyrk or dsyrk for this."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(block.T @ block)


@dataclass(frozen=True, eq=False)
class Sums:
    """Sums over some rows, which sums over others are added to.

    Attributes:
        second: ``Σ xᵀx``, shape [m, m], or of one-hot rows its diagonal [m]; in float32 where it is
            the product of a single block.
        first: ``Σ x``, shape [m].
        rows: how many rows there are.
    """

    second: Array
    first: Float64
    rows: int


class Accumulator:
    """Adds up the moments of one stream of rows.

    Rows may come in parts: what each part adds is summed by itself, and the parts one after the
    other.  The moments are then the same to the last bit wherever a part was summed.
    """

    def __init__(self, size: int, *, diagonal: bool = False, block: int = BLOCK) -> None:
        """Moments without rows.

        Args:
            size: elements of a row.
            diagonal: rows are one-hot and given as indices.
            block: rows that wait until they are multiplied together, at most.
        """
        self._size = size
        self._total: Sums | None = None
        self._part: Array | None = None
        self._sum = np.zeros(size, np.float64)
        self._rows = 0
        self._waiting: list[Array] = []
        self._diagonal = diagonal
        self._block = block

    def add(self, rows: Array) -> None:
        """Add rows, shape [N, m]; for one-hot rows their indices, shape [N].

        Raises:
            FloatingPointError: a row holds NaN or Inf.
        """
        if self._diagonal:
            size = self._size
            indices = np.where(rows < 0, rows + size, rows).astype(np.int64)
            counts = np.bincount(indices, minlength=size)
            self._sum += counts
            self._rows += len(rows)
            return
        if not _finite(rows):
            raise FloatingPointError("NaN or Inf")
        self._waiting.append(rows)
        if sum(len(part) for part in self._waiting) >= self._block:
            self._flush()

    def _flush(self) -> None:
        if not self._waiting:
            return
        rows = self._waiting[0] if len(self._waiting) == 1 else np.concatenate(self._waiting)
        self._waiting = []
        for start in range(0, len(rows), BLOCK):
            block = rows[start : start + BLOCK]
            if block.dtype != np.float64:
                block = block.astype(np.float32, copy=False)
            product = _gram(block)
            if block.dtype == np.float32 and not _TINY < product.diagonal().max() < np.inf:
                block = block.astype(np.float64)  # squares beyond float32
                product = _gram(block)
            if not np.isfinite(product).all():
                raise FloatingPointError("numbers whose squares are beyond float64")
            # The first product stays as it is: most parts are a single block.
            self._part = product if self._part is None else _sum(self._part, product)
            self._sum += np.ones(len(block), block.dtype) @ block
            self._rows += len(block)

    def part(self) -> Sums | None:
        """The sums over the rows since the last call, which are taken out; None without rows.

        Raises:
            FloatingPointError: squares are beyond float64.
        """
        self._flush()
        if self._rows == 0:
            return None
        second = self._sum if self._diagonal else self._part
        assert second is not None
        found = Sums(second, self._sum, self._rows)
        self._part, self._rows, self._sum = None, 0, np.zeros(self._size, np.float64)
        return found

    def merge(self, part: Sums | None) -> None:
        """Add the sums over other rows."""
        if part is None:
            return
        if self._total is None:
            # The two sums of one-hot rows are one array.
            second = part.second.astype(np.float64, copy=self._diagonal)
            self._total = Sums(second, part.first, part.rows)
            return
        second = _sum(self._total.second, part.second)
        self._total = Sums(second, self._total.first + part.first, self._total.rows + part.rows)

    @property
    def total(self) -> Sums | None:
        """The sums over all parts so far; None if there were no rows."""
        self.merge(self.part())
        return self._total

    def moments(self) -> Moments | None:
        """The moments of all rows so far; None if there were none."""
        total = self.total
        if total is None:
            return None
        return Moments(total.second / total.rows, total.first / total.rows, total.rows)


def _sum(total: Array, part: Array) -> Array:
    """A sum in float64, in place where the first array is in it already."""
    total = total.astype(np.float64, copy=False)
    total += part
    return total
