"""Rules of the providers, asked about a little model."""

from __future__ import annotations

import onnx_ir as ir

from onnx_lowrank.graph.fixed import infer_shapes
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.targets.rules import Graph, all_rules
from tests.helpers.models import parse

__all__ = ["ML", "NN", "RULES", "only"]

RULES = {rules.name: rules for rules in all_rules()}
NN, ML = "coreml (NeuralNetwork)", "coreml (MLProgram)"


def only(text: str, weights: dict[str, Array], node: int = -1) -> dict[str, str | None]:
    """Provider -> why it refuses a node of a model."""
    model = ir.from_proto(
        parse(f'<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]> {text}', weights)
    )
    infer_shapes(model)
    graph = Graph(model)
    return {name: rules.refusal(graph, graph.nodes[node]) for name, rules in RULES.items()}
