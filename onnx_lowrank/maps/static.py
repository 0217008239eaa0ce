"""Products of integers whose inputs and results have ranges that are known before a run.

``X @ W``  ->  ``D(Q(D(Q(X)) @ D(w)))``, with Q QuantizeLinear and D DequantizeLinear

A provider that knows integers makes one node of each product and what stands around it ("QDQ").
These are the nodes that ``quantize_static`` of ONNX Runtime writes; they need opset 13.  All that
reads one value shares what rounds it, and a result that the next product reads is rounded once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnx_lowrank.graph.edits import put_behind
from onnx_lowrank.maps.emit import Storage

__all__ = ["ByteStep", "StaticWriter", "rounded_values"]


@dataclass(frozen=True)
class ByteStep:
    """How integers of 8 bits without a sign stand for floats: ``scale · (q - zero)``.

    Attributes:
        scale: above 0.
        zero: from 0 to 255.
    """

    scale: float
    zero: int


def rounded_values(nodes: Sequence[ir.Node]) -> list[str]:
    """Names of what products read and give: the values whose steps have to be known."""
    values = (value for node in nodes for value in (node.inputs[0], node.outputs[0]))
    return list(dict.fromkeys(value.name or "" for value in values if value is not None))


class StaticWriter:
    """Rounds what stands around products of one model's main graph."""

    def __init__(self, graph: ir.Graph, storage: Storage) -> None:
        self._graph, self._storage = graph, storage
        self._rounded: dict[ir.Value, ir.Value] = {}

    def surround(self, nodes: Sequence[ir.Node], steps: Mapping[str, ByteStep]) -> None:
        """Round what products read and what they give.

        Args:
            nodes: MatMul or Gemm nodes of the main graph.
            steps: of the values that `rounded_values` names.
        """
        inputs = [(node, steps[name]) for node, name in zip(nodes, _read(nodes), strict=True)]
        for node in nodes:
            result = node.outputs[0]
            self._behind(node, result, steps[result.name or ""])
        for node, step in inputs:
            x = node.inputs[0]
            assert x is not None
            if x in self._rounded.values():  # a result that is rounded already
                continue
            if x not in self._rounded:
                self._rounded[x] = self._before(x, step)
            node.replace_input_with(0, self._rounded[x])

    def _before(self, x: ir.Value, step: ByteStep) -> ir.Value:
        """What integers make of a value that other nodes may read as it is."""
        quantize, dequantize = self._nodes(x, step, f"{x.name}.rounded")
        put_behind(self._graph, x, [quantize, dequantize])
        return dequantize.outputs[0]

    def _behind(self, node: ir.Node, y: ir.Value, step: ByteStep) -> None:
        """Give all that reads a result what integers make of it, under the result's name."""
        if y in self._rounded:
            return
        name, uses = y.name or "", list(y.uses())
        quantize, dequantize = self._nodes(y, step, name)
        y.name = self._storage.new_name(f"{name}.exact")
        rounded = dequantize.outputs[0]
        rounded.name = name
        self._graph.insert_after(node, [quantize, dequantize])
        for use in uses:
            use.node.replace_input_with(use.idx, rounded)
        for index, output in enumerate(self._graph.outputs):
            if output is y:
                self._graph.outputs[index] = rounded
        self._rounded[y] = rounded

    def _nodes(self, value: ir.Value, step: ByteStep, name: str) -> tuple[ir.Node, ir.Node]:
        """The two nodes behind a value; the second one gives what has the name, or a new one."""
        base = value.name or ""
        scale = self._storage.store(
            self._graph, np.array(step.scale, np.float32), f"{base}.scale", in_node=False
        )
        zero = self._storage.store(
            self._graph, np.array(step.zero, np.uint8), f"{base}.zero", in_node=False
        )
        quantize = self._node("QuantizeLinear", [value, scale, zero], f"{base}.quantize")
        integers = quantize.outputs[0]
        integers.name, integers.dtype = self._storage.new_name(f"{base}.q8"), ir.DataType.UINT8
        dequantize = self._node("DequantizeLinear", [integers, scale, zero], f"{base}.dequantize")
        result = dequantize.outputs[0]
        result.type = value.type
        if name != base:
            result.name = self._storage.new_name(name)
        integers.shape = result.shape = value.shape
        return quantize, dequantize

    def _node(self, op_type: str, inputs: Sequence[ir.Value], name: str) -> ir.Node:
        return ir.Node("", op_type, list(inputs), name=self._storage.new_name(name))


def _read(nodes: Sequence[ir.Node]) -> list[str]:
    return [(node.inputs[0].name or "") if node.inputs[0] is not None else "" for node in nodes]
