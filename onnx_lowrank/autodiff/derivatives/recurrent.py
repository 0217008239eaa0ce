"""Derivatives of recurrent cells: one walk back through the steps.

The outputs hold the state behind every step, so all gates are computed by two products over all
steps at once.  Only the gradient of the state goes from step to step, in a Scan (backpropagation
through time; Werbos, Proc. IEEE 78, 1990).  The equations are those of ONNX's LSTM, GRU and RNN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnx_lowrank.autodiff.derivatives.base import (
    Body,
    Tape,
    Value,
    ValueGradients,
    derivative,
    unsupported,
)
from onnx_lowrank.graph.walk import attribute, float_attribute

__all__: list[str] = []


_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
# Without the attribute activations: one for each direction, in the order of the cell's equations.
_USUAL = {"LSTM": ("sigmoid", "tanh", "tanh"), "GRU": ("sigmoid", "tanh"), "RNN": ("tanh",)}


@dataclass(frozen=True, eq=False)
class _Direction:
    """One direction of a cell.  T steps, B samples, H elements of the state, g gates.

    Attributes:
        backwards: whether it goes from the last step to the first.
        size: H.
        w: ``[g·H, I]``.
        r: ``[g·H, H]``.
        from_x: what the input gives the gates, ``[T, B, g·H]``.
        r_bias: ``[g·H]``, None without biases.
        before: the state before each step, ``[T, B, H]``.
        after: the state behind each step.
        slopes: gradient of the states behind each step.
        last: gradient of the last state, ``[B, H]``.
    """

    backwards: bool
    size: int
    w: Value
    r: Value
    from_x: Value
    r_bias: Value | None
    before: Value
    after: Value
    slopes: Value
    last: Value

    def split(self, t: Tape, value: Value, parts: int) -> tuple[Value, ...]:
        """Parts of H elements each."""
        lengths = t.integers(*[self.size] * parts)
        return t.ops("Split", value, lengths, outputs=parts, axis=-1)

    def from_state(self, t: Tape) -> Value:
        """What the state gives the gates, ``[T, B, g·H]``."""
        made = t.op("MatMul", self.before, t.op("Transpose", self.r, perm=[1, 0]))
        return made if self.r_bias is None else t.op("Add", made, self.r_bias)


@dataclass(frozen=True, eq=False)
class _Slopes:
    """Gradients in one direction.

    Attributes:
        x: of what the input gives the gates, ``[T, B, g·H]``.
        r: of R, ``[g·H, H]``.
        r_bias: of what the state's bias is added to, ``[T, B, g·H]``.
        initial: of the initial state, ``[B, H]``.
        cell: of the initial cell of an LSTM.
    """

    x: Value
    r: Value
    r_bias: Value
    initial: Value
    cell: Value | None = None


def _one(t: Tape, value: Value, index: int, axis: int) -> Value:
    """One direction of a value, without the axis of the directions."""
    return t.op("Gather", value, t.whole(index), axis=axis)


def _shifted(t: Tape, states: Value, first: Value, *, backwards: bool) -> Value:
    """The state before each step: that of the step before, and the initial one."""
    first = t.op("Unsqueeze", first, t.integers(0))
    start, end = (1, 2**31) if backwards else (0, -1)
    rest = t.op("Slice", states, t.integers(start), t.integers(end), t.integers(0))
    return t.op("Concat", *((rest, first) if backwards else (first, rest)), axis=0)


def _product(t: Tape, slopes: Value, rows: Value) -> Value:
    """``Σ slopesᵀ·rows`` over steps and samples."""
    flat = [t.op("Flatten", value, axis=2) for value in (slopes, rows)]
    return t.op("Gemm", *flat, transA=1)


def _one_less(t: Tape, value: Value) -> Value:
    """``1 − v``."""
    return t.op("Sub", t.scalar(1.0), value)


def _sigmoid_slope(t: Tape, value: Value) -> Value:
    """``v (1 − v)`` of ``v = σ(…)``."""
    return t.op("Mul", value, _one_less(t, value))


def _tanh_slope(t: Tape, value: Value) -> Value:
    """``1 − v²`` of ``v = tanh(…)``."""
    return _one_less(t, t.op("Mul", value, value))


def _times(t: Tape, *values: Value) -> Value:
    product = values[0]
    for value in values[1:]:
        product = t.op("Mul", product, value)
    return product


def _rnn(t: Tape, own: _Direction) -> _Slopes:
    """``h = tanh(p)``."""

    def step(body: Body, states: Sequence[Value], items: Sequence[Value]) -> Sequence[Value]:
        slope = body.op("Mul", body.op("Add", items[0], states[0]), items[1])
        return [body.op("MatMul", slope, own.r), slope]

    items = [own.slopes, _tanh_slope(t, own.after)]
    initial, slopes = t.scan([own.last], items, step, backwards=not own.backwards)
    return _Slopes(slopes, _product(t, slopes, own.before), slopes, initial)


def _gru(t: Tape, own: _Direction, *, late: bool) -> _Slopes:
    """``h = (1 − z) n + z h'``; late: the reset gate is applied behind the product with R."""
    from_x = own.split(t, own.from_x, 3)
    from_h = own.split(t, own.from_state(t), 3)
    z, reset = (t.op("Sigmoid", t.op("Add", from_x[i], from_h[i])) for i in (0, 1))
    # n from h = (1 − z) n + z h' would divide by 1 − z, which may be 0.
    gated = t.op("Mul", reset, own.before)
    r_gates, r_new = t.ops("Split", own.r, t.integers(2 * own.size, own.size), outputs=2, axis=0)
    if late:
        inner = t.op("Mul", reset, from_h[2])
    else:
        inner = t.op("MatMul", gated, t.op("Transpose", r_new, perm=[1, 0]))
        if own.r_bias is not None:
            inner = t.op("Add", inner, own.split(t, own.r_bias, 3)[2])
    new = t.op("Tanh", t.op("Add", from_x[2], inner))
    by_z = _times(t, t.op("Sub", own.before, new), _sigmoid_slope(t, z))
    by_new = _times(t, _one_less(t, z), _tanh_slope(t, new))
    by_reset = t.op("Mul", from_h[2] if late else own.before, _sigmoid_slope(t, reset))
    items = [own.slopes, z, reset, by_z, by_new, by_reset]

    def step(body: Body, states: Sequence[Value], items: Sequence[Value]) -> Sequence[Value]:
        dy, z, reset, by_z, by_new, by_reset = items
        dh = body.op("Add", dy, states[0])
        dz, dn = body.op("Mul", dh, by_z), body.op("Mul", dh, by_new)
        through = body.op("Mul", dh, z)
        if late:
            dr = body.op("Mul", dn, by_reset)
            slope = body.op("Concat", dz, dr, body.op("Mul", dn, reset), axis=-1)
            back = body.op("MatMul", slope, own.r)
        else:
            into = body.op("MatMul", dn, r_new)
            dr = body.op("Mul", into, by_reset)
            gates = body.op("Concat", dz, dr, axis=-1)
            back = body.op("Add", body.op("MatMul", gates, r_gates), body.op("Mul", into, reset))
        return [body.op("Add", through, back), body.op("Concat", dz, dr, dn, axis=-1)]

    initial, slopes = t.scan([own.last], items, step, backwards=not own.backwards)
    dz, dr, dn = own.split(t, slopes, 3)
    if late:
        by_state = t.op("Concat", dz, dr, t.op("Mul", dn, reset), axis=-1)
        return _Slopes(slopes, _product(t, by_state, own.before), by_state, initial)
    gates = t.op("Concat", dz, dr, axis=-1)
    parts = _product(t, gates, own.before), _product(t, dn, gated)
    return _Slopes(slopes, t.op("Concat", *parts, axis=0), slopes, initial)


