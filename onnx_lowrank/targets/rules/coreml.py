"""CoreML: Apple's accelerators, in two formats of models."""

from __future__ import annotations

import onnx_ir as ir

from onnx_lowrank.targets.rules.base import (
    Gemm,
    Graph,
    Rules,
    constant_weights,
    listed_operators,
    spatial_axes,
    two_dimensional,
)

__all__ = ["CoreMlNeuralNetwork", "CoreMlProgram"]


class CoreMlProgram(Rules):
    """MLProgram, iOS 15 and later: products of up to 5 axes with constant B and C; no Q/DQ."""

    name = "coreml (MLProgram)"
    max_rank = 5

    def operators(self) -> frozenset[str]:
        """As ONNX Runtime lists them."""
        return listed_operators("coreml_supported_mlprogram_ops.md")

    def product(self, graph: Graph, node: ir.Node) -> str | None:
        """B and C constant, α = β = 1, transA = 0."""
        return Gemm.of(node).scaled() or constant_weights(graph, node, {1: "B", 2: "C"})

    def convolution(self, graph: Graph, node: ir.Node) -> str | None:
        """One or two spatial axes."""
        if spatial_axes(graph, node) not in (1, 2):
            return "only 1-D and 2-D Conv"
        return constant_weights(graph, node, {1: "W", 2: "the bias"})


class CoreMlNeuralNetwork(CoreMlProgram):
    """NeuralNetwork, the older format and ONNX Runtime's default: products of matrices only."""

    name = "coreml (NeuralNetwork)"

    def operators(self) -> frozenset[str]:
        """As ONNX Runtime lists them."""
        return listed_operators("coreml_supported_neuralnetwork_ops.md")

    def product(self, graph: Graph, node: ir.Node) -> str | None:
        """As MLProgram, but 2-D."""
        return two_dimensional(graph, node) or super().product(graph, node)
