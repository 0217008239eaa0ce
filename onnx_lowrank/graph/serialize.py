"""Writing a model as one protobuf without holding its weights in memory a second time.

A protobuf may be written in pieces: the fields of a message may have any order, and the length
that stands before a message is known once the sizes of its parts are.  So the graph is serialized
without its large initializers, and these follow one by one, their bytes copied from where they
are.  (Encoding: https://protobuf.dev/programming-guides/encoding/)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import onnx
import onnx_ir as ir

from onnx_lowrank.errors import InputError
from onnx_lowrank.graph import sparse
from onnx_lowrank.graph.presence import mark_empty, put_empty
from onnx_lowrank.graph.references import written_as_references
from onnx_lowrank.graph.types_aside import keep, put_back, without
from onnx_lowrank.graph.walk import all_graphs, all_values, static_shape

__all__ = [
    "PROTOBUF_LIMIT",
    "data_locations",
    "first_line",
    "from_proto",
    "graph_protos",
    "hollow",
    "mark_declared",
    "node_protos",
    "nodes_within",
    "tensor_protos",
    "to_proto",
    "write_beside",
    "write_protobuf",
]

PROTOBUF_LIMIT = (1 << 31) - (1 << 20)
"""Bytes of weights that a protobuf can hold, with some room for the graph itself."""

# Marks an initializer that a value_info declares too.
_DECLARED = "onnx_lowrank.declared"
# Smaller initializers are serialized with the graph.
_LARGE = 1 << 16
# Beside the model go those above this; the others stay where shape inference can see them.
_INLINE = 1024
_BYTES = 2  # wire type of a field whose length precedes it


@contextmanager
def hollow(model: ir.Model) -> Iterator[tuple[onnx.ModelProto, dict[str, ir.TensorProtocol]]]:
    """The model as a protobuf whose large initializers are only declared, and these tensors.

    A declared one says type, shape and that its data are external; where they would be is
    meaningless.  Only the main graph's are taken out, those of subgraphs are small.
    """
    large: dict[str, ir.TensorProtocol] = {}
    changed: list[tuple[ir.Value, ir.TensorProtocol]] = []
    try:
        for graph in all_graphs(model):
            for name, value in graph.initializers.items():
                tensor = value.const_value
                if tensor is None or tensor.dtype == ir.DataType.STRING:
                    continue
                if isinstance(tensor, sparse.SparseTensor):
                    continue
                if graph is model.graph and tensor.nbytes >= _LARGE:
                    large[name] = tensor
                    replacement: ir.TensorProtocol = ir.ExternalTensor(
                        "hollow",
                        0,
                        tensor.nbytes,
                        tensor.dtype,
                        shape=ir.Shape(static_shape(tensor.shape) or ()),
                        name=name,
                        doc_string=tensor.doc_string,
                        metadata_props=dict(tensor.metadata_props),
                    )
                elif isinstance(tensor, ir.ExternalTensor):
                    replacement = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=name)
                else:
                    continue
                changed.append((value, tensor))
                value.const_value = replacement
        yield to_proto(model), large
    finally:
        for value, tensor in changed:
            value.const_value = tensor


def first_line(error: BaseException) -> str:
    """The first line of what an error is about in the end."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return (str(cause).strip() or type(cause).__name__).splitlines()[0]


def from_proto(proto: onnx.ModelProto) -> ir.Model:
    """The model of a protobuf, whatever types its values have.

    Args:
        proto: the protobuf; it is as before afterwards.

    Raises:
        Exception: onnx_ir cannot read it; its errors have no common base.
    """
    graphs, nodes = list(graph_protos(proto)), list(node_protos(proto))
    with without(graphs) as types, sparse.made_dense(graphs, nodes) as stored:
        model = ir.from_proto(proto)
        if stored:
            sparse.keep(model, proto, stored)
    if types:
        keep(all_values(model), types)
    return model


def to_proto(model: ir.Model) -> onnx.ModelProto:
    """The model as a protobuf in which what was read stands as it stood.

    onnx_ir adds a value_info for every initializer: it declares its type and shape itself, and a
    second declaration goes stale when a tool such as ONNX Runtime's quantizer changes the
    initializer.  One that was there stays.  It writes the metadata of a tensor twice, and leaves
    out empty texts.
    """
    try:
        with written_as_references(model), sparse.set_aside(model):
            proto = ir.to_proto(model)
    except ir.serde.SerdeError as error:
        raise InputError(f"the model cannot be written: {first_line(error)}") from error
    put_empty(model, proto)
    sparse.put_back(model, proto)
    put_back(all_values(model), graph_protos(proto))
    for graph in graph_protos(proto):
        own = {tensor.name for tensor in graph.initializer}
        initializers = model.graph.initializers if graph is proto.graph else {}
        kept = [
            value
            for value in graph.value_info
            if value.name not in own
            or value.metadata_props
            or value.doc_string
            or (value.name in initializers and initializers[value.name].meta.get(_DECLARED))
        ]
        del graph.value_info[:]
        graph.value_info.extend(kept)
    for tensor in _tensor_protos(proto):
        if tensor.metadata_props:
            once = {entry.key: entry for entry in tensor.metadata_props}
            del tensor.metadata_props[:]
            tensor.metadata_props.extend(once.values())
    return proto