def _lstm(t: Tape, own: _Direction, cell: Value, last_cell: Value) -> _Slopes:
    """``c = f c' + i g``, ``h = o tanh(c)``.

    Args:
        t: the tape.
        own: the direction.
        cell: the initial cell, ``[B, H]``.
        last_cell: gradient of the last cell.
    """
    gates = t.op("Add", own.from_x, own.from_state(t))
    *by_sigmoid, by_tanh = own.split(t, gates, 4)
    i, o, f = (t.op("Sigmoid", gate) for gate in by_sigmoid)
    g = t.op("Tanh", by_tanh)

    def forward(body: Body, states: Sequence[Value], items: Sequence[Value]) -> Sequence[Value]:
        made = body.op("Add", body.op("Mul", items[0], states[0]), items[1])
        return [made, body.op("Identity", made)]

    _, cells = t.scan([cell], [f, t.op("Mul", i, g)], forward, backwards=own.backwards)
    before = _shifted(t, cells, cell, backwards=own.backwards)
    tanh = t.op("Tanh", cells)
    items = [
        own.slopes,
        f,
        t.op("Mul", o, _tanh_slope(t, tanh)),
        _times(t, g, _sigmoid_slope(t, i)),
        _times(t, tanh, _sigmoid_slope(t, o)),
        _times(t, before, _sigmoid_slope(t, f)),
        _times(t, i, _tanh_slope(t, g)),
    ]

    def step(body: Body, states: Sequence[Value], items: Sequence[Value]) -> Sequence[Value]:
        dy, f, by_cell, by_i, by_o, by_f, by_g = items
        dh = body.op("Add", dy, states[0])
        dc = body.op("Add", states[1], body.op("Mul", dh, by_cell))
        slope = body.op(
            "Concat",
            body.op("Mul", dc, by_i),
            body.op("Mul", dh, by_o),
            body.op("Mul", dc, by_f),
            body.op("Mul", dc, by_g),
            axis=-1,
        )
        return [body.op("MatMul", slope, own.r), body.op("Mul", dc, f), slope]

    states = [own.last, last_cell]
    initial, first, slopes = t.scan(states, items, step, backwards=not own.backwards)
    return _Slopes(slopes, _product(t, slopes, own.before), slopes, initial, first)


