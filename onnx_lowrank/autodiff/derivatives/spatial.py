"""Derivatives of convolutions and poolings."""

from __future__ import annotations

from collections.abc import Sequence

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


def _ints(node: ir.Node, name: str, default: Sequence[int]) -> list[int]:
    given = node.attributes.get(name)
    return list(default) if given is None else [int(item) for item in given.as_ints()]


def _explicit(node: ir.Node) -> None:
    given = node.attributes.get("auto_pad")
    if given is not None and given.as_string() not in ("NOTSET", "VALID"):
        raise unsupported(node, f"with auto_pad={given.as_string()} has no derivative here")


def _unpadded(t: Tape, wide: Value, x: Value, pads: Sequence[int], spatial: int) -> Value:
    """A gradient on the padded input, without the padding, in the shape of x.

    Where a stride leaves the last rows of x unread, the gradient ends before them: zeros there.
    """
    axes = list(range(2, 2 + spatial))
    begins = t.integers(*pads[:spatial])
    inner = t.op("Slice", t.shape(x), t.integers(2), t.integers(2 + spatial))
    cut = t.op("Slice", wide, begins, t.op("Add", begins, inner), t.integers(*axes))
    missing = t.op("Sub", t.shape(x), t.op("Shape", cut))
    return t.op("Pad", cut, t.op("Concat", t.integers(*[0] * (2 + spatial)), missing, axis=0))


@derivative("Conv")
def _conv(t: Tape, node: ir.Node, grads: ValueGradients) -> ValueGradients:
    x, w, dy = node.inputs[0], node.inputs[1], grads[0]
    assert x is not None
    assert w is not None
    assert dy is not None
    _explicit(node)
    spatial = t.rank(x) - 2
    ones = [1] * spatial
    strides, dilations = _ints(node, "strides", ones), _ints(node, "dilations", ones)
    pads = _ints(node, "pads", [0] * 2 * spatial)
    group = attribute(node, "group", 1)
    dx = dw = db = None
    if t.needs(x):
        plain = set(strides) == {1}
        dx = t.op(
            "ConvTranspose",
            dy,
            w,
            strides=strides,
            dilations=dilations,
            pads=pads if plain else [0] * 2 * spatial,
            group=group,
        )
        if not plain:
            dx = _unpadded(t, dx, x, pads, spatial)
    if t.needs(w):
        if group != 1:
            raise unsupported(node, "is grouped: no derivative by its weight here")
        # Channels take the place of samples: dW[o, i] = Σ_b dy[b, o] ⋆ x[b, i].
        order = [1, 0, *range(2, 2 + spatial)]
        dw = t.op(
            "Conv",
            t.op("Transpose", x, perm=order),
            t.op("Transpose", dy, perm=order),
            strides=dilations,
            dilations=strides,
            pads=pads,
        )
        dw = t.op("Transpose", dw, perm=order)
        if set(strides) != {1}:  # rows of x that no step reaches make it too large
            kernel = t.op("Slice", t.shape(w), t.integers(2), t.integers(2 + spatial))
            dw = t.op(
                "Slice", dw, t.integers(*[0] * spatial), kernel, t.integers(*range(2, 2 + spatial))
            )
    if len(node.inputs) > 2 and t.needs(node.inputs[2]):
        db = t.summed(dy, [0, *range(2, 2 + spatial)], keep=False)
    return [dx, dw, db][: len(node.inputs)]


@derivative("MaxPool")
def _max_pool(t: Tape, node: ir.Node, grads: ValueGradients) -> ValueGradients:
    x, dy = node.inputs[0], grads[0]
    assert x is not None
    if attribute(node, "storage_order", 0) or any(part is not None for part in grads[1:]):
        raise unsupported(node, "in column order has no derivative here")
    # Where each largest element was, which it gives when asked.
    places = t.further_outputs(node, 2)[1]
    flat = t.integers(-1)
    zeros = t.op("Reshape", t.zeros(x), flat)
    places, dy = t.op("Reshape", places, flat), t.op("Reshape", dy, flat)
    return [t.reshaped(t.op("ScatterElements", zeros, places, dy, axis=0, reduction="add"), x)]


@derivative("AveragePool")
def _average_pool(t: Tape, node: ir.Node, grads: ValueGradients) -> ValueGradients:
    x, y, dy = node.inputs[0], node.outputs[0], grads[0]
    assert x is not None
    _explicit(node)
    spatial = t.rank(x) - 2
    ones = [1] * spatial
    kernel = _ints(node, "kernel_shape", ones)
    strides, dilations = _ints(node, "strides", ones), _ints(node, "dilations", ones)
    pads = _ints(node, "pads", [0] * 2 * spatial)
    if attribute(node, "ceil_mode", 0) or (
        any(pads) and not attribute(node, "count_include_pad", 0)
    ):
        raise unsupported(node, "counts fewer elements at the edges: no derivative here")
    size = 1
    for length in kernel:
        size *= length
    # One channel at a time, so that a single kernel serves them all.
    tail = t.op("Slice", t.shape(y), t.integers(2), t.integers(2 + spatial))
    flat = t.op("Reshape", dy, t.op("Concat", t.integers(-1, 1), tail, axis=0))
    weights = t.op("Expand", t.scalar(1.0 / size), t.integers(1, 1, *kernel))
    wide = t.op("ConvTranspose", flat, weights, strides=strides, dilations=dilations)
    full = t.op("Slice", t.op("Shape", wide), t.integers(2), t.integers(2 + spatial))
    head = t.op("Slice", t.shape(x), t.integers(0), t.integers(2))
    wide = t.op("Reshape", wide, t.op("Concat", head, full, axis=0))
    return [_unpadded(t, wide, x, pads, spatial)]
