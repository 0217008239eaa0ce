"""What a protobuf must have before onnx_ir reads it, which would drop or misread it in silence."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

import onnx
import onnx.defs

from onnx_lowrank.errors import InputError
from onnx_lowrank.graph.serialize import (
    graph_protos,
    node_protos,
    nodes_within,
    tensor_protos,
)
from onnx_lowrank.graph.sparse import check_sparse

__all__ = ["check_parts"]

# Kind of an attribute -> the field that holds it, of those with a message in it.
_MESSAGES = {
    onnx.AttributeProto.TENSOR: "t",
    onnx.AttributeProto.GRAPH: "g",
    onnx.AttributeProto.SPARSE_TENSOR: "sparse_tensor",
    onnx.AttributeProto.TYPE_PROTO: "tp",
}
_GRAPHS = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
# Versions of operator sets fit into an int.
_NEWEST = 2**31 - 1


def check_parts(proto: onnx.ModelProto, name: str) -> None:
    """Look at every tensor, attribute and name of a model.

    Args:
        proto: the model.
        name: how messages call it.

    Raises:
        InputError: a tensor has no type or place, an attribute does not hold what its type says or
            is not of the type that its operator gives it, one name has two givers, or a sparse
            tensor is damaged.
    """
    for tensor in tensor_protos(proto):
        _check_type(tensor, name)
        _check_place(tensor, name)
    for node in node_protos(proto):
        for attribute in node.attribute:
            _check_attribute(attribute, f"{name}: node {node.name!r} ({node.op_type})")
        if node.op_type == "Einsum" and node.domain in ("", "ai.onnx"):
            _check_equation(node, f"{name}: node {node.name!r} (Einsum)")
    _check_operators(proto.graph.node, proto.opset_import, name)
    for function in proto.functions:
        _check_operators(function.node, function.opset_import, f"{name}: {function.name!r}")
    for graph in graph_protos(proto):
        _check_names(graph, name)
        for sparse in graph.sparse_initializer:
            check_sparse(sparse, f"{name}: initializer {sparse.values.name!r}")


def _check_equation(node: onnx.NodeProto, where: str) -> None:
    """Refuse an equation on which onnx's shape inference would not end."""
    for attribute in node.attribute:
        if attribute.name != "equation" or attribute.ref_attr_name:
            continue
        text = attribute.s.decode(errors="replace")
        terms = text.partition("->")[0].replace("...", "").split(",")
        if len(terms) != len(node.input):
            raise InputError(
                f"{where}: expected an equation with a term for each of {len(node.input)} inputs, "
                f"got {text!r}"
            )


def _check_attribute(attribute: onnx.AttributeProto, where: str) -> None:
    what = f"{where}: attribute {attribute.name!r}"
    if attribute.HasField("sparse_tensor"):
        check_sparse(attribute.sparse_tensor, what)
    kind = attribute.type
    if attribute.ref_attr_name:
        if kind in _GRAPHS:
            raise InputError(
                f"{what} is a graph that the call of the function gives, which cannot be read; "
                "inline the function first"
            )
        return
    wanted = _MESSAGES.get(kind)
    held = [field for field in _MESSAGES.values() if attribute.HasField(field)]
    if held != ([] if wanted is None else [wanted]):
        text = onnx.AttributeProto.AttributeType.Name(kind)
        raise InputError(
            f"{what}: expected what its type {text} says, got {' and '.join(held) or 'nothing'}"
        )
    if attribute.graphs and kind != onnx.AttributeProto.GRAPHS:
        raise InputError(f"{what}: expected no graphs, as its type says, got some")
    if attribute.tensors and kind != onnx.AttributeProto.TENSORS:
        raise InputError(f"{what}: expected no tensors, as its type says, got some")


