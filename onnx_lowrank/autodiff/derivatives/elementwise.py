"""Derivatives of operators that work on each element by itself."""

from __future__ import annotations

import math
from collections.abc import Callable

import onnx_ir as ir

from onnx_lowrank.autodiff.derivatives.base import (
    Tape,
    Value,
    ValueGradients,
    derivative,
    unsupported,
)
from onnx_lowrank.graph.walk import float_attribute

__all__: list[str] = []

Slope = Callable[[Tape, ir.Node, Value, Value], Value]


def _unary(*op_types: str, domain: str = "") -> Callable[[Slope], Slope]:
    """Enter dy/dx, from the node, x and y, as the derivative of y = f(x)."""

    def enter(slope: Slope) -> Slope:
        @derivative(*op_types, domain=domain)
        def _(t: Tape, node: ir.Node, grads: ValueGradients) -> ValueGradients:
            x, y, dy = node.inputs[0], node.outputs[0], grads[0]
            assert x is not None
            assert dy is not None
            return [t.op("Mul", dy, slope(t, node, x, y))]

        return slope

    return enter


def _choice(t: Tape, condition: Value, yes: Value, no: float) -> Value:
    return t.op("Where", condition, yes, t.scalar(no))


@derivative("Identity", "Dropout")
def _identity(t: Tape, node: ir.Node, grads: ValueGradients) -> ValueGradients:
    if node.op_type == "Dropout" and len(node.inputs) > 2 and node.inputs[2] is not None:
        raise unsupported(node, "may be in training mode, which has no derivative here")
    return [grads[0]]


@derivative("Sign", "Floor", "Ceil", "Round")
def _flat(t: Tape, node: ir.Node, grads: ValueGradients) -> ValueGradients:
    return [None]


@derivative("Cast")
def _cast(t: Tape, node: ir.Node, grads: ValueGradients) -> ValueGradients:
    x, dy = node.inputs[0], grads[0]
    assert x is not None
    return [t.op("Cast", dy, to=int(x.dtype or ir.DataType.FLOAT))]


@derivative("Neg")
def _neg(t: Tape, node: ir.Node, grads: ValueGradients) -> ValueGradients:
    return [t.op("Neg", grads[0])]


@derivative("Add", "Sub", "Sum", "Mean")
def _add(t: Tape, node: ir.Node, grads: ValueGradients) -> ValueGradients:
    dy, found = grads[0], list[Value | None]()
    assert dy is not None
    if node.op_type == "Mean":
        dy = t.op("Div", dy, t.scalar(len(node.inputs)))
    for index, x in enumerate(node.inputs):
        if x is None or not t.needs(x):
            found.append(None)
            continue
        own = t.narrowed(dy, x, node.outputs[0])
        found.append(t.op("Neg", own) if node.op_type == "Sub" and index else own)
    return found


@derivative("Mul")
def _mul(t: Tape, node: ir.Node, grads: ValueGradients) -> ValueGradients:
    found: list[Value | None] = []
    for x, other in ((node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0])):
        assert x is not None
        found.append(
            t.narrowed(t.op("Mul", grads[0], other), x, node.outputs[0]) if t.needs(x) else None
        )
    return found


@derivative("Div")
def _div(t: Tape, node: ir.Node, grads: ValueGradients) -> ValueGradients:
    a, b, y = node.inputs[0], node.inputs[1], node.outputs[0]
    assert a is not None
    assert b is not None
    da = t.op("Div", grads[0], b)
    first = t.narrowed(da, a, y) if t.needs(a) else None
    if not t.needs(b):
        return [first, None]
    return [first, t.narrowed(t.op("Neg", t.op("Mul", da, y)), b, y)]


@derivative("Pow")
def _pow(t: Tape, node: ir.Node, grads: ValueGradients) -> ValueGradients:
    x, p, y = node.inputs[0], node.inputs[1], node.outputs[0]
    assert x is not None
    assert p is not None
    if t.needs(p):
        raise unsupported(node, "has an exponent that depends on factors: no derivative here")
    if p.dtype != x.dtype:
        p = t.op("Cast", p, to=int(x.dtype or ir.DataType.FLOAT))
    lower = t.op("Pow", x, t.op("Sub", p, t.scalar(1.0)))
    return [t.narrowed(t.op("Mul", grads[0], t.op("Mul", p, lower)), x, y), None]


