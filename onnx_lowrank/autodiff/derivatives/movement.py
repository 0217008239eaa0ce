"""Derivatives of operators that only move elements."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnx_lowrank.autodiff.derivatives.base import (
    Tape,
    Value,
    ValueGradients,
    derivative,
    unsupported,
)
from onnx_lowrank.graph.walk import attribute

__all__: list[str] = []


def _only_first(node: ir.Node, gradient: Value | None) -> ValueGradients:
    return [gradient, *[None] * (len(node.inputs) - 1)]


@derivative("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def _reshape(t: Tape, node: ir.Node, grads: ValueGradients) -> ValueGradients:
    x, dy = node.inputs[0], grads[0]
    assert x is not None
    assert dy is not None
    return _only_first(node, t.reshaped(dy, x))


@derivative("Transpose")
def _transpose(t: Tape, node: ir.Node, grads: ValueGradients) -> ValueGradients:
    x, given = node.inputs[0], node.attributes.get("perm")
    assert x is not None
    rank = t.rank(x)
    perm = list(range(rank))[::-1] if given is None else list(given.as_ints())
    return [t.op("Transpose", grads[0], perm=[int(axis) for axis in np.argsort(perm)])]


@derivative("Expand")
def _expand(t: Tape, node: ir.Node, grads: ValueGradients) -> ValueGradients:
    x, dy = node.inputs[0], grads[0]
    assert x is not None
    assert dy is not None
    return _only_first(node, t.narrowed(dy, x, node.outputs[0]))


@derivative("Concat")
def _concat(t: Tape, node: ir.Node, grads: ValueGradients) -> ValueGradients:
    axis = node.attributes["axis"].as_int()
    sizes = [t.size_of(x, axis) for x in node.inputs if x is not None]
    if len(sizes) == 1:
        return [grads[0]]
    lengths = t.op("Concat", *sizes, axis=0)
    return t.ops("Split", grads[0], lengths, outputs=len(sizes), axis=axis)


@derivative("Split")
def _split(t: Tape, node: ir.Node, grads: ValueGradients) -> ValueGradients:
    parts = [
        t.zeros(output) if gradient is None else gradient
        for output, gradient in zip(node.outputs, grads, strict=True)
    ]
    return _only_first(node, t.op("Concat", *parts, axis=attribute(node, "axis", 0)))


@derivative("Slice")
def _slice(t: Tape, node: ir.Node, grads: ValueGradients) -> ValueGradients:
    x, y, dy = node.inputs[0], node.outputs[0], grads[0]
    assert x is not None
    starts = node.inputs[1]
    axes = _literal(node.inputs[3] if len(node.inputs) > 3 else None)
    steps = _literal(node.inputs[4] if len(node.inputs) > 4 else None)
    first = _literal(starts)
    if first is None or (len(node.inputs) > 3 and node.inputs[3] is not None and axes is None):
        return _only_first(node, _scattered(t, node, x, dy))
    if len(node.inputs) > 4 and node.inputs[4] is not None and (steps is None or set(steps) != {1}):
        return _only_first(node, _scattered(t, node, x, dy))
    rank = t.rank(x)
    begins: list[Value] = [t.integers(0)] * rank
    for axis, start in zip(axes or range(len(first)), first, strict=True):
        size = t.size_of(x, axis)
        begin = t.integers(start)
        if start < 0:
            begin = t.op("Max", t.op("Add", size, begin), t.integers(0))
        begins[axis % rank] = t.op("Min", begin, size)
    return _only_first(node, _padded(t, dy, begins, x, y))


def _padded(t: Tape, dy: Value | None, begins: Sequence[Value], x: Value, y: Value) -> Value:
    """A gradient with zeros around it, in the shape of x."""
    before = t.op("Concat", *begins, axis=0)
    after = t.op("Sub", t.op("Sub", t.shape(x), t.shape(y)), before)
    return t.op("Pad", dy, t.op("Concat", before, after, axis=0))


def _literal(value: Value | None) -> list[int] | None:
    """The elements of a small constant; None if it is computed."""
    if value is None:
        return None
    tensor = value.const_value
    producer = value.producer()
    if tensor is None and producer is not None and producer.op_type == "Constant":
        found = producer.attributes.get("value")
        tensor = None if found is None else found.as_tensor()
    return None if tensor is None else [int(item) for item in tensor.numpy().reshape(-1)]


def _scattered(t: Tape, node: ir.Node, x: Value, dy: Value | None) -> Value:
    """The gradient of any choice of elements: the node itself gives the place of each.

    The same node, run on the numbers of the elements, tells which element of x went where.
    """
    count = t.op("ReduceProd", t.shape(x), keepdims=0)
    numbers = t.op("Range", t.whole(0), count, t.whole(1))
    places = t.again(node, t.op("Reshape", numbers, t.shape(x)))
    flat = t.integers(-1)
    return t.reshaped(
        t.op(
            "ScatterElements",
            t.op("Reshape", t.zeros(x), flat),
            t.op("Reshape", places, flat),
            t.op("Reshape", dy, flat),
            axis=0,
            reduction="add",
        ),
        x,
    )


@derivative("Gather")
def _gather(t: Tape, node: ir.Node, grads: ValueGradients) -> ValueGradients:
    x, indices, dy = node.inputs[0], node.inputs[1], grads[0]
    assert x is not None
    assert indices is not None
    axis, rank = attribute(node, "axis", 0) % t.rank(x), t.rank(x)
    if t.rank(indices) == 0:
        # One slice: zeros around it.
        wide = t.op("Unsqueeze", dy, t.integers(axis))
        size = t.size_of(x, axis)
        begin = t.op("Cast", t.op("Reshape", indices, t.integers(1)), to=int(ir.DataType.INT64))
        known = _literal(indices)
        if known is None or known[0] < 0:
            begin = t.op("Mod", t.op("Add", begin, size), size)
        begins = [begin if other == axis else t.integers(0) for other in range(rank)]
        before = t.op("Concat", *begins, axis=0)
        after = t.op("Sub", t.op("Sub", t.shape(x), t.op("Shape", wide)), before)
        return [t.op("Pad", wide, t.op("Concat", before, after, axis=0)), None]
    if axis == 0:
        places = t.op("Unsqueeze", indices, t.integers(-1))
        places = t.op("Cast", places, to=int(ir.DataType.INT64))
        return [t.op("ScatterND", t.zeros(x), places, dy, reduction="add"), None]
    return [_scattered(t, node, x, dy), None]


@derivative("GatherElements", "GatherND", "Tile")
def _chosen(t: Tape, node: ir.Node, grads: ValueGradients) -> ValueGradients:
    x = node.inputs[0]
    assert x is not None
    return _only_first(node, _scattered(t, node, x, grads[0]))


@derivative("Pad")
def _pad(t: Tape, node: ir.Node, grads: ValueGradients) -> ValueGradients:
    x = node.inputs[0]
    assert x is not None
    mode = node.attributes.get("mode")
    if (mode is not None and mode.as_string() != "constant") or len(node.inputs) > 3:
        raise unsupported(node, "pads with more than a constant: no derivative here")
    rank = t.rank(x)
    before = t.op("Slice", node.inputs[1], t.integers(0), t.integers(rank))
    after = t.op("Add", before, t.shape(x))
    return _only_first(node, t.op("Slice", grads[0], before, after))
