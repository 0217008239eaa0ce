"""Products with weights in blocks as one node of ONNX Runtime, outside the ONNX standard.

``X @ W``         ->  ``com.microsoft.MatMulNBits(X, q, s)``
``Gemm(X, W, c)`` ->  the same, with ``c`` as its bias

``q`` holds the codes of each column in whole blocks, without a sign, and ``s`` a scale for each
block.  It is what ONNX Runtime makes of a DequantizeLinear before the product by itself, so results
and speed are the same, and the model keeps its opset.  Scales have the type of X, float32, where a
DequantizeLinear can have float16 behind a Cast: a Cast here gives wrong results where ONNX Runtime
does not fold it (1.32, optimizations off).
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_lowrank.graph.edits import become
from onnx_lowrank.maps.dynamic import rounds_inputs
from onnx_lowrank.maps.emit import Storage
from onnx_lowrank.numerics.blocks import Blocks, pack4

__all__ = ["ACCURACY", "DOMAIN", "NBitsWriter", "in_one_node", "kernel_block"]

DOMAIN = "com.microsoft"
"""Of the operators that ONNX Runtime adds."""
ACCURACY = 4
"""Inputs are rounded to 8 bits for each block, as where ONNX Runtime makes the node itself."""
_SMALLEST = 16


def in_one_node(nodes: Sequence[ir.Node], n: int) -> bool:
    """Whether products can be written so: a Gemm must add one number for each column or nothing.

    Args:
        nodes: the products.
        n: columns of their weight.
    """
    added = (node.inputs[2] for node in nodes if len(node.inputs) > 2)
    return rounds_inputs(nodes) and all(
        value is None or (value.shape is not None and value.shape.dims == (n,)) for value in added
    )


def kernel_block(codes: Blocks) -> int:
    """The block that the node names: a power of two from 16; one alone may have fewer rows."""
    return 1 << (max(codes.block, _SMALLEST) - 1).bit_length()


class NBitsWriter:
    """Writes such products into one model's main graph."""

    def __init__(
        self, graph: ir.Graph, storage: Storage, imports: MutableMapping[str, int]
    ) -> None:
        self._graph, self._storage, self._imports = graph, storage, imports

    def write(self, nodes: Sequence[ir.Node], codes: Blocks, base: str, *, in_node: bool) -> None:
        """Let MatMul or Gemm nodes multiply with codes; each keeps its name and its output.

        Args:
            nodes: products that read one weight, for which `in_one_node` holds.
            codes: of the weight, in × out, of 4 or 8 bits.
            base: how names begin.
            in_node: whether codes are kept in Constant nodes.
        """
        (m, n), bits, block = codes.shape, codes.bits, kernel_block(codes)
        name = f"{base}.q{bits}"
        groups = len(codes.scales)
        q = self._stored(_whole(codes).reshape(n, groups, -1), f"{name}.codes", in_node=in_node)
        scales = np.ascontiguousarray(codes.scales.T, np.float32).reshape(-1)
        s = self._stored(scales, f"{name}.scales", in_node=in_node)
        z = None
        if codes.zeros is not None:
            zeros = codes.zeros.T
            zeros = _packed(zeros, 0) if bits == 4 else np.ascontiguousarray(zeros)
            z = self._stored(zeros.reshape(-1), f"{name}.zeros", in_node=in_node)
        numbers = {
            **{"K": m, "N": n, "bits": bits},
            **{"block_size": block, "accuracy_level": ACCURACY},
        }
        self._imports.setdefault(DOMAIN, 1)
        for node in nodes:
            bias = node.inputs[2] if len(node.inputs) > 2 else None
            inputs = [node.inputs[0], q, s, *([z] if z is not None else [])]
            if bias is not None:
                inputs = [*inputs, *[None] * (5 - len(inputs)), bias]
            attributes = [ir.AttrInt64(key, own) for key, own in numbers.items()]
            become(node, "MatMulNBits", inputs, attributes, DOMAIN)

    def _stored(self, array: npt.NDArray[np.generic], name: str, *, in_node: bool) -> ir.Value:
        return self._storage.store(self._graph, array, name, in_node=in_node)


def _whole(codes: Blocks) -> npt.NDArray[np.uint8]:
    """Codes without a sign of each column, in whole blocks; those behind the last one are 0."""
    (m, n), bits = codes.shape, codes.bits
    middle = 0 if codes.zeros is not None else 1 << bits - 1
    rows = len(codes.scales) * kernel_block(codes)
    # What is behind the last row is multiplied with nothing.
    found = np.full((n, rows), middle, np.uint8)
    found[:, :m] = (codes.codes.T.astype(np.int16) + middle).astype(np.uint8)
    return _packed(found, middle) if bits == 4 else found


def _packed(rows: npt.NDArray[np.uint8], fill: int) -> npt.NDArray[np.uint8]:
    """Two codes of 4 bits in each byte, the first one in its low half; each row by itself."""
    if rows.shape[1] % 2:
        rows = np.pad(rows, ((0, 0), (0, 1)), constant_values=fill)
    return pack4(rows).reshape(len(rows), -1)