@derivative("Where")
def _where(t: Tape, node: ir.Node, grads: ValueGradients) -> ValueGradients:
    condition, a, b = node.inputs
    assert condition is not None
    assert a is not None
    assert b is not None
    dy, y = grads[0], node.outputs[0]
    assert dy is not None
    zero = t.scalar(0.0)
    return [
        None,
        t.narrowed(t.op("Where", condition, dy, zero), a, y) if t.needs(a) else None,
        t.narrowed(t.op("Where", condition, zero, dy), b, y) if t.needs(b) else None,
    ]


@derivative("Max", "Min")
def _extreme(t: Tape, node: ir.Node, grads: ValueGradients) -> ValueGradients:
    dy, y = grads[0], node.outputs[0]
    assert dy is not None
    return [
        t.narrowed(_choice(t, t.op("Equal", x, y), dy, 0.0), x, y)
        if x is not None and t.needs(x)
        else None
        for x in node.inputs
    ]


@derivative("Clip")
def _clip(t: Tape, node: ir.Node, grads: ValueGradients) -> ValueGradients:
    dy, x, y = grads[0], node.inputs[0], node.outputs[0]
    assert dy is not None
    if any(t.needs(limit) for limit in node.inputs[1:]):
        raise unsupported(node, "has limits that depend on factors: no derivative here")
    return [_choice(t, t.op("Equal", x, y), dy, 0.0), *[None] * (len(node.inputs) - 1)]


@derivative("Relu")
def _relu(t: Tape, node: ir.Node, grads: ValueGradients) -> ValueGradients:
    dy, y = grads[0], node.outputs[0]
    assert dy is not None
    return [_choice(t, t.op("Greater", y, t.scalar(0.0)), dy, 0.0)]


@derivative("PRelu")
def _prelu(t: Tape, node: ir.Node, grads: ValueGradients) -> ValueGradients:
    x, slope, dy, y = node.inputs[0], node.inputs[1], grads[0], node.outputs[0]
    assert x is not None
    assert slope is not None
    positive = t.op("Greater", x, t.scalar(0.0))
    dx = t.op("Where", positive, dy, t.op("Mul", dy, slope))
    if not t.needs(slope):
        return [dx, None]
    return [dx, t.narrowed(t.op("Where", positive, t.scalar(0.0), t.op("Mul", dy, x)), slope, y)]


@_unary("LeakyRelu")
def _leaky(t: Tape, node: ir.Node, x: Value, y: Value) -> Value:
    positive = t.op("Greater", x, t.scalar(0.0))
    return _choice(t, positive, t.scalar(1.0), float_attribute(node, "alpha", 0.01))


@_unary("Sqrt")
def _sqrt(t: Tape, node: ir.Node, x: Value, y: Value) -> Value:
    return t.op("Div", t.scalar(0.5), y)


@_unary("Exp")
def _exp(t: Tape, node: ir.Node, x: Value, y: Value) -> Value:
    return y


@_unary("Log")
def _log(t: Tape, node: ir.Node, x: Value, y: Value) -> Value:
    return t.op("Reciprocal", x)


@_unary("Reciprocal")
def _reciprocal(t: Tape, node: ir.Node, x: Value, y: Value) -> Value:
    return t.op("Neg", t.op("Mul", y, y))


@_unary("Abs")
def _abs(t: Tape, node: ir.Node, x: Value, y: Value) -> Value:
    return t.op("Sign", x)


@_unary("Sin")
def _sin(t: Tape, node: ir.Node, x: Value, y: Value) -> Value:
    return t.op("Cos", x)


@_unary("Cos")
def _cos(t: Tape, node: ir.Node, x: Value, y: Value) -> Value:
    return t.op("Neg", t.op("Sin", x))


@_unary("Erf")
def _erf(t: Tape, node: ir.Node, x: Value, y: Value) -> Value:
    bell = t.op("Exp", t.op("Neg", t.op("Mul", x, x)))
    return t.op("Mul", bell, t.scalar(2.0 / math.sqrt(math.pi)))


@_unary("Tanh")
def _tanh(t: Tape, node: ir.Node, x: Value, y: Value) -> Value:
    return t.op("Sub", t.scalar(1.0), t.op("Mul", y, y))


@_unary("Sigmoid")
def _sigmoid(t: Tape, node: ir.Node, x: Value, y: Value) -> Value:
    return t.op("Mul", y, t.op("Sub", t.scalar(1.0), y))


