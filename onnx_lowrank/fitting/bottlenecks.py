"""Bottlenecks: values inside the model through which every change of the factors has to pass.

Behind a block of a network there is often one value that everything later depends on: the
residual stream of a transformer, the features of a stage.  The outputs alone tell a descent little
about early layers; what such values should be is known from the original model too (hint-based
training: A. Romero et al., "FitNets: hints for thin deep nets", ICLR 2015).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnx_lowrank.autodiff.gradient import depends
from onnx_lowrank.graph.flow import read_by

__all__ = ["bottlenecks"]


def bottlenecks(
    model: ir.Model,
    trained: Sequence[str],
    ranks: Mapping[str, int],
    known: Collection[str],
    most: int,
) -> tuple[str, ...]:
    """Names of bottlenecks, in order, with something trained between any two of them.

    Of several in a row the last one that has as many axes as the first is taken: what follows a
    normalization rather than what it reads, and no pooled values in place of all of them.

    Args:
        model: its inputs include what is trained; it is not changed.
        trained: names of these inputs.
        ranks: numbers of axes of values whose shapes are not known.
        known: names that may be chosen.
        most: how many; of more, some that lie evenly.
    """
    order, names = list(model.graph), set(trained)
    reads = [read_by(node) for node in order]
    taught = [any(v is not None and v.name in names for v in read) for read in reads]
    given = {value for value in model.graph.inputs if value.name not in names}
    changing = depends(model, trained) & _behind(order, reads, given)
    last = {value: i for i, read in enumerate(reads) for value in read if value in changing}
    last |= dict.fromkeys(model.graph.outputs, len(order))
    found: list[ir.Value] = []
    waiting: set[ir.Value] = set()
    fresh = False  # whether something trained was read since the last one
    for index, node in enumerate(order):
        fresh |= taught[index]
        waiting = {value for value in (*waiting, *node.outputs) if last.get(value, -1) > index}
        if len(waiting) != 1:
            continue
        (value,) = waiting
        if value not in node.outputs or value.name not in known or value.is_graph_output():
            continue
        after = _behind(order[index + 1 :], reads[index + 1 :], {value})
        later = zip(order[index + 1 :], taught[index + 1 :], strict=True)
        if any(own and not after.issuperset(changing & {*other.outputs}) for other, own in later):
            continue  # later values can be reached without it
        if fresh:
            found.append(value)
        elif found and _axes(value, ranks) == _axes(found[-1], ranks):
            found[-1] = value
        fresh = False
    if len(found) > most:
        places = np.linspace(0, len(found) - 1, most).round().astype(int)
        found = [found[place] for place in places]
    return tuple(value.name or "" for value in found)


def _behind(
    order: Sequence[ir.Node], reads: Sequence[set[ir.Value | None]], start: set[ir.Value]
) -> set[ir.Value]:
    """Values that depend on others, these included."""
    found = set(start)
    for node, read in zip(order, reads, strict=True):
        if not found.isdisjoint(read):
            found.update(node.outputs)
    return found


def _axes(value: ir.Value, ranks: Mapping[str, int]) -> int | None:
    return len(value.shape) if value.shape is not None else ranks.get(value.name or "")
