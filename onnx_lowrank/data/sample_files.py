"""Arrays from sample files: ``.npz``, ``.npy`` and the ONNX test data's ``.pb``.

The files are not trusted: pickles are never loaded, and every fault of a file is one `InputError`
that names the file.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped,unused-ignore]

from onnx_lowrank.errors import InputError
from onnx_lowrank.numerics.arrays import Array, sequence

__all__ = ["numbered", "read_npy", "read_npz", "read_tensor", "read_value"]


@contextmanager
def _reading(path: Path, what: str) -> Iterator[None]:
    """Turn whatever a broken file raises into one line."""
    try:
        yield
    except (OSError, EOFError, ValueError, TypeError, KeyError, MemoryError, NotImplementedError,
            SyntaxError, zipfile.BadZipFile, zlib.error, DecodeError) as error:  # fmt: skip
        if isinstance(error, OSError) and error.strerror:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from error
        reason = " ".join(str(error).split())
        if "allow_pickle" in reason or "Object arrays" in reason:
            reason = "it holds Python objects (a pickle), which are never loaded"
        raise InputError(f"{path}: expected {what}: {reason or type(error).__name__}") from error


def read_npz(path: Path) -> dict[str, Array]:
    """All arrays of an archive.

    Raises:
        InputError: not an archive of arrays, damaged, empty, or with Python objects.
    """
    with _reading(path, "an .npz archive of arrays"):
        with path.open("rb") as file:
            if not zipfile.is_zipfile(file):
                raise InputError(f"{path}: expected an .npz archive of arrays: not a zip file")
        with np.load(path, allow_pickle=False) as archive:
            arrays: dict[str, Array] = {}
            for name in archive.files:
                array: Any = archive[name]
                if not isinstance(array, np.ndarray):
                    raise InputError(f"{path}: expected arrays only, {name!r} is none")
                arrays[name] = array
    if not arrays:
        raise InputError(f"{path}: the archive holds no array")
    return arrays


def read_npy(path: Path) -> Array:
    """One array, mapped from its file.

    Raises:
        InputError: not an array file, cut short, or with Python objects.
    """
    with _reading(path, "an .npy array"):
        with path.open("rb") as file:
            np.lib.format.read_magic(file)  # np.load would take anything else for a pickle
        if path.stat().st_size < 1 << 20:
            array: Any = np.load(path, allow_pickle=False)
        else:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
    return np.asarray(array)


def read_tensor(path: Path) -> tuple[str, Array]:
    """Name and values of a serialized TensorProto.

    Raises:
        InputError: not a tensor, or one whose values are in another file.
    """
    with _reading(path, "a serialized ONNX tensor (TensorProto)"):
        tensor = onnx.TensorProto()
        tensor.ParseFromString(path.read_bytes())
        if tensor.data_type == onnx.TensorProto.UNDEFINED:
            raise InputError(f"{path}: expected a serialized ONNX tensor (TensorProto): no type")
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise InputError(f"{path}: its values are in another file, which is not supported")
        return str(tensor.name), _texts(onnx.numpy_helper.to_array(tensor))


def read_value(path: Path, *, is_sequence: bool, optional: bool) -> tuple[str, Array | None]:
    """Name and values of a serialized tensor, sequence of tensors, or optional one of both.

    Args:
        path: the file.
        is_sequence: a SequenceProto is expected, or an OptionalProto with one.
        optional: an OptionalProto is expected.

    Returns:
        A sequence is an array of arrays; None for an optional one that holds nothing.

    Raises:
        InputError: it is something else.
    """
    if not (is_sequence or optional):
        return read_tensor(path)
    what = "a sequence of ONNX tensors (SequenceProto)" if is_sequence else "an ONNX tensor"
    what = f"{what}, in an OptionalProto" if optional else what
    with _reading(path, f"{what}, serialized"):
        data = path.read_bytes()
        if optional:
            value = onnx.OptionalProto.FromString(data)
            name, held = str(value.name), onnx.numpy_helper.to_optional(value)
        else:
            several = onnx.SequenceProto.FromString(data)
            name, held = str(several.name), onnx.numpy_helper.to_list(several)
        if (held is None or isinstance(held, list)) and not held and _is_tensor(data):
            raise ValueError("got a tensor")  # its fields read as those of an empty sequence
        if held is None:
            return name, None
        if isinstance(held, list) is not is_sequence:
            raise ValueError(f"got a {type(held).__name__}")
        return name, sequence(map(_texts, held)) if is_sequence else _texts(np.asarray(held))


def _is_tensor(data: bytes) -> bool:
    """Whether bytes are a whole TensorProto."""
    try:
        onnx.numpy_helper.to_array(onnx.TensorProto.FromString(data))
    except (ValueError, TypeError, KeyError, DecodeError):
        return False
    return True


def _texts(array: Array) -> Array:
    """An array whose strings, which come as bytes or str, are str."""
    if array.dtype.kind not in "OS":
        return array
    texts = [item.decode() if isinstance(item, bytes) else item for item in array.reshape(-1)]
    return np.array(texts, dtype=object).reshape(array.shape)


def numbered(folder: Path, stem: str) -> Mapping[int, Path]:
    """Number -> file of ``stem_0.pb``, ``stem_1.pb``, … in numeric order.

    Raises:
        InputError: the folder cannot be read.
    """
    pattern = re.compile(rf"{stem}_(\d+)\.pb")
    try:
        found = {
            int(match[1]): file
            for file in folder.iterdir()
            if (match := pattern.fullmatch(file.name))
        }
    except OSError as error:
        raise InputError(f"{folder}: cannot be read: {error.strerror}") from error
    return dict(sorted(found.items()))
