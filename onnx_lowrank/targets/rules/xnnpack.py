"""XNNPACK: fast kernels for the CPUs of phones, in builds of ONNX Runtime that have it."""

from __future__ import annotations

import onnx_ir as ir

from onnx_lowrank.targets.rules.base import (
    Gemm,
    Graph,
    Rules,
    bias_is_vector,
    constant_weights,
    only_floats,
    spatial_axes,
)

__all__ = ["Xnnpack"]

_OPERATORS = frozenset(
    {"AveragePool", "Conv", "ConvTranspose", "Gemm", "MatMul", "MaxPool", "Resize", "Softmax"}
    | {"QLinearConv", "QLinearAveragePool", "QLinearSoftmax"}
)


class Xnnpack(Rules):
    """float32 and float16; B constant and of at most 2 axes; Gemm with a constant 1-D C only."""

    name = "xnnpack"

    def operators(self) -> frozenset[str]:
        """Those that ONNX Runtime registers."""
        return _OPERATORS

    def product(self, graph: Graph, node: ir.Node) -> str | None:
        """A Gemm without C must not get there: ONNX Runtime then reads through a null pointer."""
        why = only_floats(graph, node) or Gemm.of(node).scaled()
        why = why or constant_weights(graph, node, {1: "B", 2: "C"})
        if why is not None:
            return why
        ranks = [graph.rank(value) for value in node.inputs[:2]]
        if ranks[1] is None or ranks[1] > 2:
            return "B must have at most 2 axes"
        if ranks[0] is None:
            return "the rank of A must be known"
        if ranks[0] not in (ranks[1], ranks[1] + 1) or (node.op_type == "Gemm" and ranks[0] != 2):
            return f"A of {ranks[0]} axes with B of {ranks[1]}"
        if node.op_type == "Gemm":
            vector = bias_is_vector(graph, node)
            if vector is None:
                return "a Gemm without C, which crashes ONNX Runtime's XNNPACK provider"
            if not vector:
                return "C must be a vector of N"
        return None

    def convolution(self, graph: Graph, node: ir.Node) -> str | None:
        """Two spatial axes (or one), constant weights."""
        if spatial_axes(graph, node) not in (1, 2):
            return "only 1-D and 2-D Conv"
        return constant_weights(graph, node, {1: "W", 2: "the bias"})
