"""Eigenvalues first and eigenvectors later, from one reduction to tridiagonal form.

Nine tenths of the work on a symmetric matrix S is its reduction ``S = Q T Qᵀ`` (Golub & Van Loan,
Matrix Computations, 4th ed., §8.3).  LAPACK's drivers throw Q away with the eigenvalues; here it
is kept, so that a rank can be read off the values and only as many vectors are computed then.
The vectors of T are found by divide and conquer; only where few are wanted, by bisection and
relatively robust representations, whose time is that of so many vectors, at several times as much.

The routines are those of SciPy's LAPACK (``scipy.linalg.cython_lapack``), called through ctypes:
SciPy's own wrappers hold the interpreter's lock, and layers could not be worked on in parallel.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.linalg import cython_lapack

from onnx_lowrank.numerics.arrays import Array

__all__ = ["Tridiagonal"]

Float64 = npt.NDArray[np.float64]

# How LAPACK names its routines by precision.
_KINDS = {np.dtype(np.float64): "d", np.dtype(np.float32): "s"}
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
        if not (square and symmetric.flags.c_contiguous and self.dtype in _KINDS):
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
        _call("dsterf", self.size, values, beside)
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
        routine = _KINDS[self.dtype] + name
        asked, whole = self._empty(1), np.zeros(1, np.intc)
        extra = (whole, -1) if integers else ()
        _call(routine, *arguments, asked, -1, *extra)
        # Sizes beyond 2**24 are rounded in float32.
        work = self._empty(max(1, int(np.nextafter(asked[0], np.inf, dtype=self.dtype)) + 1))
        if integers:
            more = np.empty(max(1, int(whole[0])), np.intc)
            extra = (more, more.size)
        _call(routine, *arguments, work, work.size, *extra)


def _call(name: str, *arguments: Any) -> None:
    """A routine of LAPACK with all of its arguments but INFO.

    Raises:
        numpy.linalg.LinAlgError: it does not converge.
    """
    info = ctypes.c_int(0)
    _routine(name)(*(_pointer(argument) for argument in arguments), ctypes.byref(info))
    if info.value:
        raise np.linalg.LinAlgError(f"LAPACK's {name} returned {info.value}")


def _pointer(argument: Any) -> Any:
    match argument:
        case bytes():
            return ctypes.c_char_p(argument)
        case int():
            return ctypes.byref(ctypes.c_int(argument))
        case float():
            return ctypes.byref(ctypes.c_double(argument))
    return ctypes.c_void_p(argument.ctypes.data)


@cache
def _routine(name: str) -> Any:
    """The address of a routine as a function that releases the interpreter's lock."""
    capsules: Mapping[str, Any] = vars(cython_lapack)["__pyx_capi__"]
    capsule = capsules[name]
    named = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)
    pointed = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
    signature = named(("PyCapsule_GetName", ctypes.pythonapi))(capsule)
    address = pointed(("PyCapsule_GetPointer", ctypes.pythonapi))(capsule, signature)
    return ctypes.CFUNCTYPE(None)(address)
