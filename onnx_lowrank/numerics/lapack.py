"""Eigenvalues first and eigenvectors later, from one reduction to tridiagonal form.

Nine tenths of the work on a symmetric matrix S is its reduction ``S = Q T Qᵀ`` (Golub & Van Loan,
Matrix Computations, 4th ed., §8.3).  LAPACK's drivers throw Q away with the eigenvalues; here it
is kept, so that a rank can be read off the values and only as many vectors are computed then.

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

__all__ = ["Tridiagonal"]

Float64 = npt.NDArray[np.float64]


class Tridiagonal:
    """``S = Q T Qᵀ`` of a symmetric matrix S[s, s].

    Attributes:
        size: s, from 1.
    """

    def __init__(self, symmetric: Float64) -> None:
        """Reduce a matrix, which is overwritten and kept.

        Args:
            symmetric: S in C order, finite; its upper triangle is read.

        Raises:
            ValueError: S is not a square, contiguous array of float64.
        """
        self.size = len(symmetric)
        square = symmetric.shape == (self.size, self.size) and self.size > 0
        if not (square and symmetric.flags.c_contiguous and symmetric.dtype == np.float64):
            raise ValueError(f"expected a square float64 array in C order, got {symmetric.shape}")
        self._reflectors = symmetric
        self._diagonal, self._beside = np.empty(self.size), np.zeros(self.size)
        self._scales = np.zeros(self.size)
        # The upper triangle of rows is the lower triangle of Fortran's columns.
        _solve(
            "dsytrd",
            b"L",
            self.size,
            self._reflectors,
            self.size,
            self._diagonal,
            self._beside,
            self._scales,
        )

    def values(self) -> Float64:
        """All eigenvalues, falling, shape [s]."""
        values, beside = self._diagonal.copy(), self._beside.copy()
        _call("dsterf", self.size, values, beside)
        return values[::-1]

    def leading(self, count: int) -> tuple[Float64, Float64]:
        """The largest eigenvalues, falling, shape [count], and their vectors, [s, count]."""
        size = self.size
        values, found = np.empty(size), np.empty((count, size))
        support = np.empty(2 * max(count, 1), np.intc)
        _solve(
            "dstemr",
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
        _solve(
            "dormtr",
            b"L",
            b"L",
            b"N",
            size,
            count,
            self._reflectors,
            size,
            self._scales,
            found,
            size,
        )
        return values[count - 1 :: -1][:count], found[::-1].T


def _solve(name: str, *arguments: Any, integers: bool = False) -> None:
    """A routine with workspace, of the size that it asks for."""
    asked, whole = np.empty(1), np.zeros(1, np.intc)
    extra = (whole, -1) if integers else ()
    _call(name, *arguments, asked, -1, *extra)
    work = np.empty(max(1, int(asked[0])))
    if integers:
        more = np.empty(max(1, int(whole[0])), np.intc)
        extra = (more, more.size)
    _call(name, *arguments, work, work.size, *extra)


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
