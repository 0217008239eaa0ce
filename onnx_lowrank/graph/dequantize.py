"""Dequantize: linear maps of a quantized model become maps of floats, in place.

``MatMulInteger(DynamicQuantizeLinear(x), q) · s``   ->  ``MatMul(x, W)``, and ConvInteger
``MatMul(x, DequantizeLinear(q, s))``                ->  ``MatMul(x, W)``, and Conv, Gemm, …
``QLinearMatMul(x, …, q, …)``                        ->  ``QuantizeLinear(MatMul(…, W))``
``MatMulNBits(x, q, s)``                             ->  ``MatMul(x, W)``
``Conv(x, Cast(q) · Cast(s))``                       ->  ``Conv(x, W)``
``DequantizeLinear(QuantizeLinear(x))``              ->  ``Clip(x)``

The pair of the last line cuts off what is beyond its range, which takes the place of a Relu that a
quantizer left out; only its rounding goes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from onnx_lowrank.graph.constant import Constant
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.graph.elements import constant_value
from onnx_lowrank.graph.integer_weights import (
    IntegerWeight,
    dequantized,
    multiplied_weight,
    nbits_weight,
    read_weight,
)
from onnx_lowrank.graph.names import Names
from onnx_lowrank.graph.spool import Spool
from onnx_lowrank.graph.walk import all_nodes, attribute, float_attribute, node_name, operator
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.contents import content_of

__all__ = ["Dequantized", "dequantize", "holds_integers"]

_MS = "com.microsoft"
# Operators whose weights may be factored: where the weight is among the inputs.
_MAPS = {
    **dict.fromkeys(("Conv", "GRU", "LSTM", "RNN"), (1,)),
    **dict.fromkeys(("Einsum", "Gemm", "MatMul"), (0, 1)),
}
_SUFFIXES = ("_quantized", "_Q4", "_Q8")
# Types of the codes of a QuantizeLinear without a zero point, by its output_dtype.
_UNSAID: dict[int, type[np.uint8 | np.int8]] = {
    0: np.uint8,
    int(ir.DataType.UINT8): np.uint8,
    int(ir.DataType.INT8): np.int8,
}
# What goes with a map that nothing reads any more.
_GOES = frozenset(
    {
        *("Cast", "Constant", "Expand", "Mul", "Reshape", "Slice"),
        *("DequantizeLinear", "DynamicQuantizeLinear", "QuantizeLinear"),
    }
)


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


def dequantize(model: ir.Model, spool: Spool) -> Dequantized:
    """Make floats of the weights of linear maps.

    Args:
        model: of opset 13 or newer; its main graph is changed.
        spool: where the floats wait until they are saved.
    """
    run = _Run(model, spool)
    for node in list(model.graph):
        run.map(node)
    for node in list(model.graph):
        run.pair(node)
    run.clear()
    outer = set(model.graph)
    for node in all_nodes(model):
        if node not in outer and operator(node) in _HANDLED and node.op_type != "Mul":
            run.found.left[node_name(node)] = "it is inside a subgraph or function"
    return run.found


def holds_integers(model: ir.Model) -> bool:
    """Whether the main graph has nodes that `dequantize` looks at."""
    constants = Constants(model)
    return any(
        operator(node) in _HANDLED
        and (node.op_type != "Mul" or constants.resolve(node.outputs[0]) is not None)
        for node in model.graph
    )


class _Run:
    def __init__(self, model: ir.Model, spool: Spool) -> None:
        self.found = Dequantized()
        self._model, self._graph, self._spool = model, model.graph, spool
        self._names, self._constants = Names(model), Constants(model)
        self._floats: dict[tuple[ir.Value, str], ir.Value] = {}
        self._before = {v for v in model.graph.initializers.values() if v.uses()}

    def map(self, node: ir.Node) -> None:
        """Make floats of a node's weight, if it is a map with a quantized one."""
        handler = _HANDLED.get(operator(node))
        if handler is None or not self._holds_weight(node):
            return
        why = handler(self, node)
        if why:
            self.found.left[node_name(node)] = why

    def _holds_weight(self, node: ir.Node) -> bool:
        """Whether what may be a weight is constant; attention multiplies what is computed."""
        if node.op_type == "Mul":
            return self._constants.resolve(node.outputs[0]) is not None
        index = {"DequantizeLinear": 0}.get(node.op_type, 3 if node.op_type[0] == "Q" else 1)
        value = node.inputs[index] if index < len(node.inputs) else None
        return self._constants.resolve(value) is not None

    def pair(self, node: ir.Node) -> None:
        """Let a value that is rounded and made a float again be cut off only."""
        if node.op_type != "DequantizeLinear" or node.inputs[0] is None:
            return
        before = node.inputs[0].producer()
        if before is None or before.op_type != "QuantizeLinear":
            return
        unsaid = _UNSAID.get(attribute(before, "output_dtype", 0))
        if unsaid is None:
            return
        scale, zero = self._step(node, unsaid)
        if scale is None or self._step(before, unsaid) != (scale, zero):
            return
        source = before.inputs[0]
        if self._constants.resolve(source) is not None:
            return  # a weight, as quantization-aware training leaves it
        if zero is None or any(self._stays(other) for other in self._around(before, node)):
            return
        limits = np.iinfo(zero.dtype)
        low, high = (
            self._constant(
                np.array(float(scale) * (limit - float(zero)), np.float32),
                f"{node_name(node)}.{name}",
            )
            for limit, name in ((limits.min, "min"), (limits.max, "max"))
        )
        _become(node, "Clip", [source, low, high])

    def _step(
        self, node: ir.Node, unsaid: type[np.uint8 | np.int8]
    ) -> tuple[np.float32 | None, np.uint8 | np.int8 | None]:
        """Scale and zero point of a node, where it has one of each; None otherwise.

        Without a zero point it is the 0 of the type ``unsaid``.
        """
        scale = self._constants.literal(node.inputs[1])
        given = node.inputs[2] if len(node.inputs) > 2 else None
        zero = np.zeros(1, unsaid) if given is None else self._constants.literal(given)
        if scale is None or scale.size != 1 or scale.dtype != np.float32:
            return None, None
        if zero is None or zero.size != 1 or zero.dtype not in (np.uint8, np.int8):
            return None, None
        return scale.reshape(-1)[0], zero.reshape(-1)[0]

    def clear(self) -> None:
        """Remove what nobody reads any more."""
        for node in reversed(list(self._graph)):
            dead = not any(v.uses() or v.is_graph_output() for v in node.outputs)
            if dead and (node.op_type in _GOES or operator(node) in _HANDLED):
                self._graph.remove(node, safe=True)
        for value in self._before:
            if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
                self._graph.initializers.pop(value.name or "")

    # Each of these answers why a node stays, "" where it is done or is no quantized map.

    def dynamic(self, node: ir.Node) -> str:
        """MatMulInteger or ConvInteger, as dynamic quantization writes it."""
        rounds = _producer(node.inputs[0])
        cast = _only_reader(node.outputs[0], "Cast")
        scaled = None if cast is None else _only_reader(cast.outputs[0], "Mul")
        if rounds is None or rounds.op_type != "DynamicQuantizeLinear" or scaled is None:
            return "its input is not rounded by DynamicQuantizeLinear, or its sums not scaled"
        assert cast is not None
        zero = node.inputs[2] if len(node.inputs) > 2 else None
        if zero is not rounds.outputs[2]:
            return "its input has another zero point than it was rounded with"
        others = [value for value in scaled.inputs if value is not cast.outputs[0]]
        product = _producer(others[0]) if len(others) == 1 else None
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
        _become(
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
        rounds = _producer(inputs[0])
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
            added = self._constant(values, f"{node_name(node)}.bias")
        x = self._before_node(node, "DequantizeLinear", inputs[:3], "floats")
        weight_value = self._weight(weight, node_name(node))
        attributes = list(node.attributes.values())
        terms = [x, weight_value, *([] if added is None else [added])]
        name = node_name(node)
        if out[0] is None:
            self.found.nodes.append(name)
            _become(node, kind, terms, attributes)
            return ""
        product = self._before_node(node, kind, terms, "product", attributes)
        self._named(product.producer(), node)
        _become(node, "QuantizeLinear", [product, *out])
        node.name = self._names.new(f"{name}.rounded")
        return ""

    def constant(self, node: ir.Node) -> str:
        """A DequantizeLinear of constants that a linear map reads, or that is added to one."""
        source = self._constants.resolve(node.inputs[0])
        if not isinstance(source, Constant):
            return ""
        known = list(self._constants.readers(node.outputs[0]))
        readers = [reader for reader, _ in known if reader is not None]
        small = len(source.shape) < 2
        if not small and not all(own is not None and _may_be_factored(own, i) for own, i in known):
            return ""
        if len(readers) < len(known) or any(own.graph is not self._graph for own in readers):
            return "it is an output, or read inside a subgraph"
        zeros = node.inputs[2] if len(node.inputs) > 2 else None
        axis, block = attribute(node, "axis", 1), attribute(node, "block_size", 0)
        weight = read_weight(self._constants, node.inputs[0], node.inputs[1], zeros, axis, block)
        if isinstance(weight, str):
            return weight
        name = node_name(node)
        value = self._constant(weight.values, name) if small else self._weight(weight, name)
        node.outputs[0].replace_all_uses_with(value)
        if not small:
            self.found.nodes += [node_name(reader) for reader in readers]
        return ""

    def multiplied(self, node: ir.Node) -> str:
        """A Mul of codes and their scales, as this tool writes weights of convolutions."""
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

    def _product(
        self, node: ir.Node, x: ir.Value | None, weight: IntegerWeight, bias: ir.Value | None
    ) -> None:
        """``x @ W + b`` in place of a node, which keeps its name and output."""
        value = self._weight(weight, node_name(node))
        self.found.nodes.append(node_name(node))
        if bias is None:
            _become(node, "MatMul", [x, value])
            return
        product = self._before_node(node, "MatMul", [x, value], "product")
        _become(node, "Add", [product, bias])

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
            self._floats[key] = self._constant(weight.values, base)
            own = self._floats[key].name or ""
            self.found.bits[own], self.found.bytes[own] = weight.bits, weight.nbytes
        return self._floats[key]

    def _shape(self, value: ir.Value | None) -> tuple[int, ...]:
        found = self._constants.literal(value)
        return (0,) if found is None else found.shape

    def _constant(self, array: Array, name: str) -> ir.Value:
        name = self._names.new(name)
        value = constant_value(self._spool.store(np.ascontiguousarray(array), name))
        self._graph.register_initializer(value)
        return value

    def _before_node(
        self,
        node: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        suffix: str,
        attributes: Sequence[ir.Attr] = (),
    ) -> ir.Value:
        name = self._names.new(f"{node_name(node)}.{suffix}")
        new = ir.Node("", op_type, list(inputs), attributes, name=name)
        value = new.outputs[0]
        value.name, value.dtype = self._names.new(f"{name}_out"), ir.DataType.FLOAT
        value.shape = None if op_type == "DequantizeLinear" else node.outputs[0].shape
        self._graph.insert_before(node, new)
        return value

    def _around(self, first: ir.Node, second: ir.Node) -> list[ir.Node]:
        """What gives the value that a pair rounds, and what reads it behind."""
        source = _producer(first.inputs[0])
        return [*([] if source is None else [source]), *(u.node for u in second.outputs[0].uses())]

    def _stays(self, node: ir.Node) -> bool:
        """Whether a node multiplies with a weight that is still quantized."""
        for value in node.inputs[1:]:
            source = _producer(value)
            if source is not None and source.op_type == "DequantizeLinear":
                found = self._constants.resolve(source.inputs[0])
                if isinstance(found, Constant) and len(found.shape) > 1:
                    return True
        return False


def _become(
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
        node.outputs[0].dtype = ir.DataType.FLOAT


def _producer(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()


def _only_reader(value: ir.Value, op_type: str) -> ir.Node | None:
    """The node that alone reads a value, if it is of this operator."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output() or uses[0].node.op_type != op_type:
        return None
    return uses[0].node


def _may_be_factored(node: ir.Node, index: int) -> bool:
    """Whether an input of a node is a weight that may be factored, or have a number format."""
    return node.domain in ("", "ai.onnx") and index in _MAPS.get(node.op_type, ())


_HANDLED = {
    ("", "ConvInteger"): _Run.dynamic,
    ("", "DequantizeLinear"): _Run.constant,
    ("", "MatMulInteger"): _Run.dynamic,
    ("", "Mul"): _Run.multiplied,
    ("", "QLinearConv"): _Run.operator,
    ("", "QLinearMatMul"): _Run.operator,
    (_MS, "DequantizeLinear"): _Run.constant,
    (_MS, "DynamicQuantizeMatMul"): _Run.fused,
    (_MS, "MatMulIntegerToFloat"): _Run.to_float,
    (_MS, "MatMulNBits"): _Run.nbits,
    (_MS, "QGemm"): _Run.operator,
    (_MS, "QLinearConv"): _Run.operator,
}
