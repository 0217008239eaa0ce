"""Samples for the check and the timing: what they are, and seeded random ones.

Those of files come from `onnx_lowrank.data.loading`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar, overload

import numpy as np
import onnx_ir as ir

from onnx_lowrank.data.declared import InputSpec
from onnx_lowrank.data.index_bounds import compared_with, index_bound
from onnx_lowrank.data.random import check_random, random_feed, random_note
from onnx_lowrank.data.shapes import ConcreteShapes
from onnx_lowrank.numerics.arrays import Array, Feed

__all__ = ["Lazy", "Samples", "largest", "random_samples"]

Expected = Mapping[str, Array] | None
_T = TypeVar("_T")


@dataclass(frozen=True)
class Samples:
    """Inputs to run, read when they are asked for.

    Attributes:
        source: "random", or the path that they come from.
        feeds: one mapping input -> array for each sample.
        expected: stored outputs of each sample, output -> array, or None.
        notes: what was assumed, converted or left out.
        total: how many samples the source holds; `feeds` may be a choice of them.
        labels: those of each sample, shape [rows, …], or None.
    """

    source: str
    feeds: Sequence[Feed]
    expected: Sequence[Expected]
    notes: tuple[str, ...]
    total: int
    labels: Sequence[Array] | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Input -> sizes in the first sample."""
        return {name: tuple(array.shape) for name, array in self.feeds[0].items()}

    def labelled(self) -> Iterator[tuple[Feed, Array | None]]:
        """Each sample, read once, and its labels."""
        for number, feed in enumerate(self.feeds):
            yield feed, None if self.labels is None else self.labels[number]

    def part(self, indices: Sequence[int]) -> Samples:
        """Some of the samples, in the given order."""
        labels = self.labels
        return Samples(
            self.source,
            Lazy(len(indices), lambda index: self.feeds[indices[index]]),
            Lazy(len(indices), lambda index: self.expected[indices[index]]),
            self.notes,
            self.total,
            None if labels is None else tuple(labels[index] for index in indices),
        )


def largest(feeds: Sequence[Feed]) -> int:
    """Which of the feeds holds most bytes; the first of several."""
    return int(np.argmax([sum(array.nbytes for array in feed.values()) for feed in feeds]))


class Lazy(Sequence[_T]):
    """A sequence whose items are made each time they are asked for."""

    def __init__(self, length: int, make: Callable[[int], _T]) -> None:
        """So many items, each made of its index."""
        self._length = length
        self._make = make

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> _T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[_T]: ...
    def __getitem__(self, index: int | slice) -> _T | Sequence[_T]:
        chosen = range(self._length)[index]
        if isinstance(chosen, range):
            return [self._make(item) for item in chosen]
        return self._make(chosen)

    def __iter__(self) -> Iterator[_T]:
        return (self._make(index) for index in range(self._length))


def random_samples(
    model: ir.Model,
    specs: Sequence[InputSpec],
    shapes: ConcreteShapes,
    *,
    count: int,
    seed: int,
) -> Samples:
    """Seeded random input; the n-th sample depends on the seed and on n alone.

    Raises:
        InputError: an input is not a tensor, has no known rank, or holds strings.
    """
    check_random(specs, shapes)
    bounds, choices = _index_bounds(model, specs), _choices(model, specs)
    return Samples(
        source="random",
        feeds=Lazy(count, lambda index: random_feed(specs, shapes, bounds, (seed, index), choices)),
        expected=(None,) * count,
        notes=(random_note(specs, bounds, seed, choices, shapes.lengths),),
        total=count,
    )


def _index_bounds(model: ir.Model, specs: Sequence[InputSpec]) -> dict[str, int]:
    integers = {spec.name for spec in specs if spec.dtype.kind in "iu"}
    found = {
        value.name: index_bound(value) for value in model.graph.inputs if value.name in integers
    }
    return {name: max(1, bound) for name, bound in found.items() if name and bound is not None}


def _choices(model: ir.Model, specs: Sequence[InputSpec]) -> dict[str, tuple[int, ...]]:
    """Input of one whole number -> the numbers that the graph compares it with, if any."""
    single = {
        spec.name
        for spec in specs
        if spec.dtype.kind in "iu" and spec.shape is not None and all(d == 1 for d in spec.shape)
    }
    found = {value.name: compared_with(value) for value in model.graph.inputs}
    return {name: own for name, own in found.items() if name in single and own}
