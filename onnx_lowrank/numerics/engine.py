"""Engine: where the heavy work on matrices is done, behind three functions.

Spectra and factors come from Gram matrices, their reductions and products.  An `Engine` has one
function for each; arrays of NumPy go in and come out.  `PROCESSOR` is the processor, with NumPy and
LAPACK; an accelerator is `onnx_lowrank.numerics.accelerator.Accelerator`, which is only imported
where it is asked for.
"""

from __future__ import annotations

from functools import cache
from typing import Protocol

import numpy as np
import numpy.typing as npt

from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.lapack import Tridiagonal
from onnx_lowrank.numerics.spectrum import gram

__all__ = ["HOST", "PROCESSOR", "Engine", "Reduced", "engine_of"]

HOST = "cpu"
"""The name of the processor."""


class Reduced(Protocol):
    """A symmetric matrix S[s, s] whose eigenvalues are known."""

    @property
    def memory(self) -> int:
        """Bytes that are held."""

    def values(self) -> npt.NDArray[np.float64]:
        """All eigenvalues, falling, shape [s]."""

    def leading(self, count: int) -> tuple[npt.NDArray[np.float64], Array]:
        """The largest eigenvalues, falling, shape [count], and their vectors, [s, count]."""


class Engine(Protocol):
    """Three functions of arrays, in the precision of these."""

    def gram(self, matrix: Array, dtype: npt.DTypeLike = np.float64) -> Array:
        """``MᵀM`` of ``M[rows, columns]``, computed in float64 or float32: [columns, columns]."""

    def reduce(self, symmetric: Array) -> Reduced:
        """Decompose S[s, s] in C order, of float64 or float32, which may be overwritten.

        Its upper triangle is read.

        Raises:
            numpy.linalg.LinAlgError: it does not converge.
        """

    def product(self, left: Array, right: Array) -> Array:
        """``L @ R``, both in float64 or both in float32."""


class _Processor:
    """The processor."""

    def gram(self, matrix: Array, dtype: npt.DTypeLike = np.float64) -> Array:
        return gram(matrix, dtype)

    def reduce(self, symmetric: Array) -> Reduced:
        return Tridiagonal(symmetric)

    def product(self, left: Array, right: Array) -> Array:
        return np.asarray(left @ right)


PROCESSOR: Engine = _Processor()
"""NumPy and LAPACK."""


@cache
def engine_of(device: str) -> Engine:
    """The engine of a device; one for each name.

    Args:
        device: `HOST`, or what torch calls an accelerator; ``torch:NAME`` is any device of torch,
            also its own ``cpu``.

    Raises:
        InputError: torch is not installed, or the device cannot be used.
    """
    if device == HOST:
        return PROCESSOR
    from onnx_lowrank.numerics.accelerator import Accelerator

    return Accelerator(device)
