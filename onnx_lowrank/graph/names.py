"""Deterministic names that nothing in a model has yet."""

from __future__ import annotations

import onnx_ir as ir

from onnx_lowrank.graph.walk import all_graphs, all_nodes

__all__ = ["Names"]


class Names:
    """Gives names to new nodes and values, unique over the whole model.

    ONNX lets a subgraph see the names of the graphs around it and forbids it to give them again,
    so one set serves the main graph, all subgraphs and all functions.
    """

    def __init__(self, model: ir.Model) -> None:
        self._taken: set[str | None] = set()
        for graph in all_graphs(model):
            self._taken.update(value.name for value in graph.inputs)
            self._taken.update(graph.initializers)
        for function in model.functions.values():
            self._taken.update(value.name for value in function.inputs)
        for node in all_nodes(model):
            self._taken.add(node.name)
            self._taken.update(value.name for value in node.outputs)

    def new(self, wanted: str) -> str:
        """The wanted name, or with the smallest ``_2``, ``_3``… that makes it unique."""
        name, count = wanted, 1
        while name in self._taken:
            count += 1
            name = f"{wanted}_{count}"
        self._taken.add(name)
        return name
