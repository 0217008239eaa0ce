"""Cuts: a last axis that a Split, or a Slice for each part, takes apart into equal parts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from onnx_lowrank.graph.sizes import drop_unread
from onnx_lowrank.graph.walk import attribute, operator
from onnx_lowrank.numerics.arrays import Array

__all__ = ["cut_elsewhere", "parts_of"]

Ints = tuple[int, ...]


def parts_of(node: ir.Node, size: int) -> int | None:
    """Into how many parts of a size the last axis of what a node reads is taken apart.

    Args:
        node: any node.
        size: of each part.

    Returns:
        None for a node that does something else, or whose sizes are not known.
    """
    data = node.inputs[0] if node.inputs else None
    if data is None:
        return None
    if operator(node) == ("", "Split"):
        return _parts_of_split(node, data, size)
    places = [_place(use.node, size) for use in data.uses() if operator(use.node) == ("", "Slice")]
    if operator(node) != ("", "Slice") or not places or None in places:
        return None
    return 1 + max(place for place in places if place is not None)


def cut_elsewhere(
    graph: ir.Graph,
    node: ir.Node,
    before: int,
    size: int,
    store: Callable[[Array, str], ir.Value],
) -> None:
    """Let a node take parts of another size.

    Constants that other nodes read as well stay as they are.

    Args:
        graph: of the node; it is changed.
        node: one that `parts_of` knows.
        before: the size so far.
        size: the new one.
        store: makes a constant of the graph.
    """
    name = node.outputs[0].name
    if operator(node) == ("", "Slice"):
        place = _place(node, before)
        assert place is not None
        for index, number in ((1, place * size), (2, (place + 1) * size)):
            _replace(graph, node, index, store(np.array([number], np.int64), f"{name}_cut"))
        return
    sizes = [size] * len(node.outputs)
    if "split" in node.attributes:
        node.attributes.add(ir.AttrInt64s("split", sizes))
    elif len(node.inputs) > 1 and node.inputs[1] is not None:
        _replace(graph, node, 1, store(np.array(sizes, np.int64), f"{name}_sizes"))


def _replace(graph: ir.Graph, node: ir.Node, index: int, value: ir.Value) -> None:
    before = node.inputs[index]
    node.replace_input_with(index, value)
    if before is not None:
        drop_unread(graph, before)


def _parts_of_split(node: ir.Node, data: ir.Value, size: int) -> int | None:
    if not _is_last(attribute(node, "axis", 0), data):
        return None
    given = node.inputs[1] if len(node.inputs) > 1 else None
    if "split" in node.attributes:
        sizes: Ints | None = tuple(node.attributes["split"].as_ints())
    elif given is not None:
        sizes = _constant(given)
    else:  # equal ones, where they can be
        sizes = (size,) * len(node.outputs)
    return len(node.outputs) if sizes == (size,) * len(node.outputs) else None


def _place(node: ir.Node, size: int) -> int | None:
    """Which part of a size a Slice takes of the last axis, from 0."""
    data, inputs = node.inputs[0], list(node.inputs[1:])
    if data is None or len(inputs) < 3:  # without axes it begins at the first one
        return None
    starts, ends, axes = (_constant(value) for value in inputs[:3])
    steps = _constant(inputs[3]) if len(inputs) > 3 and inputs[3] is not None else (1,)
    if starts is None or ends is None or axes is None or len(starts) != 1 or steps != (1,):
        return None
    if len(axes) != 1 or not _is_last(axes[0], data) or starts[0] < 0 or starts[0] % size:
        return None
    whole = ends[0] == starts[0] + size
    return starts[0] // size if whole or (starts[0] and ends[0] >= np.iinfo(np.int32).max) else None


def _is_last(axis: int, value: ir.Value) -> bool:
    return axis == -1 or (value.shape is not None and axis == len(value.shape) - 1)


def _constant(value: ir.Value | None) -> Ints | None:
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tuple(map(int, tensor.numpy().reshape(-1)))
