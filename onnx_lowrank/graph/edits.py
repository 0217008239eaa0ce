"""Edits: new nodes and constants of floats in a main graph, and nodes that become others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnx_lowrank.graph.elements import constant_value
from onnx_lowrank.graph.names import Names
from onnx_lowrank.graph.spool import Spool
from onnx_lowrank.graph.walk import node_name
from onnx_lowrank.numerics.arrays import Array

__all__ = ["Edits", "become", "producer_of"]


class Edits:
    """New nodes and constants of one model."""

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
        """The output of a new node before another one, named after it and the suffix."""
        name = self._names.new(f"{node_name(node)}.{suffix}")
        new = ir.Node("", op_type, list(inputs), attributes, name=name)
        value = new.outputs[0]
        value.name, value.dtype = self._names.new(f"{name}_out"), ir.DataType.FLOAT
        value.shape = None if op_type == "DequantizeLinear" else node.outputs[0].shape
        self._graph.insert_before(node, new)
        return value


def become(
    node: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: Sequence[ir.Attr] = (),
) -> None:
    """Turn a node into another of ONNX's own operators."""
    node.op_type, node.domain = op_type, ""
    node.attributes.clear()
    for item in attributes:
        node.attributes[item.name] = item
    node.resize_inputs(len(inputs))
    for index, value in enumerate(inputs):
        node.replace_input_with(index, value)
    if op_type != "QuantizeLinear":
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)  # not that of other copies


def producer_of(value: ir.Value | None) -> ir.Node | None:
    """The node that gives a value, if there is one."""
    return None if value is None else value.producer()
