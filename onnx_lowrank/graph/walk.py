"""Walks over a whole model: its graphs, nodes and stored constants."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import onnx_ir as ir

__all__ = [
    "all_graphs",
    "all_nodes",
    "all_values",
    "attribute",
    "elements",
    "float_attribute",
    "graph_values",
    "node_name",
    "only_sum",
    "operator",
    "static_shape",
    "stored_bytes",
    "tensors",
]

# Inputs that hold several numbers in a byte: codes and zero points.
_PACKED = {
    ("com.microsoft", "MatMulNBits"): (1, 3),
    ("com.microsoft", "GatherBlockQuantized"): (0, 3),
}


def all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """The nodes of the main graph, the functions, and all subgraphs within."""
    yield from ir.traversal.RecursiveGraphIterator(model.graph)
    for function in model.functions.values():
        yield from ir.traversal.RecursiveGraphIterator(function)


def all_graphs(model: ir.Model) -> Iterator[ir.Graph]:
    """The main graph, every subgraph, and the subgraphs inside function bodies."""
    yield model.graph
    yield from model.graph.subgraphs()
    for function in model.functions.values():
        yield from function.subgraphs()


def all_values(model: ir.Model) -> Iterator[ir.Value]:
    """The inputs, initializers and outputs of nodes of every graph and function."""
    for graph in all_graphs(model):
        yield from graph.inputs
        yield from graph.initializers.values()
    for function in model.functions.values():
        yield from function.inputs
    for node in all_nodes(model):
        yield from node.outputs


def graph_values(graph: ir.Graph) -> Iterator[ir.Value]:
    """The values of one graph; those of its subgraphs may have the same names."""
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    """Every stored constant: initializers and the tensors of Constant nodes."""
    # Not `as_tensor`, whose look at the value's kind takes as long as all else here.
    for graph in all_graphs(model):
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value.const_value
    for node in all_nodes(model):
        if node.op_identifier() in model.functions:
            for attribute in node.attributes.values():
                if not attribute.is_ref() and attribute.type == ir.AttributeType.TENSOR:
                    yield attribute.value
        if node.op_type == "Constant" and "value" in node.attributes:
            attribute = node.attributes["value"]
            if not attribute.is_ref() and attribute.type == ir.AttributeType.TENSOR:
                yield attribute.value


def elements(model: ir.Model) -> int:
    """Number of elements of all stored constants (see `onnx_lowrank.schema.json_report.File`).

    Of bytes that hold several numbers, as the codes of ``MatMulNBits`` do, every number counts.
    """
    total = sum(math.prod(static_shape(tensor.shape) or ()) for tensor in tensors(model))
    packed: dict[ir.Value, int] = {}
    for node in all_nodes(model):
        for place in _PACKED.get(operator(node), ()):
            value = node.inputs[place] if place < len(node.inputs) else None
            if value is not None and (made := value.producer()) and made.op_type == "Reshape":
                value = made.inputs[0]  # a head that is tied to a table
            if value is not None and value.dtype == ir.DataType.UINT8 and _is_stored(value):
                packed[value] = 8 // attribute(node, "bits", 4)
    more = (math.prod(static_shape(v.shape) or (0,)) * (many - 1) for v, many in packed.items())
    return total + sum(more)


def _is_stored(value: ir.Value) -> bool:
    made = value.producer()
    return value.is_initializer() if made is None else made.op_type == "Constant"


def stored_bytes(model: ir.Model) -> int:
    """Bytes of all stored constants."""
    return sum(tensor.nbytes for tensor in tensors(model))


def static_shape(shape: Iterable[object] | None) -> tuple[int, ...] | None:
    """The sizes of a shape; None if it or one of them is not known."""
    if shape is None:
        return None
    dims = tuple(shape)
    return None if not all(isinstance(d, int) for d in dims) else dims  # type: ignore[return-value]


def only_sum(value: ir.Value) -> tuple[ir.Node, ir.Value] | None:
    """The Add that alone reads a value, and what it adds; None where there is none such."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output():
        return None
    node = uses[0].node
    if node.op_type != "Add" or node.domain not in ("", "ai.onnx"):
        return None
    other = node.inputs[1 - uses[0].idx]
    return None if other is None or other is value else (node, other)


def attribute(node: ir.Node, name: str, default: int) -> int:
    """An integer attribute of a node."""
    return node.attributes[name].as_int() if name in node.attributes else default


def operator(node: ir.Node) -> tuple[str, str]:
    """Domain and name of a node's operator; the domain of ONNX itself is "" in either spelling."""
    return "" if node.domain == "ai.onnx" else node.domain, node.op_type


def float_attribute(node: ir.Node, name: str, default: float) -> float:
    """A float attribute of a node."""
    return node.attributes[name].as_float() if name in node.attributes else default


def node_name(node: ir.Node) -> str:
    """The node's name, or its first output's where it has none."""
    return node.name or next((v.name for v in node.outputs if v.name), "") or node.op_type
