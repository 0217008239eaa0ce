"""How large the values of an integer input may be: the smallest table that it indexes.

Followed from the input through operators that pass values on unchanged
(``Cast``, ``Reshape``, ``Concat``, …) to

    Gather(E, x), GatherElements(E, x), GatherND(E, x)   values below E.shape[axis]
    EmbedLayerNormalization(x, s, E, P, S)               values below the rows of E, S and P
    OneHot(x, depth), Equal(x, [0, 1, …])                values below depth
    Add(x, c)                                            what follows, less c
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

__all__ = ["compared_with", "index_bound"]

# Position of the input whose values the node passes on; None: it passes on all of them.
_PASSING: dict[str, int | None] = {
    **dict.fromkeys(
        ("Cast", "CastLike", "Expand", "Flatten", "Gather", "GatherElements", "Identity", "Pad"), 0
    ),
    **dict.fromkeys(("Reshape", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"), 0),
    **dict.fromkeys(("Concat", "Max", "Min", "Where"), None),
}
# Input of EmbedLayerNormalization -> the table that it indexes.
_EMBEDDING = {0: 2, 1: 4, 8: 3}


def index_bound(value: ir.Value) -> int | None:
    """The smallest number that every value must stay below, or None where nothing bounds it."""
    return min(_bounds(value, set()), default=None)


def compared_with(value: ir.Value) -> tuple[int, ...]:
    """The single whole numbers that a value is compared with, such as a sample rate's 16000."""
    found: dict[int, None] = {}
    waiting, seen = [value], set[ir.Value]()
    while waiting:
        own = waiting.pop()
        if own in seen:
            continue
        seen.add(own)
        for node, position in own.uses():
            if node.op_type == "Equal":
                constant = _constant(node.inputs[1 - position])
                if constant is not None and constant.size == 1 and constant.dtype.kind in "iu":
                    found[int(constant.reshape(-1)[0])] = None
            elif node.op_type in _PASSING and _PASSING[node.op_type] in (None, position):
                waiting += node.outputs
    return tuple(sorted(found))


def _bounds(value: ir.Value, seen: set[ir.Value]) -> Iterable[int]:
    if value in seen:
        return
    seen.add(value)
    for node, position in value.uses():
        bound = _bound(node, position)
        if bound is not None:
            yield bound
        if node.op_type == "Add":
            addend = _constant(node.inputs[1 - position])
            if addend is not None and addend.size and addend.dtype.kind in "iu":
                for after in _bounds(node.outputs[0], seen):
                    # Never below 1: value 0 at least has to be fed.
                    yield max(1, after - max(0, int(addend.max())))
        elif node.op_type in _PASSING and _PASSING[node.op_type] in (None, position):
            for output in node.outputs:
                yield from _bounds(output, seen)


def _bound(node: ir.Node, position: int) -> int | None:
    """What this node alone asks of the values of its input at `position`."""
    inputs = node.inputs
    if node.op_type in ("Gather", "GatherElements") and position == 1:
        return _size(inputs[0], node.attributes.get_int("axis", 0))
    if node.op_type == "GatherND" and position == 1:
        depth = _size(inputs[1], -1)
        first = node.attributes.get_int("batch_dims", 0)
        if depth is None:
            return None
        sizes = [_size(inputs[0], axis) for axis in range(first, first + depth)]
        return min((size for size in sizes if size is not None), default=None)
    if node.op_type == "EmbedLayerNormalization" and position in _EMBEDDING:
        table = _EMBEDDING[position]
        return _size(inputs[table], 0) if table < len(inputs) else None
    if node.op_type == "OneHot" and position == 0:
        depth_value = _constant(inputs[1])
        return int(depth_value.reshape(-1)[0]) if depth_value is not None else None
    if node.op_type == "Equal":
        classes = _constant(inputs[1 - position])
        # A single constant is a padding value or a flag, not a range of classes.
        if classes is not None and classes.size > 1 and classes.dtype.kind in "iu":
            return max(1, int(classes.max()) + 1)
    return None


def _size(value: ir.Value | None, axis: int) -> int | None:
    """Size of an axis of a table, which may stand behind a Cast or a dequantization."""
    for _ in range(8):
        if value is None:
            return None
        shape = value.const_value.shape if value.const_value is not None else value.shape
        if shape is not None:
            if not -len(shape) <= axis < len(shape):
                return None
            size = shape[axis]
            if isinstance(size, int) and size > 0:
                return size
        node = value.producer()
        if node is None or not node.inputs:
            break
        if node.op_type not in ("Cast", "DequantizeLinear", "Identity"):
            break
        value = node.inputs[0]
    return None


def _constant(value: ir.Value | None) -> np.ndarray | None:
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return tensor.numpy() if tensor is not None else None
