"""In which numbers the weights of a linear map are stored, and writing them down.

``x @ W``  ->  ``x @ DequantizeLinear(q, s)``  with blocks along the axis that is summed over

That is what ONNX Runtime makes MatMulNBits of, by itself; it needs opset 21.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir

from onnx_lowrank.graph.constants import Constant, Constants
from onnx_lowrank.graph.names import Names
from onnx_lowrank.graph.spool import Spool
from onnx_lowrank.graph.walk import node_name
from onnx_lowrank.maps.emit import Storage, TypedShape
from onnx_lowrank.maps.find import Group
from onnx_lowrank.maps.rewrite import remove_unread
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.blocks import Bits, Blocks

__all__ = ["OPSET", "SMALLEST", "Format", "FormatWriter", "no_format", "suited"]

OPSET = 21
"""The first one whose DequantizeLinear knows blocks and 4 bits."""

SMALLEST = 16
"""The smallest block of the kernels that multiply with one."""
# Forms whose weight may stand behind a DequantizeLinear that runtimes fuse with the product.
_PRODUCTS = frozenset({"matmul-right", "gemm-right"})
_KINDS = {(4, True): ml_dtypes.int4, (4, False): ml_dtypes.uint4, (8, True): np.int8}


@dataclass(frozen=True)
class Format:
    """Integers in blocks.

    Attributes:
        bits: of a weight.
        block: weights of a column that share a scale.
    """

    bits: Bits
    block: int

    def __str__(self) -> str:
        return f"{self.bits} bits by {self.block}"

    def bytes(self, m: int, n: int, rank: int | None = None, *, leads: bool = True) -> int:
        """Bytes of a weight ``[m, n]``, or of its pair: codes, and scales in float16.

        Args:
            m: inputs.
            n: outputs.
            rank: of the pair; None for the weight itself.
            leads: whether the first factor counts.
        """
        if rank is not None:
            return (self.bytes(m, rank) if leads else 0) + self.bytes(rank, n)
        if m < SMALLEST:
            return 4 * m * n
        codes = -(-m * n * self.bits // 8)
        return codes + 2 * -(-m // suited(self.block, m)) * n


def suited(block: int, rows: int) -> int:
    """The block for so many rows: a power of two that they fill."""
    while block > max(rows, SMALLEST):
        block //= 2
    return block


def no_format(group: Group, model: ir.Model) -> str | None:
    """Why the weights of a group stay floats; None where they need not.

    Args:
        group: the group.
        model: its model.
    """
    slices, m, n = group.shape
    for member in group.members:
        site = member.site
        if site.form.name not in _PRODUCTS:
            return f"form {site.form.name} has no number format"
        if site.node.graph is not model.graph:
            return "it is inside a subgraph or function, where weights stay floats"
        if member.transposed:
            return "its weight is also read transposed"
    if slices > 1:
        return "a batch of weights has no number format"
    if group.matrix.dtype is not ir.DataType.FLOAT:
        return f"its weight is read as {group.matrix.dtype.name.lower()}; formats are for float32"
    if group.others:
        return f"{group.matrix.name} is also read by {group.others[0]}: the floats would stay"
    if m < SMALLEST:
        return f"{m}×{n} is narrower than a block of {SMALLEST}"
    return None


class FormatWriter:
    """Puts integers in place of constants of one model's main graph."""

    def __init__(self, model: ir.Model, spool: Spool) -> None:
        self._model, self._spool = model, spool
        self._storage = Storage(model, Names(model), spool)
        self._constants = Constants(model)

    def weight(self, node: ir.Node) -> Constant:
        """The matrix that a product multiplies with, in × out."""
        found = self._constants.resolve(node.inputs[1])
        assert isinstance(found, Constant)
        transposed = "transB" in node.attributes and node.attributes["transB"].as_int()
        return found.transpose(1, 0) if transposed else found

    def put(self, nodes: Sequence[ir.Node], matrix: Blocks | Array) -> None:
        """Let products read codes, or another matrix of floats, in × out.

        Args:
            nodes: products that read the same constant now.
            matrix: stored once for all of them; what nobody reads any more is removed.
        """
        root = self.weight(nodes[0]).root
        base, in_node = node_name(nodes[0]), root.producer() is not None
        if isinstance(matrix, Blocks):
            value = self._dequantized(matrix, f"{base}.q{matrix.bits}", in_node=in_node)
        else:
            name = f"{base}.lowrank_B"
            value = self._storage.store(self._model.graph, matrix, name, in_node=in_node)
        for node in nodes:
            node.replace_input_with(1, value)
            node.attributes.pop("transB", None)
        remove_unread(root)

    def _dequantized(self, codes: Blocks, base: str, *, in_node: bool) -> ir.Value:
        graph, storage = self._model.graph, self._storage
        integers = codes.codes.astype(_KINDS[codes.bits, codes.zeros is None])
        q = storage.store(graph, integers, f"{base}.codes", in_node=in_node)
        scales = storage.store(graph, codes.scales, f"{base}.scales", in_node=in_node)
        if codes.scales.dtype != np.float32:
            name = storage.new_name(f"{base}.scales_cast")
            to = [ir.AttrInt64("to", int(ir.DataType.FLOAT))]
            like = TypedShape(ir.DataType.FLOAT, codes.scales.shape)
            scales = storage.derive(graph, "Cast", [scales], to, name, like)
        attributes = [ir.AttrInt64("axis", 0), ir.AttrInt64("block_size", codes.block)]
        name = storage.new_name(f"{base}.values")
        like = TypedShape(ir.DataType.FLOAT, codes.shape)
        return storage.derive(graph, "DequantizeLinear", [q, scales], attributes, name, like)
