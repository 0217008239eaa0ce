"""Routines of the BLAS and LAPACK that come with SciPy, called without the interpreter's lock.

SciPy's own wrappers hold the lock, and layers could not be worked on in parallel.  The addresses
are those of ``scipy.linalg.cython_blas`` and ``cython_lapack``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
from scipy.linalg import cython_blas, cython_lapack

from onnx_lowrank.numerics.arrays import Array

__all__ = ["KINDS", "add_gram", "call", "solve"]

KINDS = {np.dtype(np.float64): "d", np.dtype(np.float32): "s"}
"""How routines are named by precision."""


def add_gram(total: Array, part: Array) -> None:
    """Add ``PᵀP`` to the upper triangle of a matrix, in place.

    Args:
        total: shape [columns, columns], in C order, of float64 or float32.
        part: ``P[rows, columns]`` of the same type.  It is read where it lies if rows or columns of
            it are without gaps, and copied if not.
    """
    rows, columns = part.shape
    if rows == 0 or columns == 0:
        return
    item = part.itemsize
    lines = part.strides[1] == item and part.strides[0] >= columns * item
    turned = part.strides[0] == item and part.strides[1] >= rows * item
    if not (lines or turned):
        part, lines = np.ascontiguousarray(part), True
    # An axis of one number may have any stride.
    gap = max(part.strides[0 if lines else 1] // item, columns if lines else rows)
    one = np.ones(1, total.dtype)
    # The upper triangle of rows is the lower triangle of Fortran's columns.
    call(
        f"{KINDS[total.dtype]}syrk",
        *(b"L", b"N" if lines else b"T", columns, rows),
        *(one, part, gap, one, total, columns),
    )


def call(name: str, *arguments: Any) -> None:
    """Call a routine.

    Args:
        name: as in Fortran, with its precision.
        arguments: bytes are characters, numbers go by address, arrays are written to.
    """
    _routine(name)(*(_pointer(argument) for argument in arguments))


def solve(name: str, *arguments: Any) -> None:
    """Call a routine of LAPACK with all of its arguments but INFO.

    Raises:
        numpy.linalg.LinAlgError: it does not converge.
    """
    info = np.zeros(1, np.intc)
    call(name, *arguments, info)
    if info[0]:
        raise np.linalg.LinAlgError(f"LAPACK's {name} returned {info[0]}")


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
    capsules: Mapping[str, Any] = {
        **vars(cython_blas)["__pyx_capi__"],
        **vars(cython_lapack)["__pyx_capi__"],
    }
    capsule = capsules[name]
    named = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)
    pointed = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
    signature = named(("PyCapsule_GetName", ctypes.pythonapi))(capsule)
    address = pointed(("PyCapsule_GetPointer", ctypes.pythonapi))(capsule, signature)
    return ctypes.CFUNCTYPE(None)(address)
