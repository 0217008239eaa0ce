"""Samples in batches for training, with what the original gives for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnx_lowrank.autodiff.gradient import Loss
from onnx_lowrank.data.fitter import is_floating
from onnx_lowrank.data.mask import kept_rows, spread_mask
from onnx_lowrank.errors import DerivativeError, InputError
from onnx_lowrank.numerics.arrays import Array, Feed
from onnx_lowrank.runtime.taps import (
    Runner,
)

__all__ = ["Batches", "joined", "wide"]


# Bytes of the original's values that are kept; those of further batches are computed each time.
_MEMORY = 2 << 30


def joined(
    model: ir.Model, parts: Sequence[Sequence[Feed]], size: int, run: Runner
) -> tuple[list[list[Feed]], tuple[str, ...]]:
    """Samples in batches where the model takes them; and notes for the user.

    Args:
        model: tells by its inputs whether axis 0 may have any size.
        parts: samples, at least one in the first part.
        size: samples of a batch, at most.
        run: runs the model, to see whether it takes a batch.
    """
    together = [_join(model, part, size) for part in parts]
    if sum(map(len, together)) < sum(map(len, parts)):
        try:
            run(together[0][0])
        except InputError as error:
            why = f"derivatives take one sample at a time, not batches of them: {error}"
            return [list(part) for part in parts], (why,)
    return together, ()


def _join(model: ir.Model, feeds: Sequence[Feed], size: int) -> list[Feed]:
    """Feeds of one sample and equal shapes put together along axis 0, where that is a free axis.

    Both models are run on the joined feed, so that it does not matter where their outputs have
    the batch.  Feeds that hold several samples already stay as they are.

    Args:
        model: tells by its inputs whether axis 0 may have any size.
        feeds: input -> array.
        size: samples of a batch, at most.
    """
    inputs = [v for v in model.graph.inputs if not v.is_initializer()]
    shapes = [v.shape for v in inputs]
    free = all(s is not None and len(s) > 0 and not isinstance(s[0], int) for s in shapes)
    if not free:
        return list(feeds)
    alike: dict[object, list[Feed]] = {}
    found: list[Feed] = []
    for feed in feeds:
        if all(array.shape[0] == 1 for array in feed.values()):
            key = tuple(sorted((name, array.shape) for name, array in feed.items()))
            alike.setdefault(key, []).append(feed)
        else:
            found.append(feed)
    for group in alike.values():
        for start in range(0, len(group), size):
            part = group[start : start + size]
            found.append({name: np.concatenate([feed[name] for feed in part]) for name in part[0]})
    return found


def wide(feed: Feed) -> dict[str, Array]:
    """A feed with all floats in float32."""
    return {
        name: array.astype(np.float32, copy=False) if is_floating(array.dtype) else array
        for name, array in feed.items()
    }


@dataclass(frozen=True, eq=False)
class _Targets:
    """What the original gives for one batch.

    Attributes:
        inputs: targets and weights of the losses, by the names of `Loss`.
        energy: for each value ``Σ t²`` of what counts.
    """

    inputs: Mapping[str, Array]
    energy: Mapping[str, float]


class Batches:
    """Batches with the targets of their losses.

    Attributes:
        values: what the losses are of.

    Each loss is the relative squared error of one value in one batch, ``Σ(y−t)² / Σt²`` over what
    the mask lets through, times the value's share: together they are at most about 1.
    """

    def __init__(
        self,
        feeds: Sequence[Feed],
        mask: str | None,
        values: Sequence[str],
        original: Runner,
        shares: Mapping[str, float] | None = None,
    ) -> None:
        """Batches.

        Args:
            feeds: input -> array, for each batch.
            mask: input whose zeros mark what does not count.
            values: what the losses are of.
            original: from a feed to the original's values by name.
            shares: what each value's loss counts, 1 together; default: all alike.
        """
        self._shares = shares or dict.fromkeys(values, 1.0 / max(len(values), 1))
        self._feeds = list(feeds)
        self._mask = mask
        self.values = tuple(values)
        self._original = original
        self._known: dict[int, _Targets] = {}
        self._memory = 0

    def __len__(self) -> int:
        return len(self._feeds)

    def inputs(self, index: int) -> dict[str, Array]:
        """Everything but what is trained that the model with the losses reads, in float32."""
        return {**wide(self._feeds[index]), **self._targets(index).inputs}

    def energy(self, index: int, value: str) -> float:
        """``Σ t²`` of a value in a batch."""
        return self._targets(index).energy[value]

    def _targets(self, index: int) -> _Targets:
        known = self._known.get(index)
        if known is not None:
            return known
        targets = self._computed(self._feeds[index])
        size = sum(array.nbytes for array in targets.inputs.values())
        if self._memory + size <= _MEMORY:
            self._known[index] = targets
            self._memory += size
        return targets

    def _computed(self, feed: Feed) -> _Targets:
        outputs = self._original(feed)
        keep = kept_rows(feed, self._mask)
        inputs: dict[str, Array] = {}
        energies: dict[str, float] = {}
        for value in self.values:
            names = Loss.of(value)
            target = outputs[value].astype(np.float32)
            if not np.isfinite(target).all():
                raise DerivativeError(f"{value!r} of the original holds NaN or Inf")
            weight = np.ones((1,) * target.ndim, np.float32)
            spread = None if keep is None else _leading(keep, target.shape)
            if spread is not None:
                weight = spread.astype(np.float32)
            energy = float(np.sum(np.square(target, dtype=np.float64) * weight))
            share = self._shares[value] / energy if energy > 0.0 else 0.0
            inputs[names.target] = target
            inputs[names.weight] = np.asarray(weight * share, np.float32)
            energies[value] = energy
        return _Targets(inputs, energies)


def _leading(mask: Array, shape: tuple[int, ...]) -> Array | None:
    """A mask over the leading axes, with the others at size 1; None if it does not fit."""
    if spread_mask(mask, shape) is None:
        return None
    lead = mask.shape if shape[: mask.ndim] == mask.shape else (mask.size,)
    return mask.reshape(*lead, *[1] * (len(shape) - len(lead)))
