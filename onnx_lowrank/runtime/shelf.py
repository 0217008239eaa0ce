"""Shelf: where values wait between pieces of work, in memory while there is room, else in files.

A value that waits in a file takes no memory at all: it is read anew each time it is asked for, and
its file goes when nobody can ask for it any more.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Collection, Iterator, MutableMapping
from pathlib import Path

import numpy as np

from onnx_lowrank.numerics.arrays import Array, Feed
from onnx_lowrank.runtime.memory import Memory

__all__ = ["Shelf", "Values"]

# Below this an array stays in memory: thousands of small files would cost more than they save.
_SMALL = 1 << 14
# Of the room that is left at the start waiting values take this share.
_SHARE = 0.4
# What may wait in memory where nothing is known of it.
_UNKNOWN = 2 << 30


class Shelf:
    """Keeps arrays; see the module's docstring.

    Attributes:
        spilled: bytes that went into files so far.
    """

    def __init__(self, memory: Memory | None = None, beside: int = 0) -> None:
        """Keep a part of the room that is left now in memory.

        Args:
            memory: what may be held; default: all that is given is kept.
            beside: bytes that work with the values will take.
        """
        self._folder = None if memory is None else memory.folder
        self._room: int | None = None
        if memory is not None:
            room = memory.room()
            self._room = _UNKNOWN if room is None else int(_SHARE * max(room - beside, 0))
        self._used = 0
        self.spilled = 0

    def put(self, array: Array) -> _Slot:
        """A place for an array.

        Raises:
            OSError: the disk is full.
        """
        small = array.nbytes < _SMALL or array.dtype.kind == "O"
        if self._room is None or small or self._used + array.nbytes <= self._room:
            slot = _Slot(array.shape, array.dtype, array)
            self._used += array.nbytes
            weakref.finalize(slot, self._free, array.nbytes)
            return slot
        handle, name = tempfile.mkstemp(prefix="waiting-", dir=self._folder)
        path = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        slot = _Slot(array.shape, array.dtype, path)
        self.spilled += array.nbytes
        weakref.finalize(slot, path.unlink, missing_ok=True)
        return slot

    def values(self, feed: Feed) -> Values:
        """A feed whose arrays are on this shelf."""
        found = Values(self)
        found.update(feed)
        return found

    def _free(self, size: int) -> None:
        self._used -= size


class _Slot:
    """One array, in memory or in a file."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, kept: Array | Path) -> None:
        self.shape, self.dtype, self._kept = shape, dtype, kept

    def array(self) -> Array:
        if isinstance(self._kept, Path):
            return np.fromfile(self._kept, np.uint8).view(self.dtype).reshape(self.shape)
        return self._kept


class Values(MutableMapping[str, Array]):
    """Arrays by name, on a shelf; what is put in goes there, what is asked for is read."""

    def __init__(self, shelf: Shelf) -> None:
        """Nothing yet."""
        self._shelf = shelf
        self._slots: dict[str, _Slot] = {}

    def __getitem__(self, name: str) -> Array:
        return self._slots[name].array()

    def __setitem__(self, name: str, array: Array) -> None:
        self._slots[name] = self._shelf.put(array)

    def __delitem__(self, name: str) -> None:
        del self._slots[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, name: object) -> bool:
        return name in self._slots  # the inherited way would read the array

    def only(self, names: Collection[str]) -> Values:
        """Those of some names, in the same places."""
        found = Values(self._shelf)
        found._slots = {name: slot for name, slot in self._slots.items() if name in names}
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        """Sizes of an array, which is not read for it."""
        return self._slots[name].shape
