"""Names for the types of arrays that all packages use, and how a sequence of arrays is one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Array", "Feed", "flat", "sequence"]

Array = npt.NDArray[Any]
"""An array of any shape and element type."""

Feed = Mapping[str, Array]
"""One sample, or the outputs of one: name of an input or output -> array."""


def sequence(items: Iterable[Array]) -> Array:
    """A sequence of tensors as an array of arrays, shape [items]."""
    held = list(items)
    array = np.empty(len(held), object)
    for index, item in enumerate(held):
        array[index] = item
    return array


def flat(items: Iterable[Array]) -> Array:
    """A sequence of tensors as one vector of all their elements, since their shapes may differ."""
    held = [item.reshape(-1) for item in items]
    return np.concatenate(held) if held else np.empty(0)
