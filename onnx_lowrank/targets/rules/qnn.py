"""QNN: Qualcomm's HTP."""

from __future__ import annotations

import onnx_ir as ir

from onnx_lowrank.targets.rules.base import Gemm, Graph, Rules

__all__ = ["Qnn"]

# The operators that ONNX Runtime's provider has builders for.
_OPERATORS = frozenset(
    (
        *("Abs", "Add", "And", "ArgMax", "ArgMin", "Asin", "Atan", "AveragePool"),
        *("BatchNormalization", "Cast", "Ceil", "Clip", "Concat", "Conv", "ConvTranspose", "Cos"),
        *("CumSum", "DepthToSpace", "DequantizeLinear", "Div", "DynamicQuantizeLinear", "Einsum"),
        *("Elu", "Equal", "Exp"),
        *("Expand", "Flatten", "Floor", "Gather", "GatherElements", "GatherND", "Gelu", "Gemm"),
        *("GlobalAveragePool", "GlobalMaxPool", "Greater", "GreaterOrEqual", "GridSample"),
        *("HardSigmoid", "HardSwish", "Identity", "InstanceNormalization", "LRN", "LSTM"),
        *("LayerNormalization", "LeakyRelu", "Less", "LessOrEqual", "Log", "LogSoftmax"),
        *(
            "LpNormalization",
            "MatMul",
            "MatMulInteger",
            "Max",
            "MaxPool",
            "Mean",
            "Min",
            "Mod",
            "Mul",
            "Neg",
        ),
        *("Not", "Or", "PRelu", "Pad", "Pow", "QuantizeLinear", "RMSNormalization"),
        *("RandomUniformLike", "Reciprocal", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin"),
        *("ReduceProd", "ReduceSum", "Relu", "Reshape", "Resize", "Round", "STFT"),
        *("ScatterElements", "ScatterND", "Sigmoid", "Sign", "Sin", "Slice", "Softmax"),
        *("SpaceToDepth", "Split", "Sqrt", "Squeeze", "Sub", "Sum", "Tanh", "ThresholdedRelu"),
        *("Tile", "TopK", "Transpose", "Unsqueeze", "Upsample", "Where"),
        *("com.microsoft:FusedMatMul", "com.microsoft:Gelu"),
    )
)


class Qnn(Rules):
    """Static shapes; Gemm with α = β = 1 and C a vector of N; weights of rank 2 are best.

    Scales for each channel belong to products of integers.  What quantizes the model's own inputs
    and dequantizes its outputs stays on the CPU, as ONNX Runtime's provider does by default.
    DynamicQuantizeLinear and MatMulInteger are taken together, one of each.
    """

    name = "qnn"
    static = True
    max_rank = 5

    def operators(self) -> frozenset[str]:
        """Those that ONNX Runtime's provider builds."""
        return _OPERATORS

    def refusal(self, graph: Graph, node: ir.Node) -> str | None:
        """As for other providers; and products whose inputs are quantized in each run."""
        why = None
        if node.op_type in ("DynamicQuantizeLinear", "MatMulInteger"):
            why = _dynamic(graph, node)
        return why or super().refusal(graph, node)

    def product(self, graph: Graph, node: ir.Node) -> str | None:
        """Gemm and a MatMul with a rank-2 initializer become FullyConnected."""
        gemm = Gemm.of(node)
        if gemm.alpha != 1.0 or gemm.beta != 1.0:
            return f"alpha and beta must be 1, they are {gemm.alpha:g} and {gemm.beta:g}"
        if node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
            shape, output = graph.dims(node.inputs[2]), graph.dims(node.outputs[0])
            n = None if output is None else output[-1]
            if shape is None or shape not in ((n,), (1, n)):
                return "C must be [N] or [1, N]"
        return None

    def quantizer(self, graph: Graph, node: ir.Node) -> str | None:
        """A scale for each channel only where the node is part of a product of integers."""
        why = super().quantizer(graph, node)
        if why is not None:
            return why
        if node.op_type == "QuantizeLinear":
            if node.inputs[0] is not None and node.inputs[0].is_graph_input():
                return "what quantizes an input of the model stays on the CPU"
            served = False
        else:
            if node.outputs[0].is_graph_output():
                return "what dequantizes an output of the model stays on the CPU"
            served = graph.serves_integers(node)
        if not served and (graph.scales(node) or 1) > 1:
            return "a scale for each channel only in products whose factors and result are integers"
        return None


def _dynamic(graph: Graph, node: ir.Node) -> str | None:
    """Why a DynamicQuantizeLinear or a MatMulInteger is refused."""
    product, quantizer = node, node
    if node.op_type == "DynamicQuantizeLinear":
        readers = [use.node for use in node.outputs[0].uses()]
        if len(readers) != 1 or readers[0].op_type != "MatMulInteger":
            return f"only in front of one MatMulInteger, {len(readers)} nodes read its integers"
        product = readers[0]
    else:
        producer = node.inputs[0].producer() if node.inputs[0] is not None else None
        if producer is None or producer.op_type != "DynamicQuantizeLinear":
            return "only behind a DynamicQuantizeLinear"
        if len(producer.outputs[0].uses()) != 1:
            return "only where nothing else reads the integers of its DynamicQuantizeLinear"
        quantizer = producer
    third = product.inputs[2] if len(product.inputs) > 2 else None
    if product.inputs[0] is not quantizer.outputs[0] or third is not quantizer.outputs[2]:
        return "A and its zero point must come out of one DynamicQuantizeLinear"
    if graph.rank(product.inputs[1]) != 2 or not graph.constant(product.inputs[1]):
        return "B must be constant and have 2 axes"
    if [use.node.op_type for use in product.outputs[0].uses()] != ["Cast"]:
        return "the result must go into one Cast"
    return None
