"""Sizes: the last ones that a Reshape is told, as constants or at the end of a Concat."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from onnx_lowrank.graph.names import Names
from onnx_lowrank.numerics.arrays import Array

__all__ = ["drop_unread", "last_sizes", "set_last_size"]


def last_sizes(shape: ir.Value | None, count: int) -> tuple[int, ...] | None:
    """The last so many sizes; None where one of them is not constant.

    Args:
        shape: what a Reshape reads.
        count: how many.
    """
    found: list[int] = []
    for value in reversed(_parts(shape)):
        tensor = ir.convenience.get_const_tensor(value)
        if tensor is None:
            return None
        found = [*map(int, tensor.numpy().reshape(-1)), *found]
        if len(found) >= count:
            return tuple(found[-count:])
    return None


def set_last_size(
    graph: ir.Graph,
    node: ir.Node,
    size: int,
    names: Names,
    store: Callable[[Array, str], ir.Value],
) -> None:
    """Let a Reshape make a last axis of another size; -1 stays, as it follows by itself.

    Constants and nodes that make the sizes of other Reshapes as well stay as they are.

    Args:
        graph: of the node; it is changed.
        node: the Reshape, whose last size is constant.
        size: the new one.
        names: unused names of the model.
        store: makes a constant of the graph.
    """
    shape = node.inputs[1]
    parts = _parts(shape)
    tensor = ir.convenience.get_const_tensor(parts[-1])
    assert shape is not None
    assert tensor is not None
    sizes = tensor.numpy().reshape(-1).astype(np.int64)
    if sizes[-1] == -1:
        return
    sizes[-1] = size
    value = store(sizes, f"{node.outputs[0].name}_shape")
    if len(parts) > 1:
        joined = ir.Node("", "Concat", [*parts[:-1], value], [ir.AttrInt64("axis", 0)])
        joined.name = names.new(f"{node.name or node.outputs[0].name}_sizes")
        joined.outputs[0].name = names.new(f"{value.name}_sizes")
        joined.outputs[0].dtype = ir.DataType.INT64
        graph.insert_before(node, [joined])
        value = joined.outputs[0]
    node.replace_input_with(1, value)
    for value in dict.fromkeys((shape, parts[-1])):
        drop_unread(graph, value)


def drop_unread(graph: ir.Graph, value: ir.Value) -> None:
    """Remove what makes a value, or the initializer that it is, where nothing reads it any more.

    Args:
        graph: from which it is removed; what stands elsewhere stays.
        value: the value.
    """
    if value.uses() or value.is_graph_output() or value.is_graph_input():
        return
    producer = value.producer()
    if producer is not None and producer.graph is graph:
        graph.remove(producer, safe=True)
    elif value.is_initializer() and value.name is not None and value.graph is graph:
        graph.initializers.pop(value.name)


def _parts(shape: ir.Value | None) -> list[ir.Value]:
    if shape is None:
        return []
    producer = shape.producer()
    if producer is None or producer.op_type != "Concat" or producer.domain not in ("", "ai.onnx"):
        return [shape]
    return [part for part in producer.inputs if part is not None]
