"""Archive: values that hold arrays in one file, an ``.npz`` without pickles.

``header`` is JSON as bytes: what the file is, and the value with numbers in place of its arrays;
these are ``0``, ``1`` and so on.  Of a symmetric or triangular matrix one triangle is written, row
by row.  The file's checksums tell where it was damaged.
"""

from __future__ import annotations

import dataclasses
import json
import zipfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from onnx_lowrank.numerics.arrays import Array

__all__ = ["BROKEN", "read_archive", "read_header", "write_archive"]

BROKEN = (OSError, ValueError, KeyError, TypeError, EOFError, IndexError, zipfile.BadZipFile)
"""What reading a file raises that is no archive, or a damaged one."""

# Below this side a triangle is not worth the while.
_SIDE = 16


def write_archive(
    file: IO[bytes], header: Mapping[str, Any], value: Any, classes: Iterable[type] = ()
) -> None:
    """Write a value.

    Args:
        file: open for writing.
        header: plain values, what the file is.
        value: numbers, texts, arrays, and dataclasses, mappings, tuples and lists of them.
        classes: the dataclasses that may be in it, as for `read_archive`.

    Raises:
        TypeError: something else is in it, which could not be read again.
        OSError: it cannot be written.
    """
    writing = _Writing(frozenset(classes))
    text = json.dumps({**header, "value": writing.plain(value)})
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        _put(archive, "header", np.frombuffer(text.encode(), np.uint8))
        for number, array in enumerate(writing.arrays):
            _put(archive, str(number), array)


def read_header(path: Path) -> dict[str, Any]:
    """What a file says that it is.

    Raises:
        One of `BROKEN`: it is no archive.
    """
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        return dict(json.loads(archive["header"].tobytes()))


def read_archive(path: Path, classes: Iterable[type]) -> Any:
    """The value of a file.

    Args:
        path: the file.
        classes: the dataclasses that may be in it.

    Raises:
        One of `BROKEN`: it is no archive, or damaged.
    """
    known = {own.__name__: own for own in classes}
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        header = json.loads(archive["header"].tobytes())
        return _Reading(archive, known).value(header["value"])


class _Writing:
    """Takes a value apart."""

    def __init__(self, classes: Collection[type]) -> None:
        self.arrays: list[Array] = []
        self._classes = classes
        self._known: dict[int, tuple[Any, Array]] = {}

    def plain(self, value: Any) -> Any:
        if value is None or isinstance(value, bool | int | float | str):
            return value.item() if isinstance(value, np.generic) else value
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, np.ndarray):
            if id(value) not in self._known:  # one that is shared is written once
                self._known[id(value)] = self._array(value), value
            return self._known[id(value)][0]
        if dataclasses.is_dataclass(value) and type(value) in self._classes:
            names = [field.name for field in dataclasses.fields(value)]
            fields = {name: self.plain(getattr(value, name)) for name in names}
            return {"of": type(value).__name__, "fields": fields}
        if isinstance(value, Mapping):
            return {"items": [[self.plain(name), self.plain(v)] for name, v in value.items()]}
        if isinstance(value, Sequence):
            return {"tuple" if isinstance(value, tuple) else "list": list(map(self.plain, value))}
        raise TypeError(f"expected numbers, texts, arrays and what holds them, got {type(value)}")

    def _array(self, array: Array) -> dict[str, Any]:
        found: dict[str, Any] = {"array": len(self.arrays)}
        if array.dtype.kind == "V":  # of ml_dtypes, which numpy writes as bytes of no meaning
            found["dtype"] = array.dtype.name
            array = array.view(np.dtype(f"u{array.dtype.itemsize}"))
        shape = _triangle(array)
        if shape is not None:
            found |= {"triangle": shape, "side": len(array)}
            rows = np.tri(len(array), dtype=bool)
            array = array[rows if shape == "lower" else rows.T]
        self.arrays.append(array)
        return found


def _triangle(array: Array) -> str | None:
    """Whether all of a matrix is in one of its triangles, or in both."""
    square = array.ndim == 2 and array.shape[0] == array.shape[1] >= _SIDE
    if not square or array.dtype != np.float64 or not array.flags.c_contiguous:
        return None
    bits = array.view(np.int64)  # -0 and NaN count as they are
    if np.array_equal(bits, bits.T):
        return "symmetric"
    return None if np.triu(bits, 1).any() else "lower"


class _Reading:
    """Puts a value together."""

    def __init__(self, archive: Any, classes: Mapping[str, type]) -> None:
        self._archive, self._classes = archive, classes
        self._known: dict[int, Array] = {}

    def value(self, plain: Any) -> Any:
        if not isinstance(plain, dict):
            if isinstance(plain, list):
                raise ValueError("expected a value, got a list")
            return plain
        if "array" in plain:
            number = int(plain["array"])
            if number not in self._known:
                self._known[number] = self._array(plain)
            return self._known[number]
        if "of" in plain:
            fields = {name: self.value(field) for name, field in plain["fields"].items()}
            return self._classes[plain["of"]](**fields)
        if "items" in plain:
            return {self.value(name): self.value(item) for name, item in plain["items"]}
        if "tuple" in plain:
            return tuple(map(self.value, plain["tuple"]))
        return list(map(self.value, plain["list"]))

    def _array(self, plain: Mapping[str, Any]) -> Array:
        found: Array = self._archive[str(int(plain["array"]))]
        if "triangle" in plain:
            side = int(plain["side"])
            rows = np.tri(side, dtype=bool)
            whole = np.zeros((side, side), found.dtype)
            if plain["triangle"] == "lower":
                whole[rows] = found
            else:
                whole[rows.T] = found
                whole.T[rows.T] = found
            found = whole
        if "dtype" in plain:
            found = found.view(np.dtype(getattr(ml_dtypes, plain["dtype"])))
        return found


def _put(archive: zipfile.ZipFile, name: str, array: Array) -> None:
    """An array in its order in memory."""
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        np.lib.format.write_array(file, np.asanyarray(array), allow_pickle=False)
