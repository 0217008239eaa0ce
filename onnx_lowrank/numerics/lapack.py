"""Eigenvalues first and eigenvectors later, from one reduction to tridiagonal form.

Nine tenths of the work on a symmetric matrix S is its reduction ``S = Q T Qᵀ`` (Golub & Van Loan,
Matrix Computations, 4th ed., §8.3).  LAPACK's drivers throw Q away with the eigenvalues; here it
is kept, so that a rank can be read off the values and only as many vectors are computed then.
The vectors of T are found by divide and conquer; only where few are wanted, by bisection and
relatively robust representations, whose time is that of so many vectors, at several times as much.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.fortran import KINDS, solve

__all__ = ["Tridiagonal"]

Float64 = npt.NDArray[np.float64]

# Share of the vectors below which bisection takes less time than divide and conquer.
_FEW = 0.15


class Tridiagonal:
    """``S = Q T Qᵀ`` of a symmetric matrix S[s, s], in the precision that S has.

    Attributes:
        size: s, from 1.
    """

    def __init__(self, symmetric: Array) -> None:
        """Reduce a matrix, which is overwritten and kept.

        Args:
            symmetric: S in C order, finite; its upper triangle is read.

        Raises:
            ValueError: S is not a square, contiguous array of float64 or float32.
        """
        self.size, self.dtype = len(symmetric), symmetric.dtype
        self._whole: tuple[Array, Array] | None = None
        square = symmetric.shape == (self.size, self.size) and self.size > 0
        if not (square and symmetric.flags.c_contiguous and self.dtype in KINDS):
            raise ValueError(
                f"expected a square array of float64 or float32 in C order, got {symmetric.shape} "
                f"of {self.dtype}"
            )
        self._reflectors = symmetric
        self._diagonal, self._beside = self._empty(self.size), np.zeros(self.size, self.dtype)
        self._scales = np.zeros(self.size, self.dtype)
        # The upper triangle of rows is the lower triangle of Fortran's columns.
        self._solve(
            "sytrd",
            b"L",
            self.size,
            self._reflectors,
            self.size,
            self._diagonal,
            self._beside,
            self._scales,
        )

    @property
    def memory(self) -> int:
        """Bytes that are held."""
        return self._reflectors.nbytes + (0 if self._whole is None else self._whole[1].nbytes)

    def values(self) -> Float64:
        """All eigenvalues, falling, shape [s]."""
        if self.dtype == np.float32:  # their vectors take no more time
            return self._divided()[0][::-1].astype(np.float64)
        values, beside = self._diagonal.copy(), self._beside.copy()
        solve("dsterf", self.size, values, beside)
        return values[::-1]

    def leading(self, count: int) -> tuple[Float64, Array]:
        """The largest eigenvalues, falling, shape [count], and their vectors, [s, count]."""
        few = count < _FEW * self.size and self.dtype == np.float64
        values, found = self._bisected(count) if few else self._divided()
        values, rows = values[::-1][:count], found[::-1][:count].copy()
        self._solve(
            "ormtr",
            b"L",
            b"L",
            b"N",
            self.size,
            count,
            self._reflectors,
            self.size,
            self._scales,
            rows,
            self.size,
        )
        return values.astype(np.float64, copy=False), rows.T

    def _bisected(self, count: int) -> tuple[Array, Array]:
        """The largest eigenvalues of T, rising, and their vectors in rows: those alone."""
        size = self.size
        values, found = self._empty(size), self._empty((count, size))
        support = np.empty(2 * max(count, 1), np.intc)
        self._solve(
            "stemr",
            b"V",
            b"I",
            size,
            self._diagonal.copy(),
            self._beside.copy(),
            0.0,
            0.0,
            size - count + 1,
            size,
            np.zeros(1, np.intc),
            values,
            found,
            size,
            count,
            support,
            np.ones(1, np.intc),
            integers=True,
        )
        return values[:count], found

    def _divided(self) -> tuple[Array, Array]:
        """All of them by divide and conquer, which is mostly matrix products."""
        if self._whole is None:
            values, found = self._diagonal.copy(), self._empty((self.size, self.size))
            self._solve(
                "stedc",
                b"I",
                self.size,
                values,
                self._beside.copy(),
                found,
                self.size,
                integers=True,
            )
            self._whole = values, found
        return self._whole

    def _empty(self, shape: int | tuple[int, int]) -> Array:
        return np.empty(shape, self.dtype)

    def _solve(self, name: str, *arguments: Any, integers: bool = False) -> None:
        """A routine with workspace, of the size that it asks for."""
        routine = KINDS[self.dtype] + name
        asked, whole = self._empty(1), np.zeros(1, np.intc)
        extra = (whole, -1) if integers else ()
        solve(routine, *arguments, asked, -1, *extra)
        # Sizes beyond 2**24 are rounded in float32.
        work = self._empty(max(1, int(np.nextafter(asked[0], np.inf, dtype=self.dtype)) + 1))
        if integers:
            more = np.empty(max(1, int(whole[0])), np.intc)
            extra = (more, more.size)
        solve(routine, *arguments, work, work.size, *extra)