def mark_declared(model: ir.Model, proto: onnx.ModelProto) -> None:
    """Mark what a model, as it was read from the protobuf, says beyond what onnx_ir keeps."""
    mark_empty(model, proto)
    for value in proto.graph.value_info:
        if value.name in model.graph.initializers:
            model.graph.initializers[value.name].meta[_DECLARED] = True


def _tensor_protos(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """The initializers and the tensors in attributes."""
    nodes = [node for function in proto.functions for node in function.node]
    for graph in graph_protos(proto):
        yield from graph.initializer
        nodes.extend(graph.node)
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def graph_protos(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """The main graph of a protobuf and all subgraphs, also those inside functions."""
    waiting = [proto.graph]
    nodes = [node for function in proto.functions for node in function.node]
    while waiting or nodes:
        if waiting:
            graph = waiting.pop()
            yield graph
            nodes.extend(graph.node)
        for node in nodes:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    waiting.append(attribute.g)
                waiting.extend(attribute.graphs)
        nodes = []


def data_locations(proto: onnx.ModelProto) -> set[str]:
    """The files of a model's external data as the model names them, relative to its folder."""
    found: set[str] = set()
    for graph in graph_protos(proto):
        constants = (item.t for node in graph.node for item in node.attribute if item.HasField("t"))
        for tensor in (*graph.initializer, *constants):
            found.update(e.value for e in tensor.external_data if e.key == "location")
    return found


def node_protos(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """The nodes of all graphs and functions of a protobuf."""
    for graph in graph_protos(proto):
        yield from graph.node
    for function in proto.functions:
        yield from function.node


def nodes_within(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Nodes of protobufs and those of all subgraphs within."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from nodes_within(attribute.g.node)
            for graph in attribute.graphs:
                yield from nodes_within(graph.node)


def tensor_protos(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """The initializers of a protobuf, and the tensors in attributes of its nodes."""
    for graph in graph_protos(proto):
        yield from graph.initializer
    for node in node_protos(proto):
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def write_beside(model: ir.Model, path: Path, data: str) -> None:
    """Write the model to one file and its weights to another, ``data``, in the same folder.

    Raises:
        OSError: a file cannot be written.
    """
    values = [value for graph in all_graphs(model) for value in graph.initializers.values()]
    tensors = [value.const_value for value in values]
    try:
        with sparse.set_aside(model):
            ir.external_data.unload_from_model(
                model, path.parent, data, size_threshold_bytes=_INLINE
            )
        for value, tensor in zip(values, tensors, strict=True):
            beside = value.const_value
            if tensor is not None and isinstance(beside, ir.ExternalTensor):
                beside.doc_string = tensor.doc_string
                beside.metadata_props.update(tensor.metadata_props)
        path.write_bytes(to_proto(model).SerializeToString())
    finally:
        for value, tensor in zip(values, tensors, strict=True):
            value.const_value = tensor


def write_protobuf(model: ir.Model, path: Path) -> None:
    """Write the model, weights included, to one file.

    Raises:
        OSError: the file cannot be written.
    """
    with hollow(model) as (proto, large):
        heads = {}
        for tensor in proto.graph.initializer:
            if tensor.name in large:
                tensor.ClearField("external_data")
                tensor.ClearField("data_location")
                head = tensor.SerializeToString()
                head += _field(onnx.TensorProto, "raw_data", large[tensor.name].nbytes)
                heads[tensor.name] = head
        rest = [tensor for tensor in proto.graph.initializer if tensor.name not in large]
        del proto.graph.initializer[:]
        proto.graph.initializer.extend(rest)
    graph = proto.graph.SerializeToString()
    proto.ClearField("graph")
    sizes = {name: len(head) + large[name].nbytes for name, head in heads.items()}
    fields = {name: _field(onnx.GraphProto, "initializer", size) for name, size in sizes.items()}
    total = len(graph) + sum(len(fields[name]) + size for name, size in sizes.items())
    with path.open("wb") as file:
        file.write(proto.SerializeToString())
        file.write(_field(onnx.ModelProto, "graph", total))
        file.write(graph)
        for name, head in heads.items():
            file.write(fields[name])
            file.write(head)
            _copy(large[name], file)


def _copy(tensor: ir.TensorProtocol, file: IO[bytes]) -> None:
    start = file.tell()
    if isinstance(tensor, ir.Tensor | ir.ExternalTensor):
        tensor.tofile(file)
        file.seek(0, 2)
    else:
        file.write(tensor.tobytes())
    assert file.tell() - start == tensor.nbytes, (tensor.name, file.tell() - start)


def _field(message: type, name: str, length: int) -> bytes:
    """Tag and length of a field whose bytes follow."""
    number = message.DESCRIPTOR.fields_by_name[name].number  # type: ignore[attr-defined]
    return _varint(number << 3 | _BYTES) + _varint(length)


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)
