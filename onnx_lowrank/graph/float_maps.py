"""Float maps: a linear map whose weight is quantized becomes one of floats, in place."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from onnx_lowrank.graph.constant import Constant
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.graph.edits import Edits, producer_of
from onnx_lowrank.graph.integer_weights import (
    IntegerWeight,
    dequantized,
    multiplied_weight,
    nbits_weight,
    read_weight,
)
from onnx_lowrank.graph.walk import attribute, float_attribute, node_name, operator
from onnx_lowrank.numerics.contents import content_of

__all__ = ["HANDLED", "Dequantized", "FloatMaps", "holds_weight"]

_MS = "com.microsoft"
# Operators whose weights may be factored: where the weight is among the inputs.
_MAPS = {
    **dict.fromkeys(("Conv", "GRU", "LSTM", "RNN"), (1,)),
    **dict.fromkeys(("Einsum", "Gemm", "MatMul"), (0, 1)),
}
# These make a weight only where they compute with constants.
_COMPUTED = frozenset({"Add", "Mul"})
_SUFFIXES = ("_quantized", "_Q4", "_Q8")


@dataclass
class Dequantized:
    """What was made floats.

    Attributes:
        bits: name of the constant of a weight -> bits of its codes, as they were.
        bytes: the same -> bytes of its codes, scales and zero points.
        nodes: names of the maps.
        left: name of a node with a quantized weight -> why it stays.
    """

    bits: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    nodes: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)


class FloatMaps:
    """The quantized maps of one model.

    Attributes:
        found: what was made floats so far.
    """

    def __init__(self, constants: Constants, edits: Edits) -> None:
        """Of a model, whose main graph is changed."""
        self.found = Dequantized()
        self._graph = constants.model.graph
        self._constants, self._edits = constants, edits
        self._floats: dict[tuple[ir.Value, str], ir.Value] = {}

    def map(self, node: ir.Node) -> None:
        """Make floats of a node's weight, if it is a map with a quantized one."""
        if not holds_weight(node, self._constants):
            return
        why = HANDLED[operator(node)](self, node)
        if why:
            self.found.left[node_name(node)] = why

    # Each of these answers why a node stays, "" where it is done or is no quantized map.

    def dynamic(self, node: ir.Node) -> str:
        """MatMulInteger or ConvInteger, as dynamic quantization writes it."""
        rounds = producer_of(node.inputs[0])
        cast = _only_reader(node.outputs[0], "Cast")
        scaled = None if cast is None else _only_reader(cast.outputs[0], "Mul")
        if rounds is None or rounds.op_type != "DynamicQuantizeLinear" or scaled is None:
            return "its input is not rounded by DynamicQuantizeLinear, or its sums not scaled"
        assert cast is not None
        zero = node.inputs[2] if len(node.inputs) > 2 else None
        if zero is not rounds.outputs[2]:
            return "its input has another zero point than it was rounded with"
        others = [value for value in scaled.inputs if value is not cast.outputs[0]]
        product = producer_of(others[0]) if len(others) == 1 else None
        factors = () if product is None or product.op_type != "Mul" else product.inputs
        scales = [value for value in factors if value is not rounds.outputs[1]]
        if len(factors) != 2 or len(scales) != 1:
            return "its sums are not scaled by the scales of its input and weight"
        conv = node.op_type == "ConvInteger"
        zeros = node.inputs[3] if len(node.inputs) > 3 else None
        weight = read_weight(self._constants, node.inputs[1], scales[0], zeros, 0 if conv else -1)
        if isinstance(weight, str):
            return weight
        shape = self._shape(scales[0])
        if math.prod(shape) != 1 and (conv or math.prod(shape) != shape[-1]):
            return "its scales are not those of its outputs"
        attributes = list(node.attributes.values())
        name = node_name(node)
        self._edits.become(
            scaled,
            "Conv" if conv else "MatMul",
            [rounds.inputs[0], self._weight(weight, name)],
            attributes,
        )
        self._named(scaled, node)
        return ""

    def fused(self, node: ir.Node) -> str:
        """DynamicQuantizeMatMul(x, q, s, z, b)."""
        inputs = [*node.inputs, *[None] * 5][:5]
        weight = read_weight(self._constants, inputs[1], inputs[2], inputs[3], -1)
        if isinstance(weight, str):
            return weight
        self._product(node, inputs[0], weight, inputs[4])
        return ""

    def to_float(self, node: ir.Node) -> str:
        """MatMulIntegerToFloat(x, q, sx, s, zx, z, b)."""
        inputs = [*node.inputs, *[None] * 7][:7]
        rounds = producer_of(inputs[0])
        if rounds is None or rounds.op_type != "DynamicQuantizeLinear":
            return "its input is not rounded by DynamicQuantizeLinear"
        if inputs[2] is not rounds.outputs[1] or inputs[4] is not rounds.outputs[2]:
            return "its input has another scale or zero point than it was rounded with"
        weight = read_weight(self._constants, inputs[1], inputs[3], inputs[5], -1)
        if isinstance(weight, str):
            return weight
        self._product(node, rounds.inputs[0], weight, inputs[6])
        return ""

    def nbits(self, node: ir.Node) -> str:
        """MatMulNBits."""
        weight = nbits_weight(node, self._constants)
        if isinstance(weight, str):
            return weight
        bias = node.inputs[5] if len(node.inputs) > 5 else None
        self._product(node, node.inputs[0], weight, bias)
        return ""

    def operator(self, node: ir.Node) -> str:
        """QLinearMatMul, QLinearConv or QGemm: between a DequantizeLinear and a QuantizeLinear.

        A QGemm may give floats itself.
        """
        if attribute(node, "channels_last", 0):
            return "its channels are the last axis"
        kind = node.op_type.removeprefix("QLinear").removeprefix("Q")
        inputs = [*node.inputs, *[None] * 9][:9]
        conv, gemm = kind == "Conv", kind == "Gemm"
        out = inputs[7:9] if gemm else inputs[6:8]
        bias = inputs[6] if gemm else inputs[8] if conv else None
        axis = 0 if conv or attribute(node, "transB", 0) else -1
        weight = read_weight(self._constants, inputs[3], inputs[4], inputs[5], axis)
        if isinstance(weight, str):
            return weight
        added = None
        if bias is not None:
            steps = [self._constants.literal(inputs[index]) for index in (1, 4)]
            codes = self._constants.literal(bias)
            if codes is None or any(step is None for step in steps):
                return "its bias or the scale of its input is not constant"
            a, b = (np.asarray(step, np.float32) for step in steps)
            each = a.reshape(-1)[0] * b.reshape(-1) * float_attribute(node, "alpha", 1.0)
            values = dequantized(codes, each, None, codes.ndim - 1)
            added = self._edits.constant(values, f"{node_name(node)}.bias")
        x = self._edits.before(node, "DequantizeLinear", inputs[:3], "floats")
        weight_value = self._weight(weight, node_name(node))
        attributes = list(node.attributes.values())
        terms = [x, weight_value, *([] if added is None else [added])]
        name = node_name(node)
        if out[0] is None:
            self.found.nodes.append(name)
            self._edits.become(node, kind, terms, attributes)
            return ""
        product = self._edits.before(node, kind, terms, "product", attributes)
        self._named(product.producer(), node)
        self._edits.become(node, "QuantizeLinear", [product, *out])
        node.name = self._edits.name(f"{name}.rounded")
        return ""

    def constant(self, node: ir.Node) -> str:
        """A DequantizeLinear of constants that a linear map reads, or that is added to one."""
        source = self._constants.resolve(node.inputs[0])
        if not isinstance(source, Constant):
            return ""
        known = [own for own in self._constants.readers(node.outputs[0]) if not _asks_size(*own)]
        readers = [reader for reader, _ in known if reader is not None]
        small = len(source.shape) < 2
        maps = [own for own, index in known if own is not None and _may_be_factored(own, index)]
        if not small and (not maps or len(maps) < len(known)):
            return "something else than linear maps reads it too" if maps else ""
        if len(readers) < len(known) or any(own.graph is not self._graph for own in readers):
            return "it is an output, or read inside a subgraph"
        zeros = node.inputs[2] if len(node.inputs) > 2 else None
        axis, block = attribute(node, "axis", 1), attribute(node, "block_size", 0)
        weight = read_weight(self._constants, node.inputs[0], node.inputs[1], zeros, axis, block)
        if isinstance(weight, str):
            return weight
        name = node_name(node)
        value = self._edits.constant(weight.values, name) if small else self._weight(weight, name)
        node.outputs[0].replace_all_uses_with(value)
        if not small:
            self.found.nodes += [node_name(reader) for reader in readers]
        return ""

    def multiplied(self, node: ir.Node) -> str:
        """A Mul of codes and their scales, as weights of convolutions are written; an Add to it."""
        if all(self._shifts(reader) for reader, _ in self._constants.readers(node.outputs[0])):
            return ""  # the Adds make the weight
        weight = multiplied_weight(node, self._constants)
        if isinstance(weight, str):
            return weight
        known = list(self._constants.readers(node.outputs[0]))
        readers = [own for own, index in known if own is not None and _may_be_factored(own, index)]
        if len(readers) < len(known) or any(own.graph is not self._graph for own in readers):
            return "something else than linear maps of the main graph reads it"
        node.outputs[0].replace_all_uses_with(self._weight(weight, node_name(node)))
        self.found.nodes += [node_name(reader) for reader in readers]
        return ""

    def _shifts(self, node: ir.Node | None) -> bool:
        """Whether a node adds a constant to a weight."""
        if node is None or operator(node) != ("", "Add"):
            return False
        return holds_weight(node, self._constants)

    def _product(
        self, node: ir.Node, x: ir.Value | None, weight: IntegerWeight, bias: ir.Value | None
    ) -> None:
        """``x @ W + b`` in place of a node, which keeps its name and output."""
        value = self._weight(weight, node_name(node))
        self.found.nodes.append(node_name(node))
        if bias is None:
            self._edits.become(node, "MatMul", [x, value])
            return
        product = self._edits.before(node, "MatMul", [x, value], "product")
        self._edits.become(node, "Add", [product, bias])

    def _named(self, node: ir.Node | None, old: ir.Node) -> None:
        """A node gets the name of the map whose place it takes."""
        assert node is not None
        node.name, old.name = node_name(old), None
        self.found.nodes.append(node_name(node))

    def _weight(self, weight: IntegerWeight, name: str) -> ir.Value:
        """The constant of a weight's floats, one for all maps that read the same floats of it."""
        key = weight.root, content_of(weight.values)
        if key not in self._floats:
            base = weight.root.name or name
            for suffix in _SUFFIXES:
                base = base.removesuffix(suffix)
            self._floats[key] = self._edits.constant(weight.values, base)
            own = self._floats[key].name or ""
            self.found.bits[own], self.found.bytes[own] = weight.bits, weight.nbytes
        return self._floats[key]

    def _shape(self, value: ir.Value | None) -> tuple[int, ...]:
        found = self._constants.literal(value)
        return (0,) if found is None else found.shape


