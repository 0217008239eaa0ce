"""Derivatives of products."""

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


@derivative("MatMul")
def _matmul(t: Tape, node: ir.Node, grads: ValueGradients) -> ValueGradients:
    a, b, dy, y = node.inputs[0], node.inputs[1], grads[0], node.outputs[0]
    assert a is not None
    assert b is not None
    assert dy is not None
    ranks = t.rank(a), t.rank(b)
    if min(ranks) < 2:
        return _vector(t, node, a, b, dy)
    if ranks[1] == 2:
        # One product of matrices, with the transposes inside of Gemm: no copies.
        flat = t.op("Reshape", dy, t.op("Concat", t.integers(-1), t.size_of(b, 1), axis=0))
        da = t.op("Gemm", flat, b, transB=1) if t.needs(a) else None
        db = None
        if t.needs(b):
            rows = t.op("Reshape", a, t.op("Concat", t.integers(-1), t.size_of(b, 0), axis=0))
            db = t.op("Gemm", rows, flat, transA=1)
        return [None if da is None else t.reshaped(da, a), db]
    da = t.op("MatMul", dy, _swapped(t, b)) if t.needs(a) else None
    db = t.op("MatMul", _swapped(t, a), dy) if t.needs(b) else None
    return [
        None if da is None else _narrowed_batch(t, da, a, y),
        None if db is None else _narrowed_batch(t, db, b, y),
    ]


def _swapped(t: Tape, value: Value) -> Value:
    rank = t.rank(value)
    return t.op("Transpose", value, perm=[*range(rank - 2), rank - 1, rank - 2])


def _narrowed_batch(t: Tape, gradient: Value, value: Value, result: Value) -> Value:
    """Sum over the batch axes along which a factor was repeated."""
    own, other = t.rank(value), t.rank(result)
    sizes = list(value.shape or [])[:-2]
    wide = list(result.shape or [])[:-2]
    known = len(sizes) == own - 2 and len(wide) == other - 2
    if (
        own == other
        and known
        and all(
            (isinstance(s, int) and s != 1)
            or (s == w and not isinstance(s, int) and s.value is not None)
            for s, w in zip(sizes, wide, strict=True)
        )
    ):
        return gradient
    # The batch axes are those of the gradient itself: compared as the model runs.
    before = t.shape(value)
    if other > own:
        before = t.op("Concat", t.integers(*[1] * (other - own)), before, axis=0)
    differs = t.op("Not", t.op("Equal", before, t.op("Shape", gradient)))
    axes = t.op("Reshape", t.op("NonZero", differs), t.integers(-1))
    summed = t.op("ReduceSum", gradient, axes, keepdims=1, noop_with_empty_axes=1)
    return t.reshaped(summed, value) if other > own else summed


def _vector(t: Tape, node: ir.Node, a: Value, b: Value, dy: Value) -> ValueGradients:
    """A product with a vector."""
    ranks = t.rank(a), t.rank(b)
    if ranks[1] == 1 and ranks[0] <= 2:
        column = t.op("Unsqueeze", dy, t.integers(-1))  # [m, 1] or, for two vectors, [1]
        da = t.op("Mul", column, b)
        db = t.op("Mul", column, a)
        return [
            t.reshaped(da, a),
            t.summed(db, [0], keep=False) if ranks[0] == 2 else db,
        ]
    if ranks == (1, 2):
        column = t.op("Unsqueeze", a, t.integers(-1))
        return [t.op("MatMul", b, dy), t.op("Mul", column, t.op("Unsqueeze", dy, t.integers(0)))]
    raise unsupported(node, "multiplies a vector with a batch of matrices: no derivative here")


@derivative("FusedMatMul", domain="com.microsoft")
def _fused_matmul(t: Tape, node: ir.Node, grads: ValueGradients) -> ValueGradients:
    a, b, dy, y = node.inputs[0], node.inputs[1], grads[0], node.outputs[0]
    assert a is not None
    assert b is not None
    assert dy is not None
    if attribute(node, "transBatchA", 0) or attribute(node, "transBatchB", 0):
        raise unsupported(node, "moves batch axes: no derivative here")
    if min(t.rank(a), t.rank(b)) < 2:
        raise unsupported(node, "multiplies a vector: no derivative here")
    swapped = attribute(node, "transA", 0), attribute(node, "transB", 0)
    dy = t.op("Mul", dy, t.scalar(float_attribute(node, "alpha", 1.0)))
    da = db = None
    if t.needs(a):
        da = t.op("MatMul", dy, b if swapped[1] else _swapped(t, b))
        if swapped[0]:
            da = t.op("Transpose", da, perm=_last_two(max(t.rank(a), t.rank(b))))
        da = _narrowed_batch(t, da, a, y)
    if t.needs(b):
        db = t.op("MatMul", a if swapped[0] else _swapped(t, a), dy)
        if swapped[1]:
            db = t.op("Transpose", db, perm=_last_two(max(t.rank(a), t.rank(b))))
        db = _narrowed_batch(t, db, b, y)
    return [da, db]


def _last_two(rank: int) -> list[int]:
    return [*range(rank - 2), rank - 1, rank - 2]


@derivative("Gemm")
def _gemm(t: Tape, node: ir.Node, grads: ValueGradients) -> ValueGradients:
    a, b, dy, y = node.inputs[0], node.inputs[1], grads[0], node.outputs[0]
    assert dy is not None
    swap_a, swap_b = attribute(node, "transA", 0), attribute(node, "transB", 0)
    alpha, beta = float_attribute(node, "alpha", 1.0), float_attribute(node, "beta", 1.0)
    da = db = dc = None
    if t.needs(a):
        da = (
            t.op("Gemm", b, dy, alpha=alpha, transA=swap_b, transB=1)
            if swap_a
            else t.op("Gemm", dy, b, alpha=alpha, transB=1 - swap_b)
        )
    if t.needs(b):
        db = (
            t.op("Gemm", dy, a, alpha=alpha, transA=1, transB=swap_a)
            if swap_b
            else t.op("Gemm", a, dy, alpha=alpha, transA=1 - swap_a)
        )
    c = node.inputs[2] if len(node.inputs) > 2 else None
    if c is not None and t.needs(c):
        dc = t.narrowed(dy, c, y)
        if beta != 1.0:
            dc = t.op("Mul", dc, t.scalar(beta))
    return [da, db, dc][: len(node.inputs)]


@derivative("Einsum")
def _einsum(t: Tape, node: ir.Node, grads: ValueGradients) -> ValueGradients:
    equation = node.attributes["equation"].as_string().replace(" ", "")
    dy = grads[0]
    terms, arrow, out = equation.partition("->")
    parts = terms.split(",")
    if (
        not arrow
        or "..." in equation
        or len(parts) != 2
        or any(len(set(part)) < len(part) for part in parts)
    ):
        raise unsupported(node, f"with the equation {equation!r} has no derivative here")
    found: list[Value | None] = []
    for own, other in ((0, 1), (1, 0)):
        x = node.inputs[own]
        if not t.needs(x):
            found.append(None)
            continue
        # A letter that only this operand has was summed over: its gradient is repeated.
        if set(parts[own]) - set(parts[other]) - set(out):
            raise unsupported(node, f"with the equation {equation!r} has no derivative here")
        swapped = f"{out},{parts[other]}->{parts[own]}"
        found.append(t.op("Einsum", dy, node.inputs[other], equation=swapped))
    return found
