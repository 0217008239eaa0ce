"""Which empty texts a node has: a protobuf tells an empty field from a missing one.

onnx_ir reads both alike and writes neither, so the empty ones are marked to be written again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx
import onnx_ir as ir

__all__ = ["graph_pairs", "mark_empty", "node_pairs", "put_empty"]

_FIELDS = ("name", "domain", "overload", "doc_string")
_MARK = "onnx_lowrank.empty"


def mark_empty(model: ir.Model, proto: onnx.ModelProto) -> None:
    """Mark the nodes of a model, as it was read from the protobuf, that have empty texts."""
    for node, message in node_pairs(model, proto):
        empty = tuple(
            name for name in _FIELDS if message.HasField(name) and not getattr(message, name)
        )
        if empty:
            node.meta[_MARK] = empty


def put_empty(model: ir.Model, proto: onnx.ModelProto) -> None:
    """Set the empty texts of marked nodes in the protobuf that a model was written to."""
    for node, message in node_pairs(model, proto):
        for name in node.meta.get(_MARK, ()):
            if not message.HasField(name):
                setattr(message, name, "")


def graph_pairs(
    model: ir.Model, proto: onnx.ModelProto
) -> Iterator[tuple[ir.Graph, onnx.GraphProto]]:
    """Each graph of a model with the message that it was read from or written to."""
    yield model.graph, proto.graph
    for node, message in node_pairs(model, proto):
        for attribute in message.attribute:
            if attribute.HasField("g"):
                yield node.attributes[attribute.name].as_graph(), attribute.g
            if attribute.graphs:
                graphs = node.attributes[attribute.name].as_graphs()
                yield from zip(graphs, attribute.graphs, strict=True)


def node_pairs(model: ir.Model, proto: onnx.ModelProto) -> Iterator[tuple[ir.Node, onnx.NodeProto]]:
    """Each node of a model with the message that it was read from or written to."""
    yield from _within(model.graph, proto.graph.node)
    functions = ((f.domain, f.name, f.overload) for f in proto.functions)
    for key, function in zip(functions, proto.functions, strict=True):
        yield from _within(model.functions[key], function.node)


def _within(
    nodes: Iterable[ir.Node], messages: Iterable[onnx.NodeProto]
) -> Iterator[tuple[ir.Node, onnx.NodeProto]]:
    for node, message in zip(nodes, messages, strict=True):
        yield node, message
        for attribute in message.attribute:
            if attribute.HasField("g"):
                yield from _within(node.attributes[attribute.name].as_graph(), attribute.g.node)
            for number, graph in enumerate(attribute.graphs):
                inner = node.attributes[attribute.name].as_graphs()[number]
                yield from _within(inner, graph.node)
