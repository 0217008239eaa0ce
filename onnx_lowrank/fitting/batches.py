"""Samples in batches for training, with what the original gives for them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnx_lowrank.autodiff.gradient import Loss
from onnx_lowrank.data.fitter import is_floating
from onnx_lowrank.data.joining import APART, Joining
from onnx_lowrank.data.mask import kept_rows, spread_mask
from onnx_lowrank.errors import DerivativeError, InputError, ShortError, named
from onnx_lowrank.numerics.arrays import Array, Feed
from onnx_lowrank.runtime.kept import Kept
from onnx_lowrank.runtime.memory import Memory, growth, held
from onnx_lowrank.runtime.opener import Waiting
from onnx_lowrank.runtime.shelf import Shelf, Values
from onnx_lowrank.runtime.taps import (
    Runner,
)

__all__ = ["ELEMENTS", "Batches", "batch_size", "joined", "wide"]

# Sums of squares of an output between which losses and their derivatives stay within float32.
_LEAST, _MOST = 1e-36, 1e36

# Elements of the targets of a batch, about: more rows at once save no time, and derivatives hold
# several arrays of the size.
ELEMENTS = 1 << 24


def batch_size(
    run: Runner,
    targets: Feed,
    most: int,
    memory: Memory,
    trained: Feed | None = None,
    beside: int = 0,
) -> int:
    """How many samples go into a batch, from what derivatives of one of them take.

    Args:
        run: the model with the derivatives; it has not run yet in this process.
        targets: `Batches.inputs` of one feed, the largest.
        most: samples that are wanted.
        memory: what may be held.
        trained: what else the model reads.
        beside: bytes that what is made of the derivatives will take.

    Raises:
        ShortError: not even one fits.
    """
    inputs = {**targets, **(trained or {})}
    if isinstance(run, Waiting):
        run.load(inputs)  # what the model itself takes is there once
    own = held()
    _, taken = growth(lambda: run(inputs))
    largest = max((array.size for array in targets.values()), default=1)
    size = memory.times(taken, max(1, min(most, ELEMENTS // max(largest, 1))), beside)
    if size == 0:
        what = "a pass with the derivatives of one sample"
        raise ShortError(f"{named('memory')}: {memory.short(what, taken or 0, own or 0, beside)}")
    return size


def joined(
    model: ir.Model,
    parts: Sequence[Sequence[Feed]],
    size: int,
    run: Runner,
    shelf: Shelf | None = None,
    cut: Joining = APART,
) -> tuple[list[list[Feed]], tuple[str, ...]]:
    """Samples in batches where the model takes them; and notes for the user.

    Args:
        model: tells by its inputs whether axis 0 may have any size.
        parts: samples, at least one in the first part.
        size: samples of a batch, at most.
        run: runs the model, to see whether it takes a batch.
        shelf: where batches wait; default: all of them in memory.
        cut: what of the samples is padding that is cut off; those of one length then go together.
    """
    shelf = shelf or Shelf()
    together = [_join(model, part, size, shelf, cut) for part in parts]
    if sum(map(len, together)) < sum(map(len, parts)):
        try:
            run(together[0][0])
        except InputError as error:
            why = f"derivatives take one sample at a time, not batches of them: {error}"
            return [list(cut.shortened(part)) for part in parts], (why,)
    return together, ()


def _join(
    model: ir.Model, feeds: Sequence[Feed], size: int, shelf: Shelf, cut: Joining
) -> list[Feed]:
    """Feeds of one sample and equal shapes put together along axis 0, where that is a free axis.

    Both models are run on the joined feed, so that it does not matter where their outputs have
    the batch.  Feeds that hold several samples already stay as they are.

    Args:
        model: tells by its inputs whether axis 0 may have any size.
        feeds: input -> array.
        size: samples of a batch, at most.
        shelf: where batches wait.
        cut: what of the samples is padding.
    """
    inputs = [v for v in model.graph.inputs if not v.is_initializer()]
    shapes = [v.shape for v in inputs]
    free = all(s is not None and len(s) > 0 and not isinstance(s[0], int) for s in shapes)
    if not free or size == 1:
        return [shelf.values(cut.short(feed)) for feed in feeds]
    alike: dict[object, list[Feed]] = {}
    found: list[Feed] = []

    def join(group: list[Feed]) -> None:
        found.append(shelf.values(cut.joined(group)))
        group.clear()

    for feed in sorted(feeds, key=cut.length) if cut.cuts else feeds:
        if all(array.shape[0] == 1 for array in feed.values()):
            key = tuple(sorted((name, array.shape) for name, array in feed.items()))
            group = alike.setdefault(key, [])
            group.append(feed)
            if len(group) == size:
                join(group)
        else:
            found.append(shelf.values(cut.short(feed)))
    for group in alike.values():
        if group:
            join(group)
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
        inputs: targets and weights of the losses, by the names of `Loss`, but for wide targets.
        narrow: what wide ones are made of.
        energy: for each value ``Σ t²`` of what counts, or its rows of classes.
    """

    inputs: Values
    narrow: Values
    energy: Mapping[str, float]


