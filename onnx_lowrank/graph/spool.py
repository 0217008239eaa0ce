"""Where factors wait until they are saved: in memory if small, else in an unnamed file.

The file is deleted the moment it is made, so nothing is left behind however the program ends; the
arrays are memory-mapped views that keep it alive, and the system can drop their pages whenever
it needs the memory.  So the factors of a model of several GB take no fixed memory.
"""

from __future__ import annotations

import mmap
import tempfile
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

__all__ = ["Spool"]

# Below this an array stays in memory: thousands of small maps would cost more than they save.
_SMALL = 1 << 20


class Spool:
    """Keeps arrays; see the module's docstring."""

    def __init__(self, folder: Path | None = None) -> None:
        """Keep large arrays in a file of this folder; default: the system's temporary one."""
        self._folder = folder
        self._file: IO[bytes] | None = None
        self._end = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Store nothing more; the tensors keep the file alive."""
        if self._file is not None:
            self._file.close()

    def store(self, array: npt.NDArray[Any], name: str) -> ir.Tensor[Any]:
        """A tensor with the elements of the array; where it is large they are in the file.

        Raises:
            OSError: the disk is full.
        """
        array = np.asarray(array, order="C")  # a scalar stays one
        if array.nbytes < _SMALL:
            return ir.Tensor(array, name=name)
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115
        start = -(-self._end // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        self._file.seek(start)
        self._file.write(array.reshape(-1).view(np.uint8).data)
        self._file.flush()
        self._end = start + array.nbytes
        return _Spooled(
            mmap.mmap(self._file.fileno(), array.nbytes, access=mmap.ACCESS_READ, offset=start),
            array.dtype,
            array.shape,
            name,
        )


class _Spooled(ir.Tensor[Any]):
    """A tensor on a memory-mapped part of the file, whose pages go once they are written."""

    def __init__(
        self, mapped: mmap.mmap, dtype: np.dtype[Any], shape: tuple[int, ...], name: str
    ) -> None:
        super().__init__(np.frombuffer(mapped, dtype=dtype).reshape(shape), name=name)
        self._mapped = mapped

    def tofile(self, file: Any) -> None:
        """Write the elements; afterwards they take no memory until they are read again."""
        super().tofile(file)
        if hasattr(mmap, "MADV_DONTNEED"):
            self._mapped.madvise(mmap.MADV_DONTNEED)