def _check(node: ir.Node, directions: int) -> None:
    given = node.attributes.get("activations")
    usual = _USUAL[node.op_type] * directions
    if given is not None and tuple(name.lower() for name in given.as_strings()) != usual:
        raise unsupported(node, "with other activations than the usual has no derivative here")
    if float_attribute(node, "clip", 0.0) or attribute(node, "input_forget", 0):
        raise unsupported(node, "with clip or input_forget has no derivative here")
    if attribute(node, "layout", 0):
        raise unsupported(node, "with the batch first has no derivative here")
    inputs = [*node.inputs, *[None] * 8]
    if inputs[4] is not None:
        raise unsupported(node, "with sequences of several lengths has no derivative here")
    if inputs[7] is not None:
        raise unsupported(node, "with peepholes has no derivative here")


@derivative("LSTM", "GRU", "RNN")
def _cell(t: Tape, node: ir.Node, grads: ValueGradients) -> ValueGradients:
    way = node.attributes["direction"].as_string() if "direction" in node.attributes else "forward"
    directions = 2 if way == "bidirectional" else 1
    _check(node, directions)
    x, w, r, bias, _, initial, cell = [*node.inputs, *[None] * 7][:7]
    assert x is not None
    assert w is not None
    assert r is not None
    size = node.attributes["hidden_size"].as_int()
    states = t.further_outputs(node, 1)[0]
    dy, dlast, dcell = [*grads, None, None][:3]
    found: list[_Slopes] = []
    by_x: list[Value] = []
    for index in range(directions):
        backwards = way == "reverse" or index == 1
        after, own_w = _one(t, states, index, 1), _one(t, w, index, 0)
        zeros = t.zeros(_one(t, after, 0, 0))
        # Initial states and gradients of last ones are zeros where they are not there.
        first, last, start, end = (
            zeros if value is None else _one(t, value, index, 0)
            for value in (initial, dlast, cell, dcell)
        )
        from_x, r_bias = t.op("MatMul", x, t.op("Transpose", own_w, perm=[1, 0])), None
        if bias is not None:
            both, half = _one(t, bias, index, 0), _GATES[node.op_type] * size
            w_bias, r_bias = t.ops("Split", both, t.integers(half, half), outputs=2, axis=0)
            from_x = t.op("Add", from_x, w_bias)
        direction = _Direction(
            backwards=backwards,
            size=size,
            w=own_w,
            r=_one(t, r, index, 0),
            from_x=from_x,
            r_bias=r_bias,
            before=_shifted(t, after, first, backwards=backwards),
            after=after,
            slopes=t.zeros(after) if dy is None else _one(t, dy, index, 1),
            last=last,
        )
        if node.op_type == "LSTM":
            made = _lstm(t, direction, start, end)
        elif node.op_type == "GRU":
            late = bool(attribute(node, "linear_before_reset", 0))
            made = _gru(t, direction, late=late)
        else:
            made = _rnn(t, direction)
        found.append(made)
        by_x.append(t.op("MatMul", made.x, own_w))

    def stacked(parts: Sequence[Value]) -> Value:
        return t.op("Concat", *(t.op("Unsqueeze", part, t.integers(0)) for part in parts), axis=0)

    def sums(value: Value) -> Value:
        return t.summed(value, [0, 1], keep=False)

    dw = [_product(t, made.x, x) for made in found] if t.needs(w) else []
    biases = (
        [t.op("Concat", sums(made.x), sums(made.r_bias), axis=0) for made in found]
        if t.needs(bias)
        else []
    )
    cells = [made.cell for made in found if made.cell is not None] if t.needs(cell) else []
    result = [
        t.add(by_x) if t.needs(x) else None,
        stacked(dw) if dw else None,
        stacked([made.r for made in found]) if t.needs(r) else None,
        stacked(biases) if biases else None,
        None,
        stacked([made.initial for made in found]) if t.needs(initial) else None,
        stacked(cells) if cells else None,
    ]
    return result[: len(node.inputs)]
