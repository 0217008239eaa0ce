"""The constants that healing changes: which they are, and putting new elements into them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

import onnx_ir as ir

from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.graph.elements import float_constants
from onnx_lowrank.maps.find import Group
from onnx_lowrank.maps.narrow import narrowed_names

__all__ = ["beside", "constant_names", "trainable"]


# Operators with a bias of their own, by the index of that input.
_OWN_BIAS = {"Gemm": 2, "FusedGemm": 2, "Conv": 2, "FusedConv": 2}


def constant_names(model: ir.Model, constant_inputs: bool = False) -> frozenset[str]:
    """Names of the float constants of the main graph; the default values of inputs if they are."""
    return frozenset(float_constants(model, constant_inputs))


def trainable(
    model: ir.Model,
    known: Collection[str],
    lowered: Iterable[Group] = (),
    constant_inputs: bool = False,
) -> tuple[str, ...]:
    """Names of the factors in the main graph, and of the biases that are added behind them.

    Args:
        model: a model whose maps are factored.
        known: `constant_names` from before.
        lowered: pairs of maps that kept their names, which have a lower rank between them.
        constant_inputs: whether default values of inputs are constants, as in `constant_names`.
    """
    constants = float_constants(model, constant_inputs)
    resolver = Constants(model)
    factors = {name: value for name, value in constants.items() if name not in known}
    found = dict.fromkeys(factors)
    for value in factors.values():
        for node, _ in resolver.readers(value):
            if node is not None and node.graph is model.graph:
                for bias in _biases(node):
                    if constants.get(bias.name or "") is bias:
                        found[bias.name or ""] = None
    for group in lowered:
        node = group.members[0].site.node
        own = dict.fromkeys(narrowed_names(group))
        found |= {name: None for name in own if name in constants}
        found |= dict.fromkeys(beside(model, [node], constant_inputs))
    return tuple(found)


def beside(
    model: ir.Model, nodes: Iterable[ir.Node], constant_inputs: bool = False
) -> tuple[str, ...]:
    """Names of the biases of nodes of the main graph, their own and those added behind them."""
    constants = float_constants(model, constant_inputs)
    found = (bias for node in nodes for bias in _biases(node))
    return tuple(dict.fromkeys(b.name or "" for b in found if constants.get(b.name or "") is b))


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
