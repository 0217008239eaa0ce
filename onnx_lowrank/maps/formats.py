"""In which numbers the weights of a linear map are stored, and writing them down.

``x @ W``  ->  ``x @ DequantizeLinear(q, s)``  with blocks along the axis that is summed over
``x @ W``  ->  ``x @ DequantizeLinear(q, s, z)``  of 4 bits, where the least and the largest weight
of a block are seldom as far from 0
``x @ W``  ->  ``x @ DequantizeLinear(q, s) + (x @ A) @ B``  with a pair that corrects the rounding

That is what ONNX Runtime makes MatMulNBits of, by itself; it needs opset 21.  That node itself is
written by `onnx_lowrank.maps.nbits`.  Products whose inputs are integers too are in
`onnx_lowrank.maps.dynamic` and `onnx_lowrank.maps.static`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir

from onnx_lowrank.graph.constant import Constant
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.graph.names import Names
from onnx_lowrank.graph.spool import Spool
from onnx_lowrank.graph.walk import attribute, float_attribute, node_name
from onnx_lowrank.maps.dynamic import DynamicWriter
from onnx_lowrank.maps.emit import Storage, TypedShape
from onnx_lowrank.maps.find import Group
from onnx_lowrank.maps.folded import FOLDED, PRODUCTS, FoldedWriter, folded_site, is_product
from onnx_lowrank.maps.nbits import NBitsWriter, in_one_node, kernel_block
from onnx_lowrank.maps.rewrite import remove_unread
from onnx_lowrank.maps.static import ByteStep, StaticWriter
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.blocks import Bits, Blocks

__all__ = [
    "CORRECTION",
    "OPSET",
    "SMALLEST",
    "Activations",
    "Correction",
    "Format",
    "FormatWriter",
    "Variant",
    "correctable",
    "first_opset",
    "folded",
    "fusable",
    "no_format",
    "products",
    "suited",
]

OPSET = 21
"""The first one whose DequantizeLinear knows blocks and 4 bits."""

# Of products by what they multiply with, and of tables by their bits.
_OPSETS = {"float": OPSET, "dynamic": 11, "static": 13}
_TABLE_OPSETS = {8: 11, 6: 18, 4: 18}
# Of weights that are cast and multiplied, by their bits.
_FOLDED_OPSETS = {8: 11, 4: OPSET}

SMALLEST = 16
"""The smallest block of the kernels that multiply with one."""
Activations = Literal["float", "dynamic", "static"]
# Bytes of the nodes and names that make floats of integers.
_FOLDING = 1000
_KINDS = {(4, True): ml_dtypes.int4, (4, False): ml_dtypes.uint4, (8, True): np.int8}


@dataclass(frozen=True)
class Format:
    """Integers in blocks.

    Attributes:
        bits: of a weight.
        block: weights of a column that share a scale; of a table the elements of a row that do.  0
            of a whole column.
        correction: rank of the pair that corrects the rounding, in 8 bits itself; 0 without.
        table: whether the weight is a table of rows that are gathered.
        activations: what the weight is multiplied with: floats, or integers of 8 bits whose range
            is found in every run ("dynamic"), or on samples before ("static").
        signed: whether the integers of a whole column are stored with a sign.
        channels: whether each whole column has a scale, or all of them one.
        fused: whether a product with blocks is one node, MatMulNBits of ONNX Runtime.
        zeros: whether each block has a zero point too.
    """

    bits: Bits
    block: int
    correction: int = 0
    table: bool = False
    activations: Activations = "float"
    signed: bool = True
    channels: bool = True
    fused: bool = False
    zeros: bool = False

    def __str__(self) -> str:
        if self.table and self.bits == 8:
            return "8 bits, a scale for each row"
        if not self.block and not self.integers:
            return f"{self.bits} bits, a scale for each output"
        if self.dynamic:
            text = f"{self.bits} bits per channel, inputs in 8 bits"
            return text if self.signed else f"{text}, unsigned"
        if self.static:
            each = "per channel" if self.channels else "with one scale"
            return f"{self.bits} bits {each}, inputs and results in 8 bits"
        text = f"{self.bits} bits, blocks of {self.block}"
        text = f"{text}, + rank {self.correction}" if self.correction else text
        return f"{text}, MatMulNBits" if self.fused else text

    @property
    def dynamic(self) -> bool:
        """Whether inputs are rounded to integers in every run."""
        return self.activations == "dynamic"

    @property
    def static(self) -> bool:
        """Whether inputs and results are rounded to integers of ranges that are known before."""
        return self.activations == "static"

    @property
    def integers(self) -> bool:
        """Whether products multiply integers: their inputs are rounded too."""
        return self.activations != "float"

    @property
    def opset(self) -> int:
        """The first opset that has its operators, those of products with a weight."""
        if self.table:
            return _TABLE_OPSETS[self.bits]
        return 1 if self.fused else _OPSETS[self.activations]

    def rows(self, m: int) -> int:
        """How many of m weights of a column share a scale."""
        return suited(self.block, m) if self.block else m

    def bytes(self, m: int, n: int, rank: int | None = None, *, leads: bool = True) -> int:
        """Bytes of a weight ``[m, n]``, or of its pair: codes, scales in float16, zero points.

        Args:
            m: inputs, or rows of a table.
            n: outputs, or elements of a row.
            rank: of the pair; None for the weight itself.
            leads: whether the first factor counts.
        """
        if self.table:
            return m * (n * self.bits // 8 + 2 * -(-n // self.block))
        if rank is not None:
            return (self.bytes(m, rank) if leads else 0) + self.bytes(rank, n)
        if m < SMALLEST and (self.block or self.integers):
            return 4 * m * n
        if not self.block:
            return m * n + (4 if self.integers else 2) * (n if self.channels else 1)
        size = self._coded(m, n, self.bits, suited(self.block, m))
        if self.zeros:
            size += self._zeros(-(-m // suited(self.block, m)), n)
        if self.correction:
            a, b = CORRECTION, suited(CORRECTION.block, self.correction)
            size += self._coded(m, self.correction, a.bits, suited(a.block, m))
            size += self._coded(self.correction, n, a.bits, b)
        return size

    def stored(self, codes: Blocks) -> int:
        """Bytes of codes as they are written, with their scales and zero points."""
        if not self.fused:
            return codes.nbytes
        zeros = 0 if codes.zeros is None else self._zeros(*codes.scales.shape)
        return self._coded(*codes.shape, codes.bits, kernel_block(codes)) + zeros

    @property
    def corrected_by(self) -> Format:
        """The format of the pair that corrects the rounding."""
        return replace(CORRECTION, fused=self.fused)

    def _zeros(self, groups: int, n: int) -> int:
        if self.fused:  # whole bytes for each column
            return n * -(-groups * self.bits // 8)
        return -(-groups * n * self.bits // 8)

    def _coded(self, m: int, n: int, bits: int, block: int) -> int:
        if self.fused:  # whole blocks, and scales in float32
            groups = -(-m // block)
            return groups * n * (block * bits // 8 + 4)
        return -(-m * n * bits // 8) + 2 * -(-m // block) * n


CORRECTION = Format(bits=8, block=128)
"""Of the pair that corrects a rounding."""


@dataclass(frozen=True)
class Variant:
    """What a layer may become.

    Attributes:
        rank: of its pair; None leaves it dense.
        format: in which integers its weights are stored; None leaves them floats.
    """

    rank: int | None = None
    format: Format | None = None


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
        if site.form.name not in PRODUCTS | FOLDED:
            return f"form {site.form.name} has no number format"
        if (site.form.name in PRODUCTS) != products(group):
            return "one weight is read by nodes that multiply with integers and by others"
        if site.node.graph is not model.graph:
            return "it is inside a subgraph or function, where weights stay floats"
        if member.transposed:
            return "its weight is also read transposed"
    if group.head is not None:
        return "it is the second map of a pair"
    if slices > 1:
        return "a batch of weights has no number format"
    if group.matrix.dtype is not ir.DataType.FLOAT:
        return f"its weight is read as {group.matrix.dtype.name.lower()}; formats are for float32"
    if group.others:
        return f"{group.matrix.name} is also read by {group.others[0]}: the floats would stay"
    if m < SMALLEST and products(group):
        return f"{m}×{n} is narrower than a block of {SMALLEST}"
    least = Format(8, 0 if m < SMALLEST else 128)
    if not products(group) and 4 * m * n <= least.bytes(m, n) + _FOLDING:
        return f"{m}×{n} is so small that integers save nothing"
    return None


def products(group: Group) -> bool:
    """Whether the nodes of a group are ``x @ W`` or a Gemm, which kernels of integers are for."""
    return group.members[0].site.form.name in PRODUCTS


def folded(group: Group) -> bool:
    """Whether a runtime makes floats of a group's blocks once, so that its speed is theirs.

    ONNX Runtime fuses a DequantizeLinear with a product only where nothing else reads it.
    """
    return not products(group) or len({member.site.node for member in group.members}) > 1


def first_opset(group: Group, form: Format) -> int:
    """The first opset that has the operators which a format of a group is written with."""
    if form.table or form.integers or not folded(group):
        return form.opset
    return _FOLDED_OPSETS[form.bits]


def correctable(group: Group) -> bool:
    """Whether ``(x·A)·B`` can be added to what the nodes of a group compute."""
    if folded(group):
        return False
    nodes = [member.site.node for member in group.members]
    plain = (
        attribute(n, "transA", 0) == 0 and float_attribute(n, "alpha", 1.0) == 1.0 for n in nodes
    )
    return all(plain)


def fusable(group: Group) -> bool:
    """Whether the nodes of a group can be one node each with their codes, MatMulNBits."""
    nodes = [member.site.node for member in group.members]
    return not folded(group) and in_one_node(nodes, group.shape[2])


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
        self._constants = Constants(model)
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
        for node in nodes:
            node.replace_input_with(1, value)
            node.attributes.pop("transB", None)
        remove_unread(root)
        return scales

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
            node.op_type = "Add"
            node.attributes.clear()
            node.resize_inputs(2)
            for index, value in enumerate((product, outer)):
                node.replace_input_with(index, value)
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
        name = self._storage.new_name(f"{node_name(node)}.{suffix}")
        metadata = dict(node.metadata_props)
        new = ir.Node(
            "", op_type, list(inputs), list(attributes), name=name, metadata_props=metadata
        )
        value = new.outputs[0]
        value.name, value.dtype = self._storage.new_name(f"{name}_out"), ir.DataType.FLOAT
        assert node.graph is not None
        node.graph.insert_before(node, new)
        return value

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
