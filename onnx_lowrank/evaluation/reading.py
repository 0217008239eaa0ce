"""Reading: what is known of a model's outputs before any two of them are compared."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnx_lowrank.data.cache import cache_outputs, output_shares
from onnx_lowrank.data.mask import (
    counted_rows,
    kept_rows,
    masked_last,
    masked_values,
)
from onnx_lowrank.evaluation.classifiers import classifier_outputs
from onnx_lowrank.graph.flow import flow_from
from onnx_lowrank.numerics.arrays import Array, Feed

__all__ = ["PLAIN", "Reading", "reading_of"]


@dataclass(frozen=True)
class Reading:
    """How the outputs of one model are read in every comparison of a run.

    Attributes:
        classifiers: outputs whose largest element is the answer.
        loose: outputs whose sizes depend on what the model computes, as those of
            NonMaxSuppression do: two models may give different ones.
        mask: the input whose zeros mark padding; None without.
        masked: outputs that have the mask's axes: padding counts nowhere in them.
        last: those of them that have its second axis as their last one, as ``[B, C, T]`` has.
        cache: outputs that hold what a decoder hands on to its next step.
        inside: what counts as an output and is none; the place of its largest element is no answer.
    """

    classifiers: frozenset[str] = frozenset()
    loose: frozenset[str] = frozenset()
    mask: str | None = None
    masked: frozenset[str] = frozenset()
    last: frozenset[str] = frozenset()
    inside: frozenset[str] = frozenset()
    cache: frozenset[str] = frozenset()

    def shares(self, names: Iterable[str]) -> dict[str, float]:
        """What the error of each of some outputs counts, 1 together: a cache counts as one."""
        return output_shares(names, self.cache)

    def kept(self, feed: Feed) -> Array | None:
        """Which rows of a sample count; None for all of them."""
        return kept_rows(feed, self.mask)

    def counted(self, name: str, array: Array, keep: Array | None) -> Array:
        """The rows of an output that count, shape [rows, …]; all of it where no mask fits."""
        if keep is None or name not in self.masked:
            return array
        if name not in self.last:
            return counted_rows(array, keep)
        return counted_rows(np.moveaxis(array, -1, 1), keep) if array.ndim > 2 else array


PLAIN = Reading()
"""Where nothing is known: all rows of all outputs count."""


def reading_of(
    model: ir.Model,
    mask: str | None = None,
    inside: Iterable[ir.Value] = (),
    at: Collection[str] = (),
) -> Reading:
    """The reading of a model's outputs.

    Args:
        model: the model.
        mask: the input that marks padding.
        inside: further values of its main graph that are compared as outputs are.
        at: those of its outputs that are none of the model as it was given.
    """
    values: Collection[ir.Value] = [*model.graph.outputs, *inside]
    flow = flow_from(model, values=model.graph.inputs)
    last = masked_last(model, mask, values)
    return Reading(
        classifiers=classifier_outputs(model) - frozenset(at),
        loose=frozenset(value.name or "" for value in values if value in flow.loose),
        mask=mask,
        masked=masked_values(model, mask, values) | last,
        last=last,
        inside=frozenset(at),
        cache=cache_outputs(model) - frozenset(at),
    )
