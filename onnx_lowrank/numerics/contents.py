"""Contents: what a value is known by, wherever and whenever it was made."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np

__all__ = ["content_of"]


def content_of(*values: Any) -> str:
    """A digest of values: equal for equal contents, and hardly ever for others.

    Args:
        values: numbers, texts, arrays, and dataclasses, mappings, sets and sequences of them.

    Raises:
        TypeError: a value is something else.
    """
    digest = hashlib.blake2b(digest_size=20)
    for value in values:
        _add(digest, value)
    return digest.hexdigest()


def _add(digest: hashlib.blake2b, value: Any) -> None:
    if value is None or isinstance(value, bool | int | float | str | bytes | np.generic):
        kind = value.dtype.name if isinstance(value, np.generic) else type(value).__name__
        _word(digest, kind, repr(value))
    elif isinstance(value, np.ndarray):
        _array(digest, value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        _word(digest, type(value).__qualname__, len(fields))
        for field in fields:
            _word(digest, field.name)
            _add(digest, getattr(value, field.name))
    elif isinstance(value, Mapping):
        _word(digest, "mapping", len(value))
        for name, item in value.items():
            _add(digest, name)
            _add(digest, item)
    elif isinstance(value, Set):
        _word(digest, "set", len(value))
        for word in sorted(map(repr, value)):
            _word(digest, word)
    elif isinstance(value, Sequence):
        _word(digest, "sequence", len(value))
        for item in value:
            _add(digest, item)
    else:
        raise TypeError(f"expected numbers, texts, arrays and what holds them, got {type(value)}")


def _word(digest: hashlib.blake2b, *words: object) -> None:
    for word in words:
        text = str(word).encode()
        digest.update(b"%d:" % len(text))
        digest.update(text)


def _array(digest: hashlib.blake2b, array: np.ndarray[Any, Any]) -> None:
    # The order in memory decides which product of BLAS is called, and so about the last bits.
    turned = bool(array.flags.f_contiguous and not array.flags.c_contiguous)
    _word(digest, "array", array.dtype.name, array.shape, turned)
    if array.dtype.kind == "O":
        for item in array.reshape(-1).tolist():
            _add(digest, item)
        return
    plain = np.ascontiguousarray(array.T if turned else array)
    digest.update(plain.reshape(-1).view(np.uint8).data)