def holds_weight(node: ir.Node, constants: Constants) -> bool:
    """Whether a node is one of `HANDLED` and what may be its weight is constant.

    Attention multiplies what is computed, and so do most of the nodes that add or multiply.
    """
    if operator(node) not in HANDLED:
        return False
    if node.op_type in _COMPUTED:
        return constants.resolve(node.outputs[0]) is not None
    index = {"DequantizeLinear": 0}.get(node.op_type, 3 if node.op_type[0] == "Q" else 1)
    value = node.inputs[index] if index < len(node.inputs) else None
    return constants.resolve(value) is not None


def _only_reader(value: ir.Value, op_type: str) -> ir.Node | None:
    """The node that alone reads a value, if it is of this operator."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output() or uses[0].node.op_type != op_type:
        return None
    return uses[0].node


def _asks_size(node: ir.Node | None, index: int) -> bool:
    """Whether a node reads the shape of an input alone."""
    return node is not None and index == 0 and operator(node) in (("", "Shape"), ("", "Size"))


def _may_be_factored(node: ir.Node, index: int) -> bool:
    """Whether an input of a node is a weight that may be factored, or have a number format."""
    return node.domain in ("", "ai.onnx") and index in _MAPS.get(node.op_type, ())


HANDLED = {
    ("", "Add"): FloatMaps.multiplied,
    ("", "ConvInteger"): FloatMaps.dynamic,
    ("", "DequantizeLinear"): FloatMaps.constant,
    ("", "MatMulInteger"): FloatMaps.dynamic,
    ("", "Mul"): FloatMaps.multiplied,
    ("", "QLinearConv"): FloatMaps.operator,
    ("", "QLinearMatMul"): FloatMaps.operator,
    (_MS, "DequantizeLinear"): FloatMaps.constant,
    (_MS, "DynamicQuantizeMatMul"): FloatMaps.fused,
    (_MS, "MatMulIntegerToFloat"): FloatMaps.to_float,
    (_MS, "MatMulNBits"): FloatMaps.nbits,
    (_MS, "QGemm"): FloatMaps.operator,
    (_MS, "QLinearConv"): FloatMaps.operator,
}
"""Domain and operator of a node -> what makes floats of it."""
