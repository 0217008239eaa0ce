"""WebGPU: the GPU of a browser or of a desktop."""

from __future__ import annotations

import onnx_ir as ir

from onnx_lowrank.targets.rules.base import Graph, Rules, only_floats

__all__ = ["WebGpu"]

_OPERATORS = frozenset(
    (
        *("Abs", "Acos", "Acosh", "Add", "ArgMax", "ArgMin", "Asin", "Asinh", "Atan", "Atanh"),
        *("AveragePool", "BatchNormalization", "Cast", "Ceil", "Clip", "Concat", "Conv"),
        *("ConvTranspose", "Cos", "Cosh", "CumSum", "DepthToSpace", "DequantizeLinear", "Div"),
        *("Einsum", "Elu", "Equal", "Erf", "Exp", "Expand", "Flatten", "Floor", "Gather"),
        *("GatherElements", "GatherND", "Gelu", "Gemm", "GlobalAveragePool", "GlobalMaxPool"),
        *("Greater", "GreaterOrEqual", "HardSigmoid", "Identity", "If", "InstanceNormalization"),
        *("LayerNormalization", "LeakyRelu", "Less", "LessOrEqual", "Log", "MatMul", "Max"),
        *("MaxPool", "Min", "Mul", "Neg", "Not", "Pad", "Pow", "Range", "Reciprocal"),
        *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean"),
        *("ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare", "Relu", "Reshape", "Resize"),
        *("ScatterND", "Shape", "Sigmoid", "Sin", "Sinh", "Slice", "Softmax", "Split", "Sqrt"),
        *("Squeeze", "Sub", "Tan", "Tanh", "ThresholdedRelu", "Tile", "Transpose", "Unsqueeze"),
        *("Where", "com.microsoft:Attention", "com.microsoft:BiasGelu"),
        *("com.microsoft:FastGelu", "com.microsoft:FusedConv", "com.microsoft:Gelu"),
        *("com.microsoft:MultiHeadAttention", "com.microsoft:QuickGelu"),
        *("com.microsoft:SkipLayerNormalization",),
    )
)


class WebGpu(Rules):
    """float32 and, where the device has it, float16; takes dynamic shapes."""

    name = "webgpu"
    blocks = True

    def operators(self) -> frozenset[str]:
        """Those that ONNX Runtime has kernels for."""
        return _OPERATORS

    def product(self, graph: Graph, node: ir.Node) -> str | None:
        """Any product of floats."""
        return only_floats(graph, node)