class Batches:
    """Batches with the targets of their losses.

    Attributes:
        values: what the losses are of.
        shares: what each value's loss counts, 1 together.

    What the original gives is computed once and kept, in files where it does not fit in memory; of
    wide values what they are made of is kept (`onnx_lowrank.runtime.kept`).
    Each loss is the relative squared error of one value in one batch, ``Σ(y−t)² / Σt²`` over what
    the mask lets through, times the value's share: together they are at most about 1.  Of logits it
    may be the mean divergence of the classes over the rows, times the share.
    """

    def __init__(
        self,
        feeds: Sequence[Feed],
        mask: str | None,
        values: Sequence[str],
        original: Kept,
        shares: Mapping[str, float] | None = None,
        shelf: Shelf | None = None,
        by_classes: Collection[str] = (),
    ) -> None:
        """Batches.

        Args:
            feeds: input -> array, for each batch.
            mask: input whose zeros mark what does not count.
            values: what the losses are of.
            original: from a feed to the original's values by name.
            shares: what each value's loss counts, 1 together; default: all alike.
            shelf: where the original's values wait; default: all of them in memory.
            by_classes: values that are logits, whose loss is the divergence of the classes.
        """
        self._by_classes = frozenset(by_classes)
        self.shares = shares or dict.fromkeys(values, 1.0 / max(len(values), 1))
        self._feeds = list(feeds)
        self._mask = mask
        self.values = tuple(values)
        self._original = original
        self._known: dict[int, _Targets] = {}
        self._shelf = shelf or Shelf()

    def __len__(self) -> int:
        return len(self._feeds)

    def inputs(self, index: int) -> dict[str, Array]:
        """Everything but what is trained that the model with the losses reads, in float32."""
        known = self._targets(index)
        inputs = {**wide(self._feeds[index]), **known.inputs}
        if known.narrow:
            whole = self._original.whole(known.narrow)
            for value in self.values:
                if value in self._original.heads.narrow:
                    inputs[Loss.of(value).target] = whole[value].astype(np.float32, copy=False)
        return inputs

    def compute(self) -> None:
        """What the original gives for all batches, now; it is not run again."""
        for index in range(len(self._feeds)):
            self._targets(index)

    def energy(self, index: int, value: str) -> float:
        """``Σ t²`` of a value in a batch, or how many rows of classes count in it."""
        return self._targets(index).energy[value]

    def _targets(self, index: int) -> _Targets:
        if index not in self._known:
            self._known[index] = self._computed(self._feeds[index])
        return self._known[index]

    def _computed(self, feed: Feed) -> _Targets:
        given = self._original.read(feed)
        outputs = self._original.whole(given)
        keep = kept_rows(feed, self._mask)
        inputs = self._shelf.values({})
        heads = self._original.heads.narrow
        narrow = {heads[value]: given[heads[value]] for value in self.values if value in heads}
        energies: dict[str, float] = {}
        for value in self.values:
            names = Loss.of(value)
            target = outputs[value].astype(np.float32)
            if not np.isfinite(target).all():
                raise DerivativeError(f"{value!r} of the original holds NaN or Inf")
            weight = np.ones((1,) * target.ndim, np.float32)
            spread = None if keep is None else _leading(keep, target.shape)
            classes = value in self._by_classes
            if classes and spread is not None and spread.shape[-1] != 1:
                spread = None  # it marks classes, as that of a pointer into the tokens does
            if spread is not None:
                weight = spread.astype(np.float32)
            if classes:
                rows = (*target.shape[:-1], 1)
                energy = float(np.broadcast_to(weight, rows).sum(dtype=np.float64))
            else:
                energy = float(np.sum(np.square(target, dtype=np.float64) * weight))
                if energy > 0.0 and not _LEAST < energy < _MOST:
                    raise DerivativeError(f"the squares of {value!r} leave the range of float32")
            share = self.shares[value] / energy if energy > 0.0 else 0.0
            if value not in heads:
                inputs[names.target] = target
            inputs[names.weight] = np.asarray(weight * share, np.float32)
            energies[value] = energy
        return _Targets(inputs, self._shelf.values(narrow), energies)


def _leading(mask: Array, shape: tuple[int, ...]) -> Array | None:
    """A mask over the leading axes, with the others at size 1; None if it does not fit."""
    if spread_mask(mask, shape) is None:
        return None
    lead = mask.shape if shape[: mask.ndim] == mask.shape else (mask.size,)
    return mask.reshape(*lead, *[1] * (len(shape) - len(lead)))
