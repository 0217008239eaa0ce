"""Derivatives of sums over axes, and of the normalizations that are built on them."""

from __future__ import annotations

import onnx_ir as ir

from onnx_lowrank.autodiff.derivatives.base import (
    Tape,
    Value,
    ValueGradients,
    derivative,
    unsupported,
)
from onnx_lowrank.graph.walk import attribute, float_attribute

__all__: list[str] = []


def _axes(t: Tape, node: ir.Node) -> Value | None:
    """The axes that a node reduces; None for all of them."""
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        return node.inputs[1]
    given = node.attributes.get("axes")
    return None if given is None else t.integers(*given.as_ints())


def _kept(t: Tape, node: ir.Node, value: Value) -> Value:
    """An output of a node, or its gradient, with the axes that it reduced at size 1."""
    if attribute(node, "keepdims", 1):
        return value
    axes, x = _axes(t, node), node.inputs[0]
    assert x is not None
    if axes is None:
        return t.op("Reshape", value, t.integers(*[1] * t.rank(x)))
    return t.op("Unsqueeze", value, axes)


def _reduced(node: ir.Node, gradient: Value) -> ValueGradients:
    if attribute(node, "noop_with_empty_axes", 0):
        raise unsupported(node, "may reduce nothing: no derivative here")
    return [gradient, *[None] * (len(node.inputs) - 1)]


@derivative("ReduceSum")
def _sum(t: Tape, node: ir.Node, grads: ValueGradients) -> ValueGradients:
    x, dy = node.inputs[0], grads[0]
    assert x is not None
    assert dy is not None
    return _reduced(node, t.op("Expand", _kept(t, node, dy), t.shape(x)))


@derivative("ReduceMean", "GlobalAveragePool")
def _mean(t: Tape, node: ir.Node, grads: ValueGradients) -> ValueGradients:
    x, y, dy = node.inputs[0], node.outputs[0], grads[0]
    assert x is not None
    assert dy is not None
    wide = dy if node.op_type == "GlobalAveragePool" else _kept(t, node, dy)
    share = t.op("Div", _count(t, y), _count(t, x))
    return _reduced(node, t.op("Expand", t.op("Mul", wide, share), t.shape(x)))


def _count(t: Tape, value: Value) -> Value:
    """How many elements a value has, as a scalar of float32."""
    return t.op("Cast", t.op("Size", value), to=int(ir.DataType.FLOAT))


@derivative("ReduceSumSquare")
def _sum_square(t: Tape, node: ir.Node, grads: ValueGradients) -> ValueGradients:
    x, dy = node.inputs[0], grads[0]
    assert dy is not None
    wide = t.op("Mul", _kept(t, node, dy), t.scalar(2.0))
    return _reduced(node, t.op("Mul", x, wide))


@derivative("ReduceL2")
def _norm(t: Tape, node: ir.Node, grads: ValueGradients) -> ValueGradients:
    x, dy = node.inputs[0], grads[0]
    assert dy is not None
    # The norm of zeros has no slope: 0 is one of its subgradients.
    length = t.op("Max", node.outputs[0], t.scalar(1e-30))
    return _reduced(node, t.op("Mul", x, _kept(t, node, t.op("Div", dy, length))))


@derivative("ReduceMax", "ReduceMin")
def _extreme(t: Tape, node: ir.Node, grads: ValueGradients) -> ValueGradients:
    x, dy = node.inputs[0], grads[0]
    assert dy is not None
    chosen = t.op("Equal", x, _kept(t, node, node.outputs[0]))
    return _reduced(node, t.op("Where", chosen, _kept(t, node, dy), t.scalar(0.0)))


@derivative("Softmax", "LogSoftmax")
def _softmax(t: Tape, node: ir.Node, grads: ValueGradients) -> ValueGradients:
    y, dy = node.outputs[0], grads[0]
    assert dy is not None
    axis = attribute(node, "axis", -1)
    if node.op_type == "Softmax":
        return [t.op("Mul", y, t.op("Sub", dy, t.summed(t.op("Mul", dy, y), [axis])))]
    return [t.op("Sub", dy, t.op("Mul", t.op("Exp", y), t.summed(dy, [axis])))]


@derivative("LayerNormalization")
def _layer_norm(t: Tape, node: ir.Node, grads: ValueGradients) -> ValueGradients:
    x, scale, dy, y = node.inputs[0], node.inputs[1], grads[0], node.outputs[0]
    assert x is not None
    assert scale is not None
    assert dy is not None
    if any(gradient is not None for gradient in grads[1:]):
        raise unsupported(node, "has its mean or deviation read: no derivative here")
    rank = t.rank(x)
    first = attribute(node, "axis", -1) % rank
    # Its own mean and inverse deviation, which it gives when asked.
    mean, deviation = t.further_outputs(node, 3)[1:]
    unit = t.op("Mul", t.op("Sub", x, mean), deviation)
    found: list[Value | None] = [None] * len(node.inputs)
    if t.needs(x):
        axes = list(range(first, rank))
        count = _count_of(t, x, first)
        inner = t.op("Mul", dy, scale)
        level = t.op("Div", t.summed(inner, axes), count)
        slope = t.op("Div", t.summed(t.op("Mul", inner, unit), axes), count)
        rest = t.op("Sub", t.op("Sub", inner, level), t.op("Mul", unit, slope))
        found[0] = t.op("Mul", rest, deviation)
    if t.needs(scale):
        found[1] = t.narrowed(t.op("Mul", dy, unit), scale, y)
    if len(node.inputs) > 2 and node.inputs[2] is not None and t.needs(node.inputs[2]):
        found[2] = t.narrowed(dy, node.inputs[2], y)
    return found


def _count_of(t: Tape, x: Value, first: int) -> Value:
    """How many elements the axes from ``first`` on have together, a scalar of float32."""
    tail = t.op("Slice", t.shape(x), t.integers(first), t.integers(t.rank(x)))
    return t.op("Cast", t.op("ReduceProd", tail, keepdims=0), to=int(ir.DataType.FLOAT))


@derivative("BatchNormalization")
def _batch_norm(t: Tape, node: ir.Node, grads: ValueGradients) -> ValueGradients:
    x, scale, offset, mean, variance = node.inputs
    dy = grads[0]
    assert x is not None
    assert scale is not None
    assert variance is not None
    assert mean is not None
    assert dy is not None
    if attribute(node, "training_mode", 0) or t.needs(mean) or t.needs(variance):
        raise unsupported(node, "is in training mode: no derivative here")
    rank = t.rank(x)
    column = t.integers(-1, *[1] * (rank - 2))

    def spread(value: Value) -> Value:
        return t.op("Reshape", value, column) if rank > 2 else value

    steady = t.op("Add", variance, t.scalar(float_attribute(node, "epsilon", 1e-5)))
    rate = t.op("Reciprocal", t.op("Sqrt", steady))
    others = [axis for axis in range(rank) if axis != 1]
    dx = ds = db = None
    if t.needs(x):
        dx = t.op("Mul", dy, spread(t.op("Mul", scale, rate)))
    if t.needs(scale):
        unit = t.op("Mul", t.op("Sub", x, spread(mean)), spread(rate))
        ds = t.summed(t.op("Mul", dy, unit), others, keep=False)
    if t.needs(offset):
        db = t.summed(dy, others, keep=False)
    return [dx, ds, db, None, None]
