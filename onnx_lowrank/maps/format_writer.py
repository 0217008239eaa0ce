"""Writing integers in place of the weights of a model.

Which nodes stand for a weight in each format is said by `onnx_lowrank.maps.formats`; what is no
plain DequantizeLinear before a product has a writer of its own, in the modules beside this one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir

from onnx_lowrank.graph.constant import Constant
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.graph.edits import become, node_before
from onnx_lowrank.graph.names import Names
from onnx_lowrank.graph.spool import Spool
from onnx_lowrank.graph.walk import node_name
from onnx_lowrank.maps.dynamic import DynamicWriter
from onnx_lowrank.maps.emit import Storage, TypedShape
from onnx_lowrank.maps.folded import FoldedWriter, folded_site, is_product
from onnx_lowrank.maps.formats import CORRECTION, Format
from onnx_lowrank.maps.nbits import NBitsWriter
from onnx_lowrank.maps.rewrite import remove_unread
from onnx_lowrank.maps.static import ByteStep, StaticWriter
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.blocks import Blocks

__all__ = ["Correction", "FormatWriter"]

_KINDS = {(4, True): ml_dtypes.int4, (4, False): ml_dtypes.uint4, (8, True): np.int8}


@dataclass(frozen=True, eq=False)
class Correction:
    """Nodes that correct the rounding of one weight.

    Attributes:
        inner: those that multiply with A, one for each product with the weight.
        outer: those that multiply with B.
        products: the products themselves.
        sums: what adds both; these have the names of the products that were.
        form: of A and B where they are integers.
    """

    inner: tuple[ir.Node, ...]
    outer: tuple[ir.Node, ...]
    products: tuple[ir.Node, ...]
    sums: tuple[ir.Node, ...]
    form: Format

    @property
    def beside(self) -> tuple[ir.Node, ...]:
        """The products and the sums."""
        return (*self.products, *self.sums)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of A and B, where they are floats."""
        values = (nodes[0].inputs[1] for nodes in (self.inner, self.outer))
        return tuple(value.name or "" for value in values if value is not None)


