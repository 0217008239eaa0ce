"""Where factors wait until they are saved: in memory if small, else in an unnamed file.

The file is deleted the moment it is made, so nothing is left behind however the program ends; the
arrays are memory-mapped views that keep it alive, and the system can drop their pages whenever
it needs the memory.  So the factors of a model of several GB take no fixed memory.
"""

from __future__ import annotations

import mmap
import tempfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

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

    def store(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The array, or where it is large a read-only view on a copy of it in the file.

        Raises:
            OSError: the disk is full.
        """
        if array.nbytes < _SMALL:
            return array
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115
        start = -(-self._end // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        self._file.seek(start)
        self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        self._file.flush()
        self._end = start + array.nbytes
        view = mmap.mmap(self._file.fileno(), array.nbytes, access=mmap.ACCESS_READ, offset=start)
        return np.frombuffer(view, dtype=array.dtype).reshape(array.shape)
