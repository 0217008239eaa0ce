"""Masks: which rows of a sample are padding."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from onnx_lowrank.numerics.arrays import Array, Feed

__all__ = ["find_mask", "kept_rows"]


_MASKS = ("attention_mask", "input_mask", "padding_mask", "mask")


def spread_mask(mask: Array, shape: tuple[int, ...]) -> Array | None:
    """A mask over the leading axes as one over all of them; None if it does not fit.

    ``mask[B, T]`` fits ``[B, T, …]`` and, where an exporter flattened the batch, ``[B·T, …]``.
    """
    if shape[: mask.ndim] != mask.shape:
        if shape[:1] != (mask.size,):
            return None
        mask = mask.reshape(-1)
    return np.broadcast_to(mask.reshape(*mask.shape, *[1] * (len(shape) - mask.ndim)), shape)


def find_mask(feed: Feed) -> str | None:
    """The input that marks padding, by its usual name and shape: ``attention_mask[B, T]``."""
    for name in _MASKS:
        array = feed.get(name)
        if array is None or array.ndim != 2 or not np.isin(array, (0, 1)).all():
            continue
        if any(other.shape[:2] == array.shape for key, other in feed.items() if key != name):
            return name
    return None


def kept_rows(feed: Feed, mask: str | None) -> npt.NDArray[np.bool_] | None:
    """Which rows count; None for all of them."""
    return None if mask is None else np.asarray(feed[mask] != 0)
