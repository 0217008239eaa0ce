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
        why = Gemm.of(node).scaled() or two_dimensional(graph, node)
        if graph.in_integers(node):
            return why or _integers(graph, node)
        why = why or constant_weights(graph, node, {1: "B"})
        if why is None and bias_is_vector(graph, node) is False:
            why = "C must be a vector of N"
        return why

    def convolution(self, graph: Graph, node: ir.Node) -> str | None:
        """CONV_2D with constant weights."""
        if spatial_axes(graph, node) != 2:
            return "only 2-D Conv"
        if graph.in_integers(node):
            return _integers(graph, node)
        return constant_weights(graph, node, {1: "W", 2: "the bias"})

    def quantizer(self, graph: Graph, node: ir.Node) -> str | None:
        """uint8 with one scale; weights of products of integers int8 too, of Conv by channels."""
        why = super().quantizer(graph, node)
        if why is not None:
            return why
        for value in node.inputs[1:]:
            if value is not None and not graph.constant(value):
                return "scales and zero points must be constant"
        if node.op_type == "DequantizeLinear" and graph.serves_integers(node):
            return None  # the product is judged
        coded = node.inputs[0] if node.op_type == "DequantizeLinear" else node.outputs[0]
        if graph.dtype(coded) not in (None, ir.DataType.UINT8):
            return "uint8 only, but for the weights of products whose inputs and results are uint8"
        return _ONE if (graph.scales(node) or 1) > 1 else None


_ONE = "one scale for a tensor"


def _integers(graph: Graph, node: ir.Node) -> str | None:
    """Why a product of integers is refused."""
    a, b = (graph.dequantizer(value) for value in node.inputs[:2])
    if a is None or b is None:
        return None
    result = next(use.node for use in node.outputs[0].uses())
    if any(graph.dtype(v) not in (None, ir.DataType.UINT8) for v in (a.inputs[0], *result.outputs)):
        return "what is multiplied, and the result, must be uint8"
    if graph.dtype(b.inputs[0]) not in (None, ir.DataType.UINT8, ir.DataType.INT8):
        return "weights must be uint8 or int8"
    # A bias of floats becomes integers before the provider is asked.
    biases = (value for value in node.inputs[2:] if value is not None)
    kept = [b.inputs[0], *(graph.coded(value) for value in biases)]
    if not all(graph.constant(value) for value in kept):
        return "weights and bias must be constant"
    if node.op_type != "Conv" and (graph.scales(b) or 1) > 1:
        return _ONE
    return None
