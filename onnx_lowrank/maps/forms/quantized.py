"""Linear maps whose weight is quantized: recognised, and left alone.

``MatMulInteger(X, W)``, ``QLinearMatMul``, ``MatMulNBits``, ``QLinearConv``, …  ->  as they are

Factors of rounded weights would be rounded again: factor first, then quantize.  Where only the
quantized model is there, see `onnx_lowrank.graph.dequantize`.
(A MatMul behind a DequantizeLinear is answered by the MatMul's own form, in the same words.)
"""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from onnx_lowrank.graph.constant import FLOAT_FIRST
from onnx_lowrank.graph.constants import Constants, requantized
from onnx_lowrank.graph.walk import operator
from onnx_lowrank.maps.emit import Emitter, Pair
from onnx_lowrank.maps.forms.base import Form, Refusal, Site

__all__ = ["Quantized"]

# (domain, operator) -> index of the weight among the inputs.
_WEIGHT = {
    ("", "ConvInteger"): 1,
    ("", "MatMulInteger"): 1,
    ("", "QLinearConv"): 3,
    ("", "QLinearMatMul"): 3,
    ("com.microsoft", "DynamicQuantizeLSTM"): 1,
    ("com.microsoft", "DynamicQuantizeMatMul"): 1,
    ("com.microsoft", "MatMulBnb4"): 1,
    ("com.microsoft", "MatMulIntegerToFloat"): 1,
    ("com.microsoft", "MatMulNBits"): 1,
    ("com.microsoft", "QAttention"): 1,
    ("com.microsoft", "QGemm"): 3,
    ("com.microsoft", "QLinearConv"): 3,
}
# Those that no run makes floats of.
_STAYS = frozenset({"DynamicQuantizeLSTM", "MatMulBnb4", "QAttention"})


class Quantized(Form):
    """A linear map with a quantized weight."""

    name = "quantized"
    ops = "quantized"
    targets: ClassVar[frozenset[tuple[str, str]]] = frozenset(_WEIGHT)

    def match(self, node: ir.Node, constants: Constants) -> Site | Refusal | None:
        """Always a refusal, where the weight is constant."""
        index = _WEIGHT[operator(node)]
        weight = constants.resolve(node.inputs[index] if index < len(node.inputs) else None)
        if weight is None:
            return None
        shape = weight.shape
        if "K" in node.attributes and "N" in node.attributes:  # packed: the map's own sizes
            shape = (node.attributes["K"].as_int(), node.attributes["N"].as_int())
        return Refusal(
            weight.name,
            weight.size,
            shape,
            f"{weight.name} is quantized ({node.op_type}); "
            f"{FLOAT_FIRST if node.op_type in _STAYS else requantized()}",
        )

    def rewrite(self, site: Site, pair: Pair, emit: Emitter) -> None:
        """Never called: there are no sites."""
        raise AssertionError(f"{site.node.op_type} has no sites: {pair}, {emit}")