class FormatWriter:
    """Puts integers in place of constants of one model's main graph."""

    def __init__(self, model: ir.Model, spool: Spool) -> None:
        self._model, self._spool = model, spool
        self._storage = Storage(model, Names(model), spool)
        # That default values of inputs count as constants was decided with the layers.
        self._constants = Constants(model, force_inputs=True)
        self._products = DynamicWriter(model.graph, self._storage)
        self._folded = FoldedWriter(model.graph, self._storage)
        self._static = StaticWriter(model.graph, self._storage)
        self._nbits = NBitsWriter(model.graph, self._storage, model.opset_imports)

    def weight(self, node: ir.Node) -> Constant:
        """The matrix that a node multiplies with, in × out."""
        if not is_product(node, self._constants):
            matrix = folded_site(node, self._constants).matrix
            return matrix.reshape(*matrix.shape[1:])
        found = self._constants.resolve(node.inputs[1])
        assert isinstance(found, Constant)
        transposed = "transB" in node.attributes and node.attributes["transB"].as_int()
        return found.transpose(1, 0) if transposed else found

    def head(self, node: ir.Node) -> ir.Node:
        """The first map of the pair whose second one a node is."""
        product = is_product(node, self._constants)
        activation = 0 if product else 1 - folded_site(node, self._constants).index
        value = node.inputs[activation]
        producer = None if value is None else value.producer()
        assert producer is not None
        return producer

    def put(
        self, nodes: Sequence[ir.Node], matrix: Blocks | Array, form: Format | None = None
    ) -> ir.Value | None:
        """Let products read codes, or another matrix of floats, in × out.

        Args:
            nodes: those that read the same constant now, all products or none of them.
            matrix: stored once for all of them; what nobody reads any more is removed.
            form: of the codes, which decides whether the inputs are rounded too; where their
                ranges are known before, `surround` does that.

        Returns:
            the scales of codes, where what the products give is a smooth function of them.
        """
        root = self.weight(nodes[0]).root
        base, in_node = node_name(nodes[0]), root.producer() is not None
        nodes = list(dict.fromkeys(nodes))
        integers = form is not None and form.integers
        shared = isinstance(matrix, Blocks) and len(nodes) > 1 and not integers
        if shared or not is_product(nodes[0], self._constants):
            sites = [folded_site(node, self._constants) for node in nodes]
            scales = self._folded.put(sites, matrix, base)
            remove_unread(root)
            return scales
        if isinstance(matrix, Blocks) and form is not None and form.dynamic:
            self._products.write(nodes, matrix, signed=form.signed, in_node=in_node)
            remove_unread(root)
            return None
        if isinstance(matrix, Blocks) and form is not None and form.fused:
            self._nbits.write(nodes, matrix, base, in_node=in_node)
            remove_unread(root)
            return None
        scales = None
        if isinstance(matrix, Blocks) and form is not None and form.static:
            value = self._columns(matrix, form, base, in_node=in_node)
        elif isinstance(matrix, Blocks):
            value, scales = self._dequantized(matrix, f"{base}.q{matrix.bits}", in_node=in_node)
        else:
            name = f"{base}.lowrank_B"
            value = self._storage.store(self._model.graph, matrix, name, in_node=in_node)
        self._read(nodes, value)
        remove_unread(root)
        return scales

    def open(self, nodes: Sequence[ir.Node], codes: Blocks) -> ir.Value:
        """Let products read what codes stand for, as a smooth function of their scales.

        ``x @ ((q - z) · Gather(s, block of each row))`` of floats, which every opset has and a
        derivative goes through.

        Args:
            nodes: MatMul or Gemm nodes that read the same constant now.
            codes: of it.

        Returns:
            the scales.
        """
        root, base, m = self.weight(nodes[0]).root, node_name(nodes[0]), codes.shape[0]
        rows = np.arange(m) // codes.block
        exact = codes.codes.astype(np.float32)
        if codes.zeros is not None:
            exact -= codes.zeros[rows].astype(np.float32)
        arrays: dict[str, Array] = {"integers": exact, "rows": rows}
        arrays["scales"] = codes.scales.astype(np.float32)
        q, places, scales = (
            self._storage.store(self._model.graph, array, f"{base}.open.{name}", in_node=False)
            for name, array in arrays.items()
        )
        each = self._before(nodes[0], "Gather", [scales, places], "each")
        value = self._before(nodes[0], "Mul", [q, each], "values")
        each.shape = value.shape = ir.Shape(codes.shape)
        self._read(nodes, value)
        remove_unread(root)
        return scales

    def close(self, nodes: Sequence[ir.Node], codes: Blocks) -> None:
        """Let products that `open` has changed read what codes stand for, as a constant."""
        made = nodes[0].inputs[1]
        name = f"{node_name(nodes[0])}.lowrank_B"
        value = self._storage.store(self._model.graph, codes.values(), name, in_node=False)
        self._read(nodes, value)
        waiting = [made]
        for one in waiting:  # what stood there before, from its end
            producer = None if one is None else one.producer()
            if producer is not None and producer.op_type != "Constant":
                waiting += producer.inputs
                self._model.graph.remove(producer, safe=True)
            elif one is not None:
                remove_unread(one)

    def _read(self, nodes: Sequence[ir.Node], value: ir.Value) -> None:
        """Let products read another matrix, in × out."""
        for node in nodes:
            node.replace_input_with(1, value)
            node.attributes.pop("transB", None)

    def surround(self, nodes: Sequence[ir.Node], steps: Mapping[str, ByteStep]) -> None:
        """Round what products read and give, with ranges that are known before.

        Args:
            nodes: MatMul or Gemm nodes.
            steps: of all that they read and give, by name.
        """
        self._static.surround(nodes, steps)

    def split(self, nodes: Sequence[ir.Node], first: Array, second: Array) -> list[ir.Node]:
        """Let MatMul or Gemm nodes multiply with B, and new ones before them with A.

        Args:
            nodes: products that read the same constant now.
            first: A, in × rank; stored once for all of them.
            second: B.

        Returns:
            the new nodes.
        """
        base = node_name(nodes[0])
        a = self._stored(first, f"{base}.first")
        heads = []
        for node in nodes:
            inner = self._before(node, "MatMul", [node.inputs[0], a], "first")
            node.replace_input_with(0, inner)
            heads.append(inner.producer())
        self.put(nodes, second)
        return [head for head in heads if head is not None]

    def correct(
        self,
        nodes: Sequence[ir.Node],
        first: Blocks | Array,
        second: Blocks | Array,
        form: Format = CORRECTION,
    ) -> Correction:
        """Add ``(x @ A) @ B`` to what products give; each becomes the sum, with its name.

        Args:
            nodes: products that read the same weight.
            first: A, stored once for all of them, as codes or floats.
            second: B.
            form: of the codes.
        """
        base = node_name(nodes[0])
        a = self._stored(first, f"{base}.correction_A", form)
        b = self._stored(second, f"{base}.correction_B", form)
        made: list[tuple[ir.Node, ...]] = []
        for node in nodes:
            product = self._before(
                node, node.op_type, node.inputs, "quantized", node.attributes.values()
            )
            inner = self._before(node, "MatMul", [node.inputs[0], a], "correction_1")
            outer = self._before(node, "MatMul", [inner, b], "correction_2")
            product.type, product.shape = node.outputs[0].type, node.outputs[0].shape
            become(node, "Add", (product, outer))
            known = (value.producer() for value in (inner, outer, product))
            made.append((*(one for one in known if one is not None), node))
        inners, outers, products, sums = zip(*made, strict=True)
        for own, part in ((inners, first), (outers, second)):
            if isinstance(part, Blocks) and form.fused:
                self._nbits.write(own, part, node_name(own[0]), in_node=False)
        return Correction(inners, outers, products, sums, form)

    def _stored(
        self, matrix: Blocks | Array, name: str, form: Format | None = None
    ) -> ir.Value | None:
        """A matrix as an input of products; None where it becomes a part of their nodes."""
        if not isinstance(matrix, Blocks):
            return self._storage.store(self._model.graph, matrix, name, in_node=False)
        if form is not None and form.fused:
            return None
        return self._dequantized(matrix, name, in_node=False)[0]

    def _before(
        self,
        node: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        suffix: str,
        attributes: Iterable[ir.Attr] = (),
    ) -> ir.Value:
        """The output of a new node before another one."""
        own, kind = list(attributes), ir.DataType.FLOAT
        new_name = self._storage.new_name
        new = node_before(node, op_type, inputs, new_name, suffix, attributes=own, dtype=kind)
        return new.outputs[0]

    def _columns(self, codes: Blocks, form: Format, base: str, *, in_node: bool) -> ir.Value:
        """What signed integers with a scale for each whole column, or one for all, stand for."""
        graph, storage = self._model.graph, self._storage
        q = storage.store(graph, codes.codes.astype(np.int8), f"{base}.q8", in_node=in_node)
        scales = codes.scales.reshape(-1).astype(np.float32)
        own = scales if form.channels else scales[:1].reshape(())
        s = storage.store(graph, own, f"{base}.scales", in_node=in_node)
        attributes = [ir.AttrInt64("axis", 1)] if form.channels else []
        like = TypedShape(ir.DataType.FLOAT, codes.shape)
        name = storage.new_name(f"{base}.q8.values")
        return storage.derive(graph, "DequantizeLinear", [q, s], attributes, name, like)

    def _dequantized(self, codes: Blocks, base: str, *, in_node: bool) -> tuple[ir.Value, ir.Value]:
        """What blocks stand for, and their scales as they are stored."""
        graph, storage = self._model.graph, self._storage
        integers = codes.codes.astype(_KINDS[codes.bits, codes.zeros is None])
        q = storage.store(graph, integers, f"{base}.codes", in_node=in_node)
        stored = scales = storage.store(graph, codes.scales, f"{base}.scales", in_node=in_node)
        if codes.scales.dtype != np.float32:
            name = storage.new_name(f"{base}.scales_cast")
            to = [ir.AttrInt64("to", int(ir.DataType.FLOAT))]
            like = TypedShape(ir.DataType.FLOAT, codes.scales.shape)
            scales = storage.derive(graph, "Cast", [scales], to, name, like)
        inputs = [q, scales]
        if codes.zeros is not None:
            zeros = codes.zeros.astype(integers.dtype)
            inputs.append(storage.store(graph, zeros, f"{base}.zeros", in_node=in_node))
        attributes = [ir.AttrInt64("axis", 0), ir.AttrInt64("block_size", codes.block)]
        name = storage.new_name(f"{base}.values")
        like = TypedShape(ir.DataType.FLOAT, codes.shape)
        return storage.derive(graph, "DequantizeLinear", inputs, attributes, name, like), stored
