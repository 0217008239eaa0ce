"""Dequantize: linear maps of a quantized model become maps of floats, in place.

``MatMulInteger(DynamicQuantizeLinear(x), q) · s``   ->  ``MatMul(x, W)``, and ConvInteger
``MatMul(x, DequantizeLinear(q, s))``                ->  ``MatMul(x, W)``, and Conv, Gemm, …
``QLinearMatMul(x, …, q, …)``                        ->  ``QuantizeLinear(MatMul(…, W))``
``MatMulNBits(x, q, s)``                             ->  ``MatMul(x, W)``
``Conv(x, Cast(q) · Cast(s))``                       ->  ``Conv(x, W)``, also with zero points
``Conv(x, Cast(q) · s + m)``                         ->  ``Conv(x, W)``
``DequantizeLinear(QuantizeLinear(x))``              ->  ``Clip(x)``

The pair of the last line cuts off what is beyond its range, which takes the place of a Relu that a
quantizer left out; only its rounding goes.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.graph.edits import Edits
from onnx_lowrank.graph.fixed import fold_shapes_of
from onnx_lowrank.graph.float_maps import HANDLED, Dequantized, FloatMaps, holds_weight
from onnx_lowrank.graph.rounded import RoundedValues
from onnx_lowrank.graph.spool import Spool
from onnx_lowrank.graph.walk import all_nodes, node_name, operator

__all__ = ["Dequantized", "dequantize", "holds_integers", "quantized_inside"]

# What goes with a map that nothing reads any more.
_GOES = frozenset(
    {
        *("Cast", "Constant", "Expand", "Mul", "Reshape", "Slice", "Sub"),
        *("DequantizeLinear", "DynamicQuantizeLinear", "QuantizeLinear"),
    }
)


def dequantize(model: ir.Model, spool: Spool) -> Dequantized:
    """Make floats of the weights of linear maps.

    Args:
        model: of opset 13 or newer; its main graph is changed.
        spool: where the floats wait until they are saved.
    """
    constants, edits = Constants(model), Edits(model, spool)
    before = {value for value in model.graph.initializers.values() if value.uses()}
    maps, rounded = FloatMaps(constants, edits), RoundedValues(constants, edits)
    for node in list(model.graph):
        maps.map(node)
    for node in list(model.graph):
        rounded.clip(node)
    made = [model.graph.initializers[name] for name in maps.found.bits]
    fold_shapes_of(model, made)  # a Reshape behind a weight may ask it for its sizes
    _clear(model.graph, before)
    maps.found.left |= quantized_inside(model)
    return maps.found


def holds_integers(model: ir.Model) -> bool:
    """Whether the main graph has weights that `dequantize` looks at."""
    constants = Constants(model)
    return any(holds_weight(node, constants) for node in model.graph)


def quantized_inside(model: ir.Model) -> dict[str, str]:
    """Names of nodes in subgraphs and functions whose weights are integers -> why they stay."""
    constants, outer = Constants(model), set(model.graph)
    inside = (node for node in all_nodes(model) if node not in outer)
    return {
        node_name(node): "it is inside a subgraph or function"
        for node in inside
        if holds_weight(node, constants)
    }


def _clear(graph: ir.Graph, before: Collection[ir.Value]) -> None:
    """Remove what nobody reads any more."""
    for node in reversed(list(graph)):
        dead = not any(v.uses() or v.is_graph_output() for v in node.outputs)
        if dead and (node.op_type in _GOES or operator(node) in HANDLED):
            graph.remove(node, safe=True)
    for value in before:
        if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
            graph.initializers.pop(value.name or "")
