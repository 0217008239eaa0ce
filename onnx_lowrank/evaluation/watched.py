"""Watched: the values of a model at which damage is measured, its outputs or those before them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnx_lowrank.errors import named
from onnx_lowrank.evaluation.likelihood import divergence
from onnx_lowrank.evaluation.outputs import damage_of
from onnx_lowrank.evaluation.reading import Reading, reading_of
from onnx_lowrank.evaluation.top1 import rows_of_classes
from onnx_lowrank.graph.flow import flow_from
from onnx_lowrank.numerics.arrays import Feed
from onnx_lowrank.phrases import listed
from onnx_lowrank.runtime.taps import give_out

__all__ = ["Watched", "watched"]


@dataclass(frozen=True)
class Watched:
    """What is compared to tell a damage.

    Attributes:
        outputs: of the model.
        instead: outputs that cannot be compared number by number -> the nearest floats before
            them, which are compared in their place.  Such outputs are integers (the class of an
            ArgMax), strings, sequences, and tensors whose size depends on what the layers compute
            (the boxes that NonMaxSuppression leaves).
        reading: what is known of all that is compared.
        by_classes: whether only outputs of classes are compared, by their shares.
    """

    outputs: frozenset[str]
    instead: Mapping[str, tuple[str, ...]]
    reading: Reading
    by_classes: bool = False

    @property
    def values(self) -> frozenset[str]:
        """The names of all that is compared."""
        return (self.outputs - self.instead.keys()) | self.inside

    @property
    def inside(self) -> frozenset[str]:
        """The names of what is no output."""
        return frozenset(n for names in self.instead.values() for n in names) - self.outputs

    @property
    def notes(self) -> tuple[str, ...]:
        """What is compared in place of outputs."""
        return tuple(
            f"damage of output {output!r} is measured at {listed(names, 4) or 'nothing'} before "
            "it: it is no float, or its size depends on what the model computes"
            for output, names in self.instead.items()
        )

    def opened(self, model: ir.Model) -> ir.Model:
        """A copy of a model that gives out everything that is compared."""
        copy = model.clone()
        give_out(copy, self.inside)
        return copy

    def damage(self, before: Feed, after: Feed, feed: Feed) -> float | None:
        """The damage of a model by what two models give on one sample; None: nothing to compare.

        It is that of `damage_of`, or where shares of classes are compared the mean of their
        `divergences`.

        Raises:
            InputError: shares of classes are compared, and no output or more than one could be it.
        """
        keep = self.reading.kept(feed)
        if not self.by_classes:
            both = {n: a for n, a in before.items() if n in self.values and n in after}
            return damage_of(both, after, self.reading, keep)
        given = {name: array for name, array in before.items() if name in self.outputs}
        names, _ = rows_of_classes(given, self.reading, "kl", named("metric"))
        rows = [divergence(n, given[n], after[n], self.reading, keep) for n in names if n in after]
        found = np.concatenate(rows) if rows else np.zeros(0)
        return float(found.mean()) if found.size else None


def watched(
    model: ir.Model, nodes: Collection[ir.Node], reading: Reading, by_classes: bool = False
) -> Watched:
    """What tells the damage of layers.

    Args:
        model: the model.
        nodes: the layers; outputs that do not depend on them stay as they are.
        reading: what is known of the outputs.
        by_classes: whether shares of classes are compared, which only outputs can hold.
    """
    if by_classes:
        outputs = frozenset(value.name or "" for value in model.graph.outputs)
        return Watched(outputs, {}, reading, by_classes=True)
    flow = flow_from(model, nodes=nodes)
    sources = {
        output.name or "": flow.sources(output)
        for output in model.graph.outputs
        if output in flow.reached and not flow.comparable(output)
    }
    inside = list(dict.fromkeys(value for values in sources.values() for value in values))
    return Watched(
        outputs=frozenset(value.name or "" for value in model.graph.outputs),
        instead={n: tuple(v.name or "" for v in values) for n, values in sources.items()},
        reading=reading_of(model, reading.mask, inside),
    )
