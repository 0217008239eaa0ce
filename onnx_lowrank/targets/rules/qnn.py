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
        *("CumSum", "DepthToSpace", "DequantizeLinear", "Div", "Einsum", "Elu", "Equal", "Exp"),
        *("Expand", "Flatten", "Floor", "Gather", "GatherElements", "GatherND", "Gelu", "Gemm"),
        *("GlobalAveragePool", "GlobalMaxPool", "Greater", "GreaterOrEqual", "GridSample"),
        *("HardSigmoid", "HardSwish", "Identity", "InstanceNormalization", "LRN", "LSTM"),
        *("LayerNormalization", "LeakyRelu", "Less", "LessOrEqual", "Log", "LogSoftmax"),
        *("LpNormalization", "MatMul", "Max", "MaxPool", "Mean", "Min", "Mod", "Mul", "Neg"),
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
    """Static shapes; Gemm with α = β = 1 and C a vector of N; weights of rank 2 are best."""

    name = "qnn"
    static = True
    max_rank = 5

    def operators(self) -> frozenset[str]:
        """Those that ONNX Runtime's provider builds."""
        return _OPERATORS

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