@_unary("Softplus")
def _softplus(t: Tape, node: ir.Node, x: Value, y: Value) -> Value:
    return t.op("Sigmoid", x)


@_unary("Elu")
def _elu(t: Tape, node: ir.Node, x: Value, y: Value) -> Value:
    below = t.op("Add", y, t.scalar(float_attribute(node, "alpha", 1.0)))
    return t.op("Where", t.op("Greater", x, t.scalar(0.0)), t.scalar(1.0), below)


def _inside(t: Tape, x: Value, limit: float) -> Value:
    return t.op("Less", t.op("Abs", x), t.scalar(limit))


@_unary("HardSigmoid")
def _hard_sigmoid(t: Tape, node: ir.Node, x: Value, y: Value) -> Value:
    # Distance from the middle, 1/2, tells the straight part from the flat ones.
    middle = t.op("Sub", y, t.scalar(0.5))
    return _choice(t, _inside(t, middle, 0.5), t.scalar(float_attribute(node, "alpha", 0.2)), 0.0)


@_unary("HardSwish")
def _hard_swish(t: Tape, node: ir.Node, x: Value, y: Value) -> Value:
    bent = t.op("Add", t.op("Div", x, t.scalar(3.0)), t.scalar(0.5))
    outside = t.op("Where", t.op("Greater", x, t.scalar(0.0)), t.scalar(1.0), t.scalar(0.0))
    return t.op("Where", _inside(t, x, 3.0), bent, outside)


@_unary("Mish")
def _mish(t: Tape, node: ir.Node, x: Value, y: Value) -> Value:
    soft = t.op("Tanh", t.op("Softplus", x))
    rise = t.op("Sub", t.scalar(1.0), t.op("Mul", soft, soft))
    return t.op("Add", soft, t.op("Mul", t.op("Mul", x, t.op("Sigmoid", x)), rise))


def _normal_slope(t: Tape, x: Value) -> Value:
    """d/dx of x Φ(x): Φ(x) + x φ(x)."""
    scaled = t.op("Mul", x, t.scalar(math.sqrt(0.5)))
    share = t.op("Mul", t.op("Erf", scaled), t.scalar(0.5))
    bell = t.op("Exp", t.op("Neg", t.op("Mul", scaled, scaled)))
    density = t.op("Mul", t.op("Mul", x, bell), t.scalar(1.0 / math.sqrt(2.0 * math.pi)))
    return t.op("Add", t.op("Add", share, t.scalar(0.5)), density)


@_unary("Gelu")
def _gelu(t: Tape, node: ir.Node, x: Value, y: Value) -> Value:
    given = node.attributes.get("approximate")
    if given is None or given.as_string() == "none":
        return _normal_slope(t, x)
    # 0.5 x (1 + tanh u), u = √(2/π) (x + 0.044715 x³)
    factor, cubic = math.sqrt(2.0 / math.pi), 0.044715
    square = t.op("Mul", x, x)
    inner = t.op("Add", t.op("Mul", square, t.scalar(cubic)), t.scalar(1.0))
    bent = t.op("Tanh", t.op("Mul", t.op("Mul", x, inner), t.scalar(factor)))
    rate = t.op("Add", t.op("Mul", square, t.scalar(3.0 * cubic * factor)), t.scalar(factor))
    rise = t.op("Mul", t.op("Sub", t.scalar(1.0), t.op("Mul", bent, bent)), rate)
    both = t.op("Add", t.op("Add", bent, t.scalar(1.0)), t.op("Mul", x, rise))
    return t.op("Mul", both, t.scalar(0.5))


@_unary("Gelu", domain="com.microsoft")
def _fused_gelu(t: Tape, node: ir.Node, x: Value, y: Value) -> Value:
    return _normal_slope(t, x)


@_unary("QuickGelu", domain="com.microsoft")
def _quick_gelu(t: Tape, node: ir.Node, x: Value, y: Value) -> Value:
    alpha = t.scalar(float_attribute(node, "alpha", 1.702))
    scaled = t.op("Mul", x, alpha)
    share = t.op("Sigmoid", scaled)
    rise = t.op("Mul", scaled, t.op("Sub", t.scalar(1.0), share))
    return t.op("Mul", share, t.op("Add", t.scalar(1.0), rise))