def _check_operators(
    nodes: Iterable[onnx.NodeProto], imports: Iterable[onnx.OperatorSetIdProto], name: str
) -> None:
    """Refuse nodes that are not what the operators of ONNX say, which no runtime takes."""
    # Where ONNX itself has no version, the newest is as good a guess as any.
    versions = {"": onnx.defs.onnx_opset_version()}
    versions |= {
        _domain(entry.domain): min(entry.version, _NEWEST) for entry in imports if entry.version > 0
    }
    for node in nodes_within(nodes):
        domain = _domain(node.domain)
        known = domain in versions
        operator = _operator(node.op_type, versions[domain], domain) if known else None
        if operator is None:
            continue
        where = f"{name}: node {node.name!r} ({node.op_type})"
        given = {attribute.name: attribute for attribute in node.attribute}
        for missing in operator.required:
            if missing not in given:
                raise InputError(f"{where}: expected attribute {missing!r}, got none")
        for attribute in given.values():
            wanted = operator.types.get(attribute.name)
            if wanted is not None and attribute.type != wanted:
                text = onnx.AttributeProto.AttributeType.Name
                raise InputError(
                    f"{where}: attribute {attribute.name!r}: expected type {text(wanted)}, got "
                    f"{text(attribute.type)}"
                )
        for what, least, values in (
            ("inputs", operator.inputs, node.input),
            ("outputs", operator.outputs, node.output),
        ):
            if len(values) < least:
                raise InputError(f"{where}: expected at least {least} {what}, got {len(values)}")


def _domain(text: str) -> str:
    return "" if text == "ai.onnx" else text


@dataclass(frozen=True)
class _Operator:
    """What a node of an operator must have: types of attributes, and the fewest of other things."""

    types: Mapping[str, int]
    required: tuple[str, ...]
    inputs: int
    outputs: int


@cache
def _operator(name: str, version: int, domain: str) -> _Operator | None:
    """An operator of an opset; None where it is unknown."""
    schema = None
    for number in (version, _NEWEST):  # one that is newer than its opset says is read all the same
        with contextlib.suppress(onnx.defs.SchemaError):
            schema = schema or onnx.defs.get_schema(name, number, domain)
    if schema is None:
        return None
    types = {
        name: int(entry.type.value)  # type: ignore[attr-defined]
        for name, entry in schema.attributes.items()
    }
    required = tuple(name for name, entry in schema.attributes.items() if entry.required)
    return _Operator(types, required, schema.min_input, schema.min_output)


def _check_type(tensor: onnx.TensorProto, name: str) -> None:
    """Refuse a tensor of a type that ONNX does not have."""
    if tensor.data_type == tensor.UNDEFINED:
        raise InputError(f"{name}: initializer {tensor.name!r}: expected an element type, got none")
    if tensor.data_type not in onnx.TensorProto.DataType.values():
        raise InputError(
            f"{name}: initializer {tensor.name!r}: expected an element type of ONNX, got number "
            f"{tensor.data_type}"
        )


def _check_place(tensor: onnx.TensorProto, name: str) -> None:
    """Refuse external data whose place cannot be understood."""
    if tensor.data_location != tensor.EXTERNAL:
        return
    where = f"{name}: initializer {tensor.name!r}"
    place = {entry.key: entry.value for entry in tensor.external_data}
    if not place.get("location"):
        raise InputError(f"{where}: expected the name of a file with its data, got none")
    for key in ("offset", "length"):
        if not place.get(key, "0").isdecimal():
            raise InputError(
                f"{where}: expected the {key} of its external data as a whole number from 0, "
                f"got {place[key]!r}"
            )


def _check_names(graph: onnx.GraphProto, name: str) -> None:
    """Refuse a name that two things give: ONNX Runtime and onnx_ir take different ones."""
    places = (
        ("inputs", [value.name for value in graph.input]),
        (
            "initializers",
            [tensor.name for tensor in graph.initializer]
            + [tensor.values.name for tensor in graph.sparse_initializer],
        ),
        ("node outputs", [output for node in graph.node for output in node.output if output]),
    )
    for place, names in places:
        twice = next((each for each, count in Counter(names).items() if count > 1), None)
        if twice is not None:
            raise InputError(
                f"{name}: graph {graph.name!r}: expected one of each name among its {place}, "
                f"got {twice!r} twice"
            )
    outside = {*places[0][1], *places[1][1]}
    both = next((output for output in places[2][1] if output in outside), None)
    if both is not None:
        raise InputError(
            f"{name}: graph {graph.name!r}: expected one thing to give {both!r}, got a node "
            "output and an input or initializer of that name"
        )
