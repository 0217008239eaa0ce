"""NNAPI: Android's own interface to its accelerators."""

from __future__ import annotations

import onnx_ir as ir

from onnx_lowrank.targets.rules.base import (
    Gemm,
    Graph,
    Rules,
    bias_is_vector,
    constant_weights,
    listed_operators,
    spatial_axes,
    two_dimensional,
)

__all__ = ["Nnapi"]


class Nnapi(Rules):
    """Static shapes; 2-D products with a constant B; α = β = 1, transA = 0, C a vector of N."""

    name = "nnapi"
    static = True

    def operators(self) -> frozenset[str]:
        """As ONNX Runtime lists them."""
        return listed_operators("nnapi_supported_ops.md")

    def product(self, graph: Graph, node: ir.Node) -> str | None:
        """MatMul and Gemm become FULLY_CONNECTED."""
        why = (
            Gemm.of(node).scaled()
            or two_dimensional(graph, node)
            or constant_weights(graph, node, {1: "B"})
        )
        if why is None and bias_is_vector(graph, node) is False:
            why = "C must be a vector of N"
        return why

    def convolution(self, graph: Graph, node: ir.Node) -> str | None:
        """CONV_2D with constant weights."""
        if spatial_axes(graph, node) != 2:
            return "only 2-D Conv"
        return constant_weights(graph, node, {1: "W", 2: "the bias"})
