"""Accelerator: the functions of `onnx_lowrank.numerics.engine` by torch, on a device that it knows.

What is asked for is sent there and the answer is fetched; for matrices of side s that is s² numbers
for s³ operations.  The vectors of a decomposition stay there until it is known how many are wanted.
The precision is that of the processor, so that the bounds which settle a rank in float32 hold
(`onnx_lowrank.numerics.components`): sums of float32 in as short parts, and no TF32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_lowrank.errors import InputError, named
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.spectrum import gram_parts

__all__ = ["Accelerator"]

_ANY = "torch:"
# Decomposed at the start: a device without float64 or without the routines fails there.
_TRIED = np.diag([1.0, 3.0])


class Accelerator:
    """One device of torch.

    Attributes:
        device: as the user calls it.
    """

    def __init__(self, device: str) -> None:
        """Try the device.

        Args:
            device: what torch calls it, after ``torch:`` or without.

        Raises:
            InputError: torch is not installed, the device cannot be used or has no float64, or
                products in float32 are less exact than that.
        """
        self.device = device
        try:
            import torch
        except ImportError as error:
            raise InputError(
                f"{named('device', device)}: expected the package torch, which cannot be imported: "
                f"{_line(error)}; pip install 'onnx-lowrank[gpu]'"
            ) from error
        self._torch: Any = torch
        precision = torch.get_float32_matmul_precision()
        if precision != "highest":
            raise InputError(
                f"{named('device', device)}: expected torch.set_float32_matmul_precision('highest')"
                f", got {precision!r}: ranks would hang on it"
            )
        try:
            self._device: Any = self._torch.device(device.removeprefix(_ANY))
            found = self._torch.linalg.eigvalsh(self._there(_TRIED)).cpu().numpy()
            usable = bool(np.allclose(found, _TRIED.diagonal()))
        except Exception as error:  # torch has many ways to say that there is no such device
            raise InputError(
                f"{named('device', device)}: expected cpu, or a device that torch can use here and "
                f"that has float64; got {type(error).__name__}: {_line(error)}"
            ) from error
        if not usable:
            raise InputError(
                f"{named('device', device)}: expected the eigenvalues 1 and 3, got {found}"
            )

    def gram(self, matrix: Array, dtype: npt.DTypeLike = np.float64) -> Array:
        """``MᵀM``; M is read and sent once, in blocks of rows."""
        with self._said():
            total = None
            for part in gram_parts(matrix, dtype):
                there = self._there(part)
                made = there.T @ there
                total = made if total is None else total.add_(made)
            columns = matrix.shape[1]
            return np.zeros((columns, columns), dtype) if total is None else _here(total)

    def reduce(self, symmetric: Array) -> _Decomposed:
        """All eigenvalues and vectors of S, in one go: its upper triangle is read."""
        with self._said():
            try:
                values, vectors = self._torch.linalg.eigh(self._there(symmetric), UPLO="U")
            except self._torch.linalg.LinAlgError as error:
                raise np.linalg.LinAlgError(_line(error)) from error
            return _Decomposed(_here(values), vectors)

    def product(self, left: Array, right: Array) -> Array:
        """``L @ R``."""
        with self._said():
            return _here(self._there(left) @ self._there(right))

    def _there(self, array: Array) -> Any:
        """An array on the device; torch takes neither one that may not be written nor any step."""
        own = np.require(array, requirements=["C", "W"])
        return self._torch.from_numpy(own).to(self._device)

    @contextlib.contextmanager
    def _said(self) -> Iterator[None]:
        """A failure of torch, such as memory that the device lacks, is one line."""
        try:
            yield
        except RuntimeError as error:
            raise InputError(f"{named('device', self.device)}: {_line(error)}") from error


class _Decomposed:
    """Eigenvalues and vectors, rising, the vectors on the device."""

    def __init__(self, values: Array, vectors: Any) -> None:
        self._values, self._vectors = values[::-1].astype(np.float64), vectors

    @property
    def memory(self) -> int:
        """Bytes that are held, on the device."""
        return int(self._vectors.nbytes)

    def values(self) -> npt.NDArray[np.float64]:
        return self._values.copy()

    def leading(self, count: int) -> tuple[npt.NDArray[np.float64], Array]:
        size = len(self._values)
        return self._values[:count].copy(), _here(self._vectors[:, size - count :].flip(1))


def _here(tensor: Any) -> Array:
    return np.asarray(tensor.cpu().numpy())


def _line(error: Exception) -> str:
    """The first line of what an error says."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
