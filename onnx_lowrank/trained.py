"""The constants that healing changes: which they are, and putting new elements into them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_lowrank.constants import FLOATS, Constants
from onnx_lowrank.errors import InputError
from onnx_lowrank.spool import Spool

__all__ = ["constant_names", "elements_of", "install", "put_elements", "trainable"]

Array = npt.NDArray[Any]

# Operators with a bias of their own, by the index of that input.
_OWN_BIAS = {"Gemm": 2, "FusedGemm": 2, "Conv": 2, "FusedConv": 2}


def constant_names(model: ir.Model) -> frozenset[str]:
    """Names of the float constants of the main graph."""
    return frozenset(_constants(model))


def trainable(model: ir.Model, known: Collection[str]) -> tuple[str, ...]:
    """Names of the factors in the main graph, and of the biases that are added behind them.

    Args:
        model: a model whose maps are factored.
        known: `constant_names` from before.
    """
    constants = _constants(model)
    resolver = Constants(model)
    factors = {name: value for name, value in constants.items() if name not in known}
    found = dict.fromkeys(factors)
    for value in factors.values():
        for node, _ in resolver.readers(value):
            if node is not None and node.graph is model.graph:
                for bias in _biases(node):
                    if constants.get(bias.name or "") is bias:
                        found[bias.name or ""] = None
    return tuple(found)


def _biases(node: ir.Node) -> Iterator[ir.Value]:
    """What a node adds itself, or what a node behind it adds to its output."""
    index = _OWN_BIAS.get(node.op_type)
    if index is not None and index < len(node.inputs):
        own = node.inputs[index]
        if own is not None:
            yield own
    for use in node.outputs[0].uses():
        if use.node.op_type == "Add":
            other = use.node.inputs[1 - use.idx]
            if other is not None and other.shape is not None and len(other.shape) <= 1:
                yield other


def _constants(model: ir.Model) -> dict[str, ir.Value]:
    """Float initializers that no caller may override, and outputs of Constant nodes."""
    found = {
        name: value
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
        and value.const_value.dtype in FLOATS
        and not value.is_graph_input()
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
    """The elements of a constant of the main graph.

    Raises:
        InputError: there is no such constant.
    """
    value = _constants(model).get(name)
    if value is None:
        raise InputError(f"--heal: expected {name!r} to be a float constant of the main graph")
    producer = value.producer()
    tensor = value.const_value if producer is None else _tensor(producer)
    assert tensor is not None
    return np.asarray(tensor.numpy())


def install(model: ir.Model, arrays: Mapping[str, Array], spool: Spool) -> None:
    """Give constants of the main graph new elements, in place.

    Args:
        model: the model; it is changed.
        arrays: name -> elements, in the type and shape of the constant.
        spool: where the elements wait until they are saved.
    """
    constants = _constants(model)
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
