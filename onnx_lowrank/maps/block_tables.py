"""Tables of embeddings in blocks as one node of ONNX Runtime each, outside the ONNX standard.

``Gather(E, i)``  ->  ``com.microsoft.GatherBlockQuantized(q, i, s)``
``x @ Eᵀ``        ->  ``com.microsoft.MatMulNBits(x, Reshape(q), Reshape(s))``

``q[V, D·bits/8]`` holds the codes of each row without a sign, of 4 bits two in a byte, and
``s[V, D/block]`` a scale for each block.  Both kernels want the same bytes in other shapes, so that
a head which is tied to the embeddings multiplies with the very integers that are gathered.  No
operator of ONNX itself is newer than opset 5.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence

import numpy as np
import onnx_ir as ir

from onnx_lowrank.graph.edits import become, node_before
from onnx_lowrank.graph.walk import attribute, float_attribute, operator
from onnx_lowrank.maps.emit import Storage
from onnx_lowrank.maps.forms import Site
from onnx_lowrank.maps.nbits import ACCURACY, DOMAIN, in_one_node
from onnx_lowrank.numerics.blocks import Blocks, pack4

__all__ = ["in_blocks", "tied_products", "write_blocks"]


def in_blocks(sites: Sequence[Site], graph: ir.Graph) -> bool:
    """Whether all that reads a table can be one of the two nodes.

    Args:
        sites: the Gathers of a table.
        graph: the main graph.
    """
    return tied_products(sites, graph) is not None


def tied_products(sites: Sequence[Site], graph: ir.Graph) -> tuple[ir.Node, ...] | None:
    """The products ``x @ Eᵀ`` that read a table beside its Gathers; None where others do.

    Args:
        sites: the Gathers.
        graph: the main graph.
    """
    root, gathers = sites[0].matrix.root, {site.node for site in sites}
    rows = root.shape.dims[0] if root.shape is not None else None
    found: dict[ir.Node, None] = {}
    for use in root.uses():
        node = use.node
        if node in gathers:
            if use.idx != 0 or attribute(node, "axis", 0) != 0:
                return None
        elif operator(node) == ("", "Transpose") and not node.outputs[0].is_graph_output():
            turned = "perm" not in node.attributes or tuple(node.attributes["perm"].as_ints()) == (
                1,
                0,
            )
            reads = list(node.outputs[0].uses())
            alone = all(operator(own.node) == ("", "MatMul") and own.idx == 1 for own in reads)
            if not turned or not alone:
                return None
            found |= dict.fromkeys(own.node for own in reads)
        elif operator(node) == ("", "Gemm") and use.idx == 1 and attribute(node, "transB", 0):
            if float_attribute(node, "beta", 1.0) != 1.0:
                return None
            found[node] = None
        else:
            return None
    producer = root.producer()
    plain = producer is None or producer.op_type == "Constant"
    if not plain or any(node.graph is not graph for node in found):
        return None
    if not isinstance(rows, int) or not in_one_node(list(found), rows):
        return None
    return tuple(found)


def write_blocks(
    sites: Sequence[Site],
    products: Sequence[ir.Node],
    codes: Blocks,
    storage: Storage,
    imports: MutableMapping[str, int],
) -> None:
    """Let Gathers and products read the same integers, in place.

    Args:
        sites: the Gathers of a table.
        products: `tied_products` of them.
        codes: of the table's transpose ``[D, V]``, of 4 or 8 bits; blocks divide D.
        storage: of the model.
        imports: opsets of the model.
    """
    table, bits, block = sites[0].matrix, codes.bits, codes.block
    graph, in_node = sites[0].node.graph, table.root.producer() is not None
    assert isinstance(graph, ir.Graph)
    width, rows = codes.shape
    plain = (codes.codes.T.astype(np.int16) + (1 << bits - 1)).astype(np.uint8)
    packed = np.ascontiguousarray(plain) if bits == 8 else pack4(plain).reshape(rows, -1)
    scales = np.ascontiguousarray(codes.scales.T, np.float32)
    q = storage.store(graph, packed, f"{table.name}.codes", in_node=in_node)
    s = storage.store(graph, scales, f"{table.name}.scales", in_node=in_node)
    imports.setdefault(DOMAIN, 1)
    for site in sites:
        numbers = {"bits": bits, "block_size": block, "gather_axis": 0, "quantize_axis": 1}
        own = [ir.AttrInt64(key, number) for key, number in numbers.items()]
        become(site.node, "GatherBlockQuantized", [q, site.node.inputs[1], s], own, DOMAIN)
    if not products:
        return
    order = {node: place for place, node in enumerate(graph)}
    first = min(products, key=lambda node: order[node])
    shapes = ([rows, width // block, block * bits // 8], [-1])
    read = []
    for value, shape in zip((q, s), shapes, strict=True):
        sizes = storage.store(
            graph, np.array(shape, np.int64), f"{value.name}.shape", in_node=False
        )
        made = node_before(first, "Reshape", [value, sizes], storage.new_name, dtype=value.dtype)
        read.append(made.outputs[0])
    numbers = {"K": width, "N": rows, "bits": bits, "block_size": block, "accuracy_level": ACCURACY}
    for node in products:
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        inputs = [node.inputs[0], *read, *([] if bias is None else [None, None, bias])]
        own = [ir.AttrInt64(key, number) for key, number in numbers.items()]
        become(node, "MatMulNBits", inputs, own, DOMAIN)
