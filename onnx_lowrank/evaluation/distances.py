"""Distances of two arrays: as numbers, a block at a time in double precision, or as things."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np

from onnx_lowrank.numerics.arrays import Array

__all__ = ["BLOCK", "TEXTS", "apart", "largest_of", "padded", "squares", "things", "unequal"]

TEXTS = "OUS"
"""Kinds of arrays of strings."""

# Bytes, at most, of an integer that is a quantized number.
_QUANTIZED = 2
BLOCK = 1 << 13
"""Elements that are in double precision at once: few enough for the processor's cache, and for one
thread (several gain nothing in a product of two vectors, and wait for each other)."""


def apart(
    a: Array, b: Array, scale: float, wide: type[np.number[Any]]
) -> tuple[float, float, float]:
    """Largest absolute difference, ``‖b − a‖ / ‖a‖`` and cosine of two finite vectors.

    Args:
        a: shape [elements].
        b: the same shape.
        scale: their largest absolute value, above 0.
        wide: the type to compute in.
    """
    most, sums = 0.0, np.zeros(4)
    for start in range(0, len(a), BLOCK):
        # Scaled to at most 1, so that squares of huge or tiny values neither overflow nor
        # vanish.
        one, other = (own[start : start + BLOCK].astype(wide) / scale for own in (a, b))
        off = other - one
        most = max(most, float(np.abs(off).max()))
        pairs = (one, one), (other, other), (off, off), (one, other)
        sums += [float(np.vdot(first, second).real) for first, second in pairs]
    norm_a, norm_b, distance = map(math.sqrt, sums[:3])
    relative = distance / norm_a if norm_a else math.inf
    cosine = float(sums[3]) / (norm_a * norm_b) if norm_a and norm_b else 0.0
    return most * scale, relative, min(1.0, max(-1.0, cosine))


def largest_of(array: Array, wide: type[np.number[Any]]) -> float:
    """The largest absolute value of a vector, 0 if it is empty; infinite where not all are finite.

    A block at a time is in the wide type.
    """
    found = 0.0
    for start in range(0, len(array), BLOCK):
        own = float(np.abs(array[start : start + BLOCK].astype(wide)).max())
        found = max(found, own) if math.isfinite(own) else math.inf
    return found


def squares(a: Array, b: Array) -> tuple[float, float]:
    """``‖a‖²`` and ``‖b − a‖²`` where a is finite, of shape [elements]; a block at a time."""
    norm = error = 0.0
    for start in range(0, len(a), BLOCK):
        one, other = (own[start : start + BLOCK].astype(np.float64) for own in (a, b))
        known = np.isfinite(one)
        if not known.all():
            one, other = one[known], other[known]
        other -= one
        norm += float(np.vdot(one, one))
        error += float(np.vdot(other, other))
    return norm, error


def things(array: Array) -> bool:
    """Whether two elements are the same or not, however near: strings, truths, numbers of things.

    Integers of 8 and 16 bits are what quantized models compute with.
    """
    kind = array.dtype.kind
    return kind in TEXTS or kind == "b" or (kind in "iu" and array.dtype.itemsize > _QUANTIZED)


def unequal(expected: Array, found: Array) -> tuple[float, float]:
    """Largest difference, and the share of elements that differ.

    Where the sizes differ it is the share of rows of the longer one that the other does not have.
    """
    if expected.shape != found.shape:
        own, other = (_counted(array) for array in (expected, found))
        both = sum((own & other).values())
        return 1.0, 1.0 - both / max(own.total(), other.total())
    differs = expected != found
    if expected.dtype.kind in TEXTS:
        return float(differs.any()), float(np.mean(differs))
    distance = np.abs(found.astype(np.float64) - expected.astype(np.float64))
    return float(distance.max()), float(np.mean(differs))


def _counted(array: Array) -> Counter[object]:
    """How often each row is there."""
    if array.ndim < 2:
        return Counter(array.reshape(-1).tolist())
    return Counter(
        tuple(row) for row in array.reshape(len(array), math.prod(array.shape[1:])).tolist()
    )


def padded(one: Array, other: Array) -> tuple[Array, Array]:
    """Two arrays with zeros where only the other one has elements."""
    if one.shape == other.shape:
        return one, other
    sizes = np.maximum(one.shape, other.shape)
    return tuple(  # type: ignore[return-value]
        np.pad(a, [(0, int(size) - own) for own, size in zip(a.shape, sizes, strict=True)])
        for a in (one, other)
    )
