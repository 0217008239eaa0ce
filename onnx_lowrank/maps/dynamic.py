"""Products of integers whose inputs are quantized in every run.

``X @ W``  ->  ``q, t, z = DynamicQuantizeLinear(X)``, ``Cast(MatMulInteger(q, w, z)) · (t · s)``
``Gemm(X, W, C)``  ->  the same, ``+ C``

``w`` holds integers of 8 bits and ``s`` a scale for each column.  All products that read one value
share one DynamicQuantizeLinear.  These are the nodes that ``quantize_dynamic`` of ONNX Runtime
writes, which fuses them again; no operator is newer than opset 11.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnx_lowrank.graph.edits import become, node_before, put_behind
from onnx_lowrank.graph.walk import attribute, float_attribute, node_name
from onnx_lowrank.maps.emit import Storage
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.blocks import Blocks

__all__ = ["DynamicWriter", "rounds_inputs"]

# What is added to signed integers where they are stored without a sign.
_ZERO = 128


def rounds_inputs(nodes: Sequence[ir.Node]) -> bool:
    """Whether products can be written so: a Gemm must not scale or transpose its input."""
    return all(
        attribute(node, "transA", 0) == 0
        and float_attribute(node, "alpha", 1.0) == 1.0
        and (float_attribute(node, "beta", 1.0) == 1.0 or len(node.inputs) < 3)
        for node in nodes
    )


class DynamicWriter:
    """Writes such products into one model's main graph."""

    def __init__(self, graph: ir.Graph, storage: Storage) -> None:
        self._graph, self._storage = graph, storage
        self._inputs: dict[ir.Value, tuple[ir.Value, ...]] = {}
        self._zero: ir.Value | None = None

    def write(
        self, nodes: Sequence[ir.Node], codes: Blocks, *, signed: bool, in_node: bool
    ) -> None:
        """Let MatMul or Gemm nodes multiply integers; each keeps its name and its output.

        Args:
            nodes: products that read one weight.
            codes: of the weight, in × out, with one scale for each column.
            signed: whether the integers are stored with a sign.
            in_node: whether they are kept in Constant nodes.
        """
        base = node_name(nodes[0])
        integers = codes.codes.astype(np.int8)
        stored = integers if signed else (integers.astype(np.int16) + _ZERO).astype(np.uint8)
        w = self._constant(stored, f"{base}.q8", in_node=in_node)
        scales = codes.scales.reshape(-1).astype(np.float32)
        s = self._constant(scales, f"{base}.scales", in_node=in_node)
        for node in nodes:
            self._product(node, w, s, signed=signed)

    def _product(self, node: ir.Node, w: ir.Value, s: ir.Value, *, signed: bool) -> None:
        x, third = node.inputs[0], node.inputs[2] if len(node.inputs) > 2 else None
        assert x is not None
        q, t, z = self._quantized(x)
        shape = node.outputs[0].shape
        inputs = [q, w, z] if signed else [q, w, z, self._middle()]
        whole = self._before(node, "MatMulInteger", inputs, ir.DataType.INT32, shape)
        to = [ir.AttrInt64("to", int(ir.DataType.FLOAT))]
        floats = self._before(node, "Cast", [whole], ir.DataType.FLOAT, shape, to)
        scale = self._before(node, "Mul", [t, s], ir.DataType.FLOAT, s.shape, suffix="scale")
        final = [floats, scale]
        if third is not None:
            final = [self._before(node, "Mul", final, ir.DataType.FLOAT, shape), third]
        become(node, "Mul" if third is None else "Add", final)

    def _quantized(self, x: ir.Value) -> tuple[ir.Value, ...]:
        """The integers of a value, their scale and their zero point."""
        if x not in self._inputs:
            name = self._storage.new_name(f"{x.name}.quantized")
            node = ir.Node("", "DynamicQuantizeLinear", [x], num_outputs=3, name=name)
            kinds = (ir.DataType.UINT8, ir.DataType.FLOAT, ir.DataType.UINT8)
            endings = ("q8", "q8_scale", "q8_zero")
            for value, kind, ending in zip(node.outputs, kinds, endings, strict=True):
                value.name, value.dtype = self._storage.new_name(f"{x.name}.{ending}"), kind
                value.shape = ir.Shape([])
            node.outputs[0].shape = x.shape
            put_behind(self._graph, x, [node])
            self._inputs[x] = tuple(node.outputs)
        return self._inputs[x]

    def _middle(self) -> ir.Value:
        """The zero point of integers without a sign; one for all weights."""
        if self._zero is None:
            self._zero = self._constant(np.array(_ZERO, np.uint8), "q8.zero", in_node=False)
        return self._zero

    def _constant(self, array: Array, name: str, *, in_node: bool) -> ir.Value:
        return self._storage.store(self._graph, array, name, in_node=in_node)

    def _before(
        self,
        node: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value],
        dtype: ir.DataType,
        shape: ir.Shape | None,
        attributes: Sequence[ir.Attr] = (),
        suffix: str = "",
    ) -> ir.Value:
        """The output of a new node before another one."""
        new_name = self._storage.new_name
        new = node_before(
            node, op_type, inputs, new_name, suffix, attributes=attributes, dtype=dtype, shape=shape
        )
        return new.outputs[0]
