"""Fix the sizes of a model's inputs, for the targets that take nothing dynamic.

What the graph computed from those sizes (Shape, Gather, Concat, … in front of a Reshape) becomes
constants, and the shapes of all values are inferred anew.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx
import onnx.helper
import onnx.shape_inference
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from onnx_lowrank.graph.elements import constant_value
from onnx_lowrank.graph.face import FREE_INITIALIZERS, lower_initializers
from onnx_lowrank.graph.serialize import from_proto, hollow
from onnx_lowrank.graph.walk import all_graphs, graph_values, static_shape

__all__ = [
    "INTEGER_NODES",
    "fix_shapes",
    "fold_shapes_of",
    "infer_shapes",
    "new_constants",
    "opset_of",
]

INTEGER_NODES = 9
"""The opset from which on a Constant node may hold integers."""

_LARGEST = 4096
"""Elements up to which a value can be part of the arithmetic of shapes."""
_ARITHMETIC = (
    *("Add", "Cast", "Concat", "ConstantOfShape", "Div", "Equal", "Expand", "Gather", "Identity"),
    *("Max", "Min", "Mod", "Mul", "Neg", "Range", "ReduceProd", "Reshape", "Slice", "Squeeze"),
    *("Sub", "Unsqueeze", "Where"),
)


def fix_shapes(model: ir.Model, shapes: Mapping[str, Sequence[int]]) -> None:
    """Give inputs a size, in place.

    Args:
        model: the model; its graph is changed.
        shapes: input -> sizes; inputs that are not named stay as they are.
    """
    graph = model.graph
    symbols: dict[str, int] = {}
    for value in graph.inputs:
        sizes = shapes.get(value.name or "")
        if sizes is None or not isinstance(value.type, ir.TensorType):
            continue
        for old, size in zip(value.shape or (), sizes, strict=False):
            if isinstance(old, ir.SymbolicDim) and old.value is not None:
                symbols[old.value] = int(size)
        value.shape = ir.Shape([int(size) for size in sizes])
    outputs = {value: value.shape for value in graph.outputs}
    for node in graph:
        for value in node.outputs:
            if value.shape is not None:
                value.shape = _without(symbols, value.shape)
    infer_shapes(model)
    if new_constants(model) and _fold(model):
        infer_shapes(model)
    for value, shape in outputs.items():
        if value.shape is None and shape is not None:
            value.shape = shape
    lower_initializers(model)


def fold_shapes_of(model: ir.Model, values: Collection[ir.Value]) -> None:
    """Make constants of what the main graph computes from the sizes of these values, in place.

    Args:
        model: the model.
        values: of known shape, such as initializers.
    """
    if new_constants(model) and _fold(model, values):
        lower_initializers(model)


def opset_of(model: ir.Model) -> int:
    """The version of ONNX's own operators that a model imports."""
    return model.opset_imports.get("", model.opset_imports.get("ai.onnx", 1))


def new_constants(model: ir.Model) -> bool:
    """Whether a constant of integers can be added: before IR version 4 only in a Constant node."""
    return model.ir_version >= FREE_INITIALIZERS or opset_of(model) >= INTEGER_NODES


def infer_shapes(model: ir.Model) -> None:
    """Infer the types and shapes of values, in place, as far as onnx can; weights are not read."""
    with hollow(model) as (proto, _):
        pass
    try:
        found = from_proto(
            onnx.shape_inference.infer_shapes(
                proto, check_type=False, strict_mode=False, data_prop=True
            )
        )
    except Exception:  # a model that onnx cannot follow: what is known of it stays
        return
    for graph, other in zip(all_graphs(model), all_graphs(found), strict=True):
        inferred = {value.name: value for value in graph_values(other)}
        for value in graph_values(graph):
            source = inferred.get(value.name)
            if source is None:
                continue
            if source.type is not None:  # of a sequence, too
                value.type = source.type
            if source.shape is not None:
                value.shape = source.shape


def _without(symbols: Mapping[str, int], shape: ir.Shape) -> ir.Shape | None:
    """A shape with its known symbols replaced; None where one is left, to be inferred."""
    dims = [
        symbols.get(dim.value or "", dim) if isinstance(dim, ir.SymbolicDim) else dim
        for dim in shape
    ]
    return None if any(isinstance(dim, ir.SymbolicDim) for dim in dims) else ir.Shape(dims)


def _fold(model: ir.Model, only: Collection[ir.Value] | None = None) -> bool:
    """Turn what depends on shapes alone into constants; whether there was any.

    Args:
        model: the model.
        only: whose shapes count; None for all of them.
    """
    graph = model.graph
    derived: set[ir.Value] = set()
    for node in list(graph):
        if node.domain not in ("", "ai.onnx") or len(node.outputs) != 1:
            continue
        array = _value(model, node, derived, only)
        output = node.outputs[0]
        if array is None or output.is_graph_output() or output.name is None:
            continue
        constant = constant_value(ir.tensor(array, name=output.name))
        ir.convenience.replace_all_uses_with(output, constant)
        graph.remove(node, safe=True)
        graph.register_initializer(constant)
        derived.add(constant)
    # What only they read is not needed any more.
    for value in list(graph.initializers.values()):
        if value in derived and not value.uses() and value.name is not None:
            graph.initializers.pop(value.name)
    return bool(derived)


def _value(
    model: ir.Model,
    node: ir.Node,
    derived: set[ir.Value],
    only: Collection[ir.Value] | None,
) -> npt.NDArray[np.generic] | None:
    """What a node of shape arithmetic gives; None where it is none, or not known."""
    if node.op_type == "Shape" and node.inputs[0] is not None:
        shape = static_shape(node.inputs[0].shape)
        if shape is None or (only is not None and node.inputs[0] not in only):
            return None
        start = node.attributes.get("start")
        end = node.attributes.get("end")
        first = 0 if start is None else start.as_int()
        last = len(shape) if end is None else end.as_int()
        return np.array(shape[first:last], np.int64)
    if node.op_type not in _ARITHMETIC or not any(v in derived for v in node.inputs):
        return None
    if only is not None and any(value in only for value in node.inputs):
        return None  # its elements, not its sizes
    feeds: dict[str, npt.NDArray[np.generic]] = {}
    for value in node.inputs:
        if value is None:
            continue
        tensor = ir.convenience.get_const_tensor(value)
        if tensor is None or value.is_graph_input() or tensor.size > _LARGEST:
            return None
        feeds[value.name or ""] = tensor.numpy()
    proto = ir.to_proto(node)
    graph = onnx.helper.make_graph(
        [proto],
        "fold",
        [onnx.helper.make_value_info(name, onnx.TypeProto()) for name in feeds],
        [onnx.helper.make_value_info(proto.output[0], onnx.TypeProto())],
    )
    opset = onnx.helper.make_opsetid("", opset_of(model))
    single = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8)
    try:
        (result,) = ReferenceEvaluator(single).run(None, feeds)
    except Exception:  # an operator or type that the reference does not take: it stays
        return None
    return np.asarray(result) if np.size(result) <= _LARGEST else None
