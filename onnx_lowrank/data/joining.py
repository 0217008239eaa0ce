"""Joining: several samples in one run, without the padding at their end.

Weights are read once for all samples of a run, so that several cost less than one by one; and of
texts that are padded to one length most may be padding.  Both are done only where the model was
seen to give the same (`onnx_lowrank.evaluation.joinable`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from onnx_lowrank.data.samples import Lazy
from onnx_lowrank.numerics.arrays import Array, Feed

__all__ = ["APART", "Joining"]


@dataclass(frozen=True)
class Joining:
    """How samples of one model go together.

    Attributes:
        size: how many samples may be in one run; 1 where they are run one by one.
        mask: the input whose zeros at the end mark what is cut off; None where nothing is.
        axes: input -> its axis that is as long as the mask's last one; what is cut.
        avoided: lengths that are not cut to: sizes that outputs have for another reason, which a
            mask of that length would seem to fit.
    """

    size: int = 1
    mask: str | None = None
    axes: Mapping[str, int] = field(default_factory=dict)
    avoided: frozenset[int] = frozenset()

    @property
    def cuts(self) -> bool:
        """Whether samples are cut."""
        return self.mask is not None

    def length(self, feed: Feed) -> int:
        """How long a sample is when it is cut; 0 where nothing is cut."""
        if self.mask is None:
            return 0
        mask = feed[self.mask]
        whole = int(mask.shape[-1])
        used = np.flatnonzero(mask.reshape(-1, whole).any(axis=0))
        length = int(used[-1]) + 1 if used.size else 1
        while length in self.avoided and length < whole:
            length += 1
        return min(length, whole)

    def short(self, feed: Feed) -> Feed:
        """A sample, or several that are joined, without the padding at the end of all of them."""
        if self.mask is None or (length := self.length(feed)) == feed[self.mask].shape[-1]:
            return feed
        return {
            name: array.take(range(length), self.axes[name]) if name in self.axes else array
            for name, array in feed.items()
        }

    def shortened(self, feeds: Sequence[Feed]) -> Sequence[Feed]:
        """Samples without the padding at their end, each cut when it is asked for."""
        if self.mask is None:
            return feeds
        return Lazy(len(feeds), lambda index: self.short(feeds[index]))

    def runs(self, feeds: Sequence[Feed]) -> list[tuple[int, ...]]:
        """Which samples go into each run: those of one shape and of about the same length.

        Args:
            feeds: samples as they were given.
        """
        if self.size < 2:
            return [(number,) for number in range(len(feeds))]
        alike: dict[object, list[tuple[int, int]]] = {}
        for number, feed in enumerate(feeds):
            single = all(array.ndim and array.shape[0] == 1 for array in feed.values())
            shapes = tuple((name, array.shape, array.dtype.str) for name, array in feed.items())
            key = shapes if single else number
            alike.setdefault(key, []).append((self.length(feed), number))
        found = []
        for group in alike.values():
            order = [number for _, number in sorted(group)]
            starts = range(0, len(order), self.size)
            found += [tuple(order[start : start + self.size]) for start in starts]
        return found

    def joined(self, feeds: Sequence[Feed]) -> Feed:
        """Samples of one run along axis 0, without the padding at the end of all of them."""
        first = feeds[0]
        if len(feeds) > 1:
            first = {name: np.concatenate([feed[name] for feed in feeds]) for name in first}
        return self.short(first)

    def of(self, values: Feed, row: int, like: Feed) -> Feed:
        """What one of several samples has of the values of their run.

        Args:
            values: by name, samples along axis 0.
            row: number of the sample in the run.
            like: what the sample gives alone: it may be shorter, and the values are cut to that.
        """
        return {name: _part(values[name], row, array) for name, array in like.items()}


def _part(array: Array, row: int, like: Array) -> Array:
    return array[(slice(row, row + 1), *(slice(size) for size in like.shape[1:]))]


APART = Joining()
"""One by one, as they are."""
