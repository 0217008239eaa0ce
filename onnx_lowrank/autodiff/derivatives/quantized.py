"""Derivatives of integers with scales, by the scales: ``(q − z)·s`` changes by ``q − z``."""

from __future__ import annotations

import onnx_ir as ir

from onnx_lowrank.autodiff.derivatives.base import Tape, ValueGradients, derivative, unsupported
from onnx_lowrank.graph.walk import attribute, static_shape

__all__: list[str] = []


@derivative("DequantizeLinear")
def _dequantize(t: Tape, node: ir.Node, grads: ValueGradients) -> ValueGradients:
    q, scale, dy = node.inputs[0], node.inputs[1], grads[0]
    assert q is not None
    assert scale is not None
    assert dy is not None
    sizes, own = static_shape(q.shape), static_shape(scale.shape)
    if sizes is None or own is None:
        raise unsupported(node, "has sizes that are not known: no derivative here")
    # The same node with scales of 1 gives q − z.
    ones = t.op("Expand", t.scalar(1.0), t.shape(scale))
    slope = t.op("Mul", dy, t.scaled(node, ones))
    rank = len(sizes)
    axis = attribute(node, "axis", 1) % max(rank, 1)
    block = attribute(node, "block_size", 0)
    others = [n for n in range(rank) if n != axis]
    if not own or (len(own) == 1 and not block):  # one scale, or one for each index of an axis
        single = not own or own == (1,)
        found = t.summed(slope, range(rank) if single else others, keep=False)
        return [None, t.reshaped(found, scale), *[None] * (len(node.inputs) - 2)]
    missing = own[axis] * block - sizes[axis]
    if missing:  # the last block is not full
        after = [missing if n == axis else 0 for n in range(rank)]
        slope = t.op("Pad", slope, t.integers(*[0] * rank, *after))
    apart = (*sizes[:axis], own[axis], block, *sizes[axis + 1 :])
    blocks = t.op("Reshape", slope, t.integers(*apart))
    return [None, t.summed(blocks, [axis + 1], keep=False), *[None] * (len(node.inputs) - 2)]
