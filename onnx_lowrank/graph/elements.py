"""Constants: new ones, the elements of those of the main graph, and others in their place."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from onnx_lowrank.errors import InputError
from onnx_lowrank.graph.constant import FLOATS
from onnx_lowrank.graph.spool import Spool
from onnx_lowrank.numerics.arrays import Array

__all__ = ["constant_value", "elements_of", "float_constants", "install", "put_elements"]


def constant_value(tensor: ir.TensorProtocol) -> ir.Value:
    """A value that holds a tensor under its name; it belongs to no graph yet."""
    return ir.Value(
        name=tensor.name,
        const_value=tensor,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape([int(size) for size in tensor.shape]),  # type: ignore[arg-type]
    )


def float_constants(model: ir.Model, constant_inputs: bool = False) -> dict[str, ir.Value]:
    """Float initializers that no caller may override, and outputs of Constant nodes.

    Args:
        model: the model.
        constant_inputs: whether default values of inputs count as constants, too.
    """
    found = _floats(model)
    if constant_inputs:
        return found
    return {name: value for name, value in found.items() if not value.is_graph_input()}


def _floats(model: ir.Model) -> dict[str, ir.Value]:
    """The same with initializers that a caller may override: default values of inputs."""
    found = {
        name: value
        for name, value in model.graph.initializers.items()
        if value.const_value is not None and value.const_value.dtype in FLOATS
    }
    for node in model.graph:
        tensor = _tensor(node)
        if tensor is not None and tensor.dtype in FLOATS:
            found[node.outputs[0].name or ""] = node.outputs[0]
    return found


def _tensor(node: ir.Node) -> ir.TensorProtocol | None:
    if node.op_type != "Constant" or "value" not in node.attributes:
        return None
    return node.attributes["value"].as_tensor()


def elements_of(model: ir.Model, name: str) -> Array:
    """The elements of a constant of the main graph, or of an input's default value.

    Raises:
        InputError: there is no such constant.
    """
    value = _floats(model).get(name)
    if value is None:
        raise InputError(f"expected {name!r} to be a float constant of the main graph")
    producer = value.producer()
    tensor = value.const_value if producer is None else _tensor(producer)
    assert tensor is not None
    return np.asarray(tensor.numpy())


def install(model: ir.Model, arrays: Mapping[str, Array], spool: Spool) -> None:
    """Give constants of the main graph, or default values of inputs, new elements, in place.

    Args:
        model: the model; it is changed.
        arrays: name -> elements, in the type and shape of the constant.
        spool: where the elements wait until they are saved.
    """
    constants = _floats(model)
    for name, array in arrays.items():
        put_elements(constants[name], array, spool)


def put_elements(value: ir.Value, array: Array, spool: Spool) -> None:
    """Give an initializer, or the output of a Constant node, new elements, in place."""
    tensor = spool.store(array, value.name or "")
    producer = value.producer()
    if producer is None:
        value.const_value = tensor
    else:
        producer.attributes["value"] = ir.AttrTensor("value", tensor)
