"""Edits: new nodes and constants, and nodes that become others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnx_lowrank.graph.elements import constant_value
from onnx_lowrank.graph.names import Names
from onnx_lowrank.graph.spool import Spool
from onnx_lowrank.graph.walk import node_name
from onnx_lowrank.numerics.arrays import Array

__all__ = ["Edits", "become", "node_before", "producer_of", "put_behind"]


class Edits:
    """New nodes and constants of floats in the main graph of one model."""

    def __init__(self, model: ir.Model, spool: Spool) -> None:
        """Of a model; arrays wait in the spool until they are saved."""
        self._graph, self._spool, self._names = model.graph, spool, Names(model)

    def name(self, wanted: str) -> str:
        """A name that nothing in the model has yet."""
        return self._names.new(wanted)

    def constant(self, array: Array, name: str) -> ir.Value:
        """An initializer with a new name near to the wanted one."""
        name = self._names.new(name)
        value = constant_value(self._spool.store(np.ascontiguousarray(array), name))
        self._graph.register_initializer(value)
        return value

    def before(
        self,
        node: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        suffix: str,
        attributes: Sequence[ir.Attr] = (),
    ) -> ir.Value:
        """The output, floats, of a new node before another one."""
        new = node_before(
            node,
            op_type,
            inputs,
            self._names.new,
            suffix,
            attributes=attributes,
            dtype=ir.DataType.FLOAT,
            shape=None if op_type == "DequantizeLinear" else node.outputs[0].shape,
            metadata={},
        )
        return new.outputs[0]

    def become(
        self,
        node: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Sequence[ir.Attr] = (),
    ) -> None:
        """Turn a node into another one, which gives floats unless it rounds them."""
        become(node, op_type, inputs, attributes)
        if op_type != "QuantizeLinear":
            node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)  # not that of other copies


def node_before(
    node: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    new_name: Callable[[str], str],
    suffix: str = "",
    *,
    domain: str = "",
    attributes: Sequence[ir.Attr] = (),
    dtype: ir.DataType | None = None,
    shape: ir.Shape | None = None,
    metadata: Mapping[str, str] | None = None,
    outputs: int = 1,
) -> ir.Node:
    """A new node before another one in its graph, named after it.

    Args:
        node: the other one.
        op_type: operator of the new one.
        inputs: what it reads.
        new_name: makes of a wanted name one that nothing in the model has yet.
        suffix: ends its name; by default the operator.
        domain: of the operator.
        attributes: its attributes.
        dtype: of its outputs, where it is known.
        shape: of its outputs, where it is known.
        metadata: its metadata; by default those of the other node.
        outputs: how many it has.
    """
    name = new_name(f"{node_name(node)}.{suffix or op_type.lower()}")
    own = node.metadata_props if metadata is None else metadata
    new = ir.Node(
        domain,
        op_type,
        list(inputs),
        list(attributes),
        num_outputs=outputs,
        name=name,
        metadata_props=dict(own),
    )
    for value in new.outputs:
        value.name, value.shape = new_name(f"{name}_out"), shape
        if dtype is not None:
            value.dtype = dtype
    assert node.graph is not None
    node.graph.insert_before(node, new)
    return new


def put_behind(graph: ir.Graph, value: ir.Value, nodes: Sequence[ir.Node]) -> None:
    """Put nodes that read a value behind what gives it; an input's at the head of its graph."""
    producer, first = value.producer(), next(iter(graph), None)
    if producer is not None:
        graph.insert_after(producer, nodes)
    elif first is not None:
        graph.insert_before(first, nodes)


def become(
    node: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: Sequence[ir.Attr] = (),
    domain: str = "",
) -> None:
    """Turn a node into another one; it keeps its name and its outputs."""
    node.op_type, node.domain, node.version = op_type, domain, None
    node.attributes.clear()
    for item in attributes:
        node.attributes[item.name] = item
    node.resize_inputs(len(inputs))
    for index, value in enumerate(inputs):
        node.replace_input_with(index, value)


def producer_of(value: ir.Value | None) -> ir.Node | None:
    """The node that gives a value, if there is one."""
    return None if value is None else value.producer()
