"""What the integers of a quantized weight stand for, operator by operator.

``DequantizeLinear(q, s, z)``  stands for  ``s · (q − z)``, with one scale, one for each index of an
axis, or one for a block of them; MatMulNBits packs codes of 4 or 8 bits by columns.  This tool
writes ``Cast(q) · Cast(s)``, or ``(Cast(q) - Cast(z)) · Cast(s)``, where runtimes are to make
floats of them; others write ``Cast(q) · s + m``, where m is what the middle code stands for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_lowrank.graph.constant import Constant
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.graph.walk import attribute
from onnx_lowrank.numerics.arrays import Array

__all__ = [
    "BITS",
    "IntegerWeight",
    "dequantized",
    "multiplied_weight",
    "nbits_weight",
    "read_weight",
]

BITS = {
    ir.DataType.INT4: 4,
    ir.DataType.UINT4: 4,
    ir.DataType.INT8: 8,
    ir.DataType.UINT8: 8,
}
"""Bits of the codes of weights."""
_PACKED = (4, 8)


@dataclass(frozen=True, eq=False)
class IntegerWeight:
    """A weight that is stored in integers.

    Attributes:
        root: the integers.
        values: what they stand for, float32.
        bits: of a code; 32 of a bias.
        nbytes: of the integers, their scales and zero points.
    """

    root: ir.Value
    values: npt.NDArray[np.float32]
    bits: int
    nbytes: int


def dequantized(
    codes: Array, scales: Array, zeros: Array | None, axis: int, block: int = 0
) -> npt.NDArray[np.float32]:
    """``s · (q − z)`` as DequantizeLinear computes it.

    Args:
        codes: q.
        scales: one of them, one for each index of the axis, or one for each block.
        zeros: z, of the shape of the scales; None is 0.
        axis: of the scales, where there are several.
        block: indices of the axis that share a scale; 0 without blocks.

    Raises:
        ValueError: the scales do not fit the codes.
    """

    def spread(array: Array) -> Array:
        array = np.asarray(array)
        if array.size == 1:
            return array.reshape(())
        if block:
            own = np.repeat(array, block, axis=axis)
            return np.take(own, np.arange(codes.shape[axis]), axis=axis)
        shape = [1] * codes.ndim
        shape[axis] = codes.shape[axis]
        return array.reshape(shape)

    whole = codes.astype(np.float32)
    if zeros is not None:
        whole = whole - spread(zeros).astype(np.float32)
    return np.asarray(whole * spread(scales).astype(np.float32), np.float32)


def read_weight(
    constants: Constants,
    codes: ir.Value | None,
    scales: ir.Value | None,
    zeros: ir.Value | None,
    axis: int,
    block: int = 0,
) -> IntegerWeight | str:
    """The weight of these inputs of a node, or why it is none that can be read.

    Args:
        constants: resolver of the model's constants.
        codes: the integers.
        scales: theirs.
        zeros: their zero points; None without.
        axis: of the scales.
        block: as for `dequantized`.
    """
    stored = _stored(constants, codes, scales, zeros)
    if isinstance(stored, str):
        return stored
    q, s, z = stored
    bits = 32 if q.dtype is ir.DataType.INT32 else BITS.get(q.dtype)
    if bits is None:
        return f"its codes are {q.dtype.name.lower()}; 4 and 8 bits are read"
    try:
        axis = axis % max(len(q.shape), 1)
        values = dequantized(q.numpy(), s.numpy(), None if z is None else z.numpy(), axis, block)
    except ValueError as error:
        return f"its scales do not fit: {error}"
    return IntegerWeight(q.root, values, bits, _bytes(q, s, z))


def _stored(
    constants: Constants, codes: ir.Value | None, scales: ir.Value | None, zeros: ir.Value | None
) -> tuple[Constant, Constant, Constant | None] | str:
    """Integers, scales and zero points, or why they cannot be read."""
    q, s, z = (constants.resolve(value) for value in (codes, scales, zeros))
    if not isinstance(q, Constant) or not isinstance(s, Constant):
        return "its integers or scales are not constant"
    if zeros is not None and not isinstance(z, Constant):
        return "its zero points are not constant"
    if s.dtype is not ir.DataType.FLOAT:
        return f"its scales are {s.dtype.name.lower()}; float32 ones are read"
    if q.root.is_graph_input() or q.root.is_graph_output():
        return "its integers are an input or output of the model"
    return q, s, z if isinstance(z, Constant) else None


def _bytes(*stored: Constant | None) -> int:
    return sum(own.tensor.nbytes for own in stored if own is not None)


def multiplied_weight(node: ir.Node, constants: Constants) -> IntegerWeight | str:
    """The weight of a Mul of codes and scales, both cast to floats, or why it cannot be read.

    Args:
        node: the Mul, or an Add of one and a constant.
        constants: resolver of the model's constants.
    """
    if node.op_type == "Add":
        return _shifted_weight(node, constants)
    for codes, scales in ((node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0])):
        before = None if codes is None else codes.producer()
        centred = before is not None and before.op_type == "Sub"
        cast, zeros = before, None
        if before is not None and centred:
            cast = None if before.inputs[0] is None else before.inputs[0].producer()
            zeros = _evaluated(before.inputs[1], constants)
        if cast is None or cast.op_type != "Cast" or (centred and zeros is None):
            continue
        q, s = constants.resolve(cast.inputs[0]), _evaluated(scales, constants)
        if isinstance(q, Constant) and q.dtype in BITS and s is not None:
            to = ir.DataType(attribute(cast, "to", int(ir.DataType.FLOAT)))
            if to is not ir.DataType.FLOAT:
                return f"it is made {to.name.lower()}; float32 is read"
            bits, whole = BITS[q.dtype], q.numpy().astype(np.float32)
            if zeros is not None:
                whole = whole - zeros
            size = q.tensor.nbytes + 2 * s.size
            size += 0 if zeros is None else -(-zeros.size * bits // 8)
            return IntegerWeight(q.root, np.asarray(whole * s, np.float32), bits, size)
    return "its codes or scales are computed in another way"


def _shifted_weight(node: ir.Node, constants: Constants) -> IntegerWeight | str:
    for product, added in (tuple(node.inputs), tuple(reversed(node.inputs))):
        mul, shift = None if product is None else product.producer(), _evaluated(added, constants)
        if mul is None or mul.op_type != "Mul" or shift is None:
            continue
        weight = multiplied_weight(mul, constants)
        if isinstance(weight, str):
            return weight
        values = np.asarray(weight.values + shift, np.float32)
        return replace(weight, values=values, nbytes=weight.nbytes + shift.nbytes)
    return "what is added to it is computed"


def _evaluated(value: ir.Value | None, constants: Constants) -> Array | None:
    """A value that is computed of constants, as this tool writes scales; None where it is not."""
    found = constants.resolve(value)
    if isinstance(found, Constant):
        return found.numpy().astype(np.float32)
    node = None if value is None else value.producer()
    if node is None or node.op_type not in ("Cast", "Expand", "Reshape", "Slice"):
        return None
    own = _evaluated(node.inputs[0], constants)
    numbers = [constants.literal(other) for other in node.inputs[1:]]
    if own is None or any(number is None for number in numbers):
        return None
    sizes = [
        tuple(int(n) for n in np.atleast_1d(number)) for number in numbers if number is not None
    ]
    if node.op_type == "Expand":
        return np.broadcast_to(own, sizes[0])
    if node.op_type == "Reshape":
        return own.reshape(sizes[0])
    if node.op_type == "Slice" and len(sizes) == 3:
        cut = [slice(None)] * own.ndim
        for first, end, axis in zip(*sizes, strict=True):
            cut[axis] = slice(first, end)
        return own[tuple(cut)]
    return own if node.op_type == "Cast" else None


def nbits_weight(node: ir.Node, constants: Constants) -> IntegerWeight | str:
    """The weight ``W[K, N]`` of a MatMulNBits, or why it cannot be read."""
    inputs = [*node.inputs, *[None] * 6][:6]
    _, packed, scales, zeros, order, _ = inputs
    if order is not None:
        return "its rows are in an order of their own (g_idx)"
    bits, block = attribute(node, "bits", 4), attribute(node, "block_size", 32)
    inner, outer = attribute(node, "K", 0), attribute(node, "N", 0)
    if bits not in _PACKED:
        return f"its codes have {bits} bits; 4 and 8 are read"
    stored = _stored(constants, packed, scales, zeros)
    if isinstance(stored, str):
        return stored
    q, s, z = stored
    groups = -(-inner // block)
    codes = _unpacked(q.numpy().reshape(outer, -1), bits)[:, :inner]  # [N, K]
    each = s.numpy().reshape(outer, groups)
    middle: Array = np.full((1, 1), 1 << bits - 1, np.float32)
    if z is not None:
        packed_zeros = z.dtype is ir.DataType.UINT8
        own = z.numpy().reshape(outer, -1)
        middle = (_unpacked(own, bits) if packed_zeros else own)[:, :groups]
    values = dequantized(codes, each, np.broadcast_to(middle, each.shape), 1, block)
    return IntegerWeight(q.root, np.ascontiguousarray(values.T), bits, _bytes(q, s, z))


def _unpacked(rows: npt.NDArray[Any], bits: int) -> npt.NDArray[np.float32]:
    """Codes of each row, the first one in the low half of a byte."""
    if bits == 8:
        return rows.astype(np.float32)
    halves = np.stack([rows & 0xF, rows >> 4], axis=-1)
    return halves.reshape(len(rows), -1).astype(np.float32)
