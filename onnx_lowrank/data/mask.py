"""Masks: which rows of a sample are padding."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_lowrank.data.cache import new_tokens
from onnx_lowrank.errors import InputError, named
from onnx_lowrank.numerics.arrays import Array, Feed

__all__ = [
    "chosen_mask",
    "counted_rows",
    "find_mask",
    "kept_rows",
    "mask_note",
    "masked_last",
    "masked_values",
    "spread_mask",
]


_MASKS = ("attention_mask", "input_mask", "padding_mask", "mask")
# Exporters do not agree what a one in these means: a token, or padding.
_EITHER = ("padding_mask", "mask")


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
    """The input that marks padding, by its usual name and shape: ``attention_mask[B, T]``.

    It may cover a cache before the tokens as well.  By the names ``padding_mask`` and ``mask`` one
    is only found where every row begins with a one: PyTorch marks padding with ones, and a text
    begins with a token.
    """
    for name in _MASKS:
        array = feed.get(name)
        if array is None or array.ndim != 2 or not np.isin(array, (0, 1)).all():
            continue
        if name in _EITHER and not np.all(array[:, :1]):
            continue
        if any(other.shape[:2] == array.shape for key, other in feed.items() if key != name):
            return name
        if new_tokens(feed, array) is not None:
            return name
    return None


def chosen_mask(feed: Feed, given: str | None) -> str | None:
    """The input that marks padding: the one that was given, or found; None where there is none.

    Args:
        feed: a sample.
        given: the name that the user gave.

    Raises:
        InputError: it is no input.
    """
    if given is not None and given not in feed:
        raise InputError(f"{named('mask', given)}: expected one of the inputs {', '.join(feed)}")
    return given or find_mask(feed)


def mask_note(mask: str) -> str:
    """What to say of an input that marks padding."""
    return f"padding counts nowhere: rows where input {mask!r} is 0 are left out"


def kept_rows(feed: Feed, mask: str | None) -> npt.NDArray[np.bool_] | None:
    """Which rows count, of the tokens without a cache before them; None for all of them."""
    if mask is None:
        return None
    keep = np.asarray(feed[mask] != 0)
    count = new_tokens(feed, feed[mask])
    return keep if count is None else keep[:, -count:]


def counted_rows(array: Array, keep: Array) -> Array:
    """The rows of an array that count, shape [rows, …]; all of it where the mask does not fit.

    Args:
        array: shape [B, T, …], or [B·T, …] where an exporter flattened the batch.
        keep: False where rows do not count, shape [B, T].
    """
    if array.shape[: keep.ndim] == keep.shape:
        return np.asarray(array[keep])
    if array.shape[:1] == (keep.size,):
        return np.asarray(array[keep.reshape(-1)])
    return array


def masked_values(model: ir.Model, mask: str | None, values: Iterable[ir.Value]) -> frozenset[str]:
    """Names of the values that have the mask's axes as their first ones, as far as shapes tell.

    A size alone may agree by chance: 128 features are no 128 tokens.  Two axes of a value are the
    mask's where they are declared by the same names, or where a further axis follows.

    Args:
        model: declares the mask's shape.
        mask: the input; None for none.
        values: outputs, or values inside.
    """
    given = next((value for value in model.graph.inputs if value.name == mask), None)
    if given is None or given.shape is None:
        axes: tuple[object, ...] = (None, None)
    else:
        axes = tuple(_axis(dim) for dim in given.shape)
    found = set()
    for value in values if mask is not None else ():
        shape = None if value.shape is None else tuple(_axis(dim) for dim in value.shape)
        if value.name and shape and _fits(shape, axes):
            found.add(value.name)
    return frozenset(found)


def masked_last(model: ir.Model, mask: str | None, values: Iterable[ir.Value]) -> frozenset[str]:
    """Names of the values that have the mask's axes as their first and last: ``[B, C, T]``.

    Told by the names of the sizes alone: a number may agree by chance.

    Args:
        model: declares the mask's shape.
        mask: the input; None for none.
        values: outputs, or values inside.
    """
    given = next((value for value in model.graph.inputs if value.name == mask), None)
    axes = () if given is None or given.shape is None else tuple(_axis(d) for d in given.shape)
    if len(axes) != 2 or not all(isinstance(axis, str) for axis in axes):
        return frozenset()
    found = set()
    for value in values:
        shape = () if value.shape is None else tuple(_axis(dim) for dim in value.shape)
        if value.name and len(shape) > 2 and (shape[0], shape[-1]) == axes:
            found |= set() if axes[1] in shape[1:-1] else {value.name}
    return frozenset(found)


def _axis(dim: object) -> int | str | None:
    return dim if isinstance(dim, int) else getattr(dim, "value", None)


def _fits(shape: tuple[object, ...], axes: tuple[object, ...]) -> bool:
    if len(shape) < 2:
        return False
    for own, other in zip(shape, axes, strict=False):
        known = own is not None and other is not None
        if known and own != other and (isinstance(own, int) or isinstance(other, int)):
            # A flattened batch: its size is the product.
            return isinstance(shape[0], str | None) and shape[0] not in (axes[0],)
    if len(shape) > len(axes):
        return True
    return all(
        isinstance(own, str) and own == other for own, other in zip(shape, axes, strict=True)
    )
