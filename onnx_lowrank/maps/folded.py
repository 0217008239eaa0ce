"""Weights that are stored as integers and made floats once, when a runtime loads the model.

``Conv(x, W)``  ->  ``Conv(x, Reshape(Cast(q) · Cast(s)))``
``Conv(x, W)``  ->  ``Conv(x, Reshape((Cast(q) - Cast(z)) · Cast(s)))``  with zero points

So are LSTM, GRU, RNN, Einsum, ``W @ x``, and ``x @ W`` where several nodes read one W, which no
kernel of integers is made for.

All that leads to W is constant, so ONNX Runtime computes it while it loads and runs the node as it
was: the file is smaller, speed and memory in use are those of floats.  A DequantizeLinear in its
place would be computed in every run, and keeps convolutions from their fastest kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import onnx_ir as ir

from onnx_lowrank.graph.constant import Constant
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.graph.layout import Layout
from onnx_lowrank.maps.emit import Storage, TypedShape
from onnx_lowrank.maps.forms import Refusal, Site, all_forms
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.blocks import Blocks

__all__ = ["FOLDED", "PRODUCTS", "FoldedWriter", "folded_site", "is_product"]

FOLDED = frozenset(
    {"conv", "conv-spatial", "einsum", "gemm-left", "gru", "lstm", "matmul-left", "rnn"}
)
"""Names of the forms whose weights are stored so."""

PRODUCTS = frozenset({"matmul-right", "gemm-right"})
"""Forms whose weight may stand behind a DequantizeLinear that runtimes fuse with the product."""

# Of codes, by their bits and whether they have a sign.
_KINDS = {
    (4, True): ml_dtypes.int4,
    (4, False): ml_dtypes.uint4,
    (8, True): np.int8,
    (8, False): np.uint8,
}


def is_product(node: ir.Node, constants: Constants) -> bool:
    """Whether a node is ``x @ W`` or a Gemm with a constant on the right."""
    if node.op_type not in ("MatMul", "Gemm") or node.domain not in ("", "ai.onnx"):
        return False
    return isinstance(constants.resolve(node.inputs[1]), Constant)


def folded_site(node: ir.Node, constants: Constants) -> Site:
    """How a node of one of the forms, or a product, reads its constant."""
    forms = [form for form in all_forms() if form.name in FOLDED | PRODUCTS]
    matches = [form.match(node, constants) for form in forms if _looks_at(form.targets, node)]
    sites = (match.site if isinstance(match, Refusal) else match for match in matches)
    return next(site for site in sites if site is not None)


def _looks_at(targets: frozenset[tuple[str, str]], node: ir.Node) -> bool:
    return ("" if node.domain == "ai.onnx" else node.domain, node.op_type) in targets


@dataclass(eq=False)
class _Spread:
    """How numbers of blocks meet codes ``[n, m]``: of so many of m, one after the other.

    Attributes:
        n: outputs.
        m: inputs.
        block: of them that share a number.
        shapes: whole numbers that are stored for this already.
    """

    n: int
    m: int
    block: int
    shapes: dict[tuple[int, ...], ir.Value] = field(default_factory=dict)


class FoldedWriter:
    """Writes what stands for the weights of one model's main graph."""

    def __init__(self, graph: ir.Graph, storage: Storage) -> None:
        self._graph, self._storage = graph, storage

    def put(self, sites: Sequence[Site], matrix: Blocks | Array, base: str) -> ir.Value | None:
        """Let nodes read codes, or another matrix of floats.

        Args:
            sites: of nodes that read the same matrix now.
            matrix: in × out; stored once for all of them.
            base: how names begin.

        Returns:
            the scales of codes.
        """
        in_node = sites[0].operand.root.producer() is not None
        shape, scales = matrix.shape, None
        if isinstance(matrix, Blocks):
            value, read, scales = self._multiplied(matrix, base, in_node=in_node)
        else:  # as the first node reads it
            wanted = _wanted(sites[0], shape)
            stored = np.ascontiguousarray(wanted.apply(matrix))
            name = f"{base}.lowrank_B"
            value = self._storage.store(self._graph, stored, name, in_node=in_node)
            read = wanted.inverse()
        known: dict[object, ir.Value] = {}
        for site in sites:
            layout = read.then(_wanted(site, shape)).shortest()
            if layout.key not in known:
                known[layout.key] = self._read_so(value, layout, base, in_node=in_node)
            site.node.replace_input_with(site.index, known[layout.key])
        return scales

    def _multiplied(
        self, codes: Blocks, base: str, *, in_node: bool
    ) -> tuple[ir.Value, Layout, ir.Value]:
        """Codes by their scales, how that is read as the matrix, in × out, and the scales."""
        (m, n), block = codes.shape, codes.block
        integers = codes.codes.T.astype(_KINDS[codes.bits, codes.zeros is None])
        groups = -(-m // block)
        whole = groups > 1 and m % block == 0
        if whole:
            integers = integers.reshape(n, groups, block)
        name = f"{base}.q{codes.bits}"
        spread = _Spread(n, m, block)
        q, _ = self._floats(np.ascontiguousarray(integers), f"{name}.codes", in_node=in_node)
        if codes.zeros is not None:
            zeros = codes.zeros.T.astype(integers.dtype)
            z, _ = self._each(zeros, spread, f"{name}.zeros", in_node=in_node)
            q = self._derived("Sub", [q, z], f"{name}.centred", integers.shape)
        s, stored = self._each(codes.scales.T, spread, f"{name}.scales", in_node=in_node)
        shape = integers.shape
        value = self._derived("Mul", [q, s], f"{name}.values", shape)
        return value, Layout.of(shape).reshape(n, m).transpose(1, 0), stored

    def _each(
        self, array: Array, spread: _Spread, name: str, *, in_node: bool
    ) -> tuple[ir.Value, ir.Value]:
        """Numbers of blocks, shape [n, groups], so that they meet the codes; and as stored."""
        several = array.shape[1] > 1
        own = np.ascontiguousarray(array[:, :, None] if several else array)
        value, stored = self._floats(own, name, in_node=in_node)
        if several and spread.m % spread.block:
            value = self._stretched(value, spread, name, in_node=in_node)
        return value, stored

    def _stretched(self, value: ir.Value, spread: _Spread, name: str, *, in_node: bool) -> ir.Value:
        """A number for each of m elements, of blocks of which the last one is not full."""
        n, m, block = spread.n, spread.m, spread.block
        groups = -(-m // block)

        def numbers(*values: int) -> ir.Value:
            if values not in spread.shapes:
                array = np.array(values, np.int64)
                stored = self._storage.store(self._graph, array, f"{name}_shape", in_node=in_node)
                spread.shapes[values] = stored
            return spread.shapes[values]

        wide = (n, groups, block)
        value = self._derived("Expand", [value, numbers(*wide)], f"{name}_wide", wide)
        flat = (n, groups * block)
        value = self._derived("Reshape", [value, numbers(*flat)], f"{name}_flat", flat)
        inputs = [value, numbers(0), numbers(m), numbers(1)]
        return self._derived("Slice", inputs, f"{name}_each", (n, m))

    def _floats(self, array: Array, name: str, *, in_node: bool) -> tuple[ir.Value, ir.Value]:
        """A constant as float32, and as it is stored."""
        value = self._storage.store(self._graph, array, name, in_node=in_node)
        if array.dtype == np.float32:
            return value, value
        to = [ir.AttrInt64("to", int(ir.DataType.FLOAT))]
        return self._derived("Cast", [value], f"{name}_cast", array.shape, to), value

    def _read_so(self, value: ir.Value, layout: Layout, base: str, *, in_node: bool) -> ir.Value:
        """A value through the transposes and reshapes of a layout."""
        shape = layout.base
        for step in layout.steps:
            if step.kind == "transpose":
                shape = tuple(shape[axis] for axis in step.argument)
                perm = [ir.AttrInt64s("perm", step.argument)]
                value = self._derived("Transpose", [value], f"{base}.turned", shape, perm)
            else:
                shape = step.argument
                array = np.array(shape, np.int64)
                wanted = self._storage.store(self._graph, array, f"{base}.shape", in_node=in_node)
                value = self._derived("Reshape", [value, wanted], f"{base}.shaped", shape)
        return value

    def _derived(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        name: str,
        shape: Sequence[int],
        attributes: Sequence[ir.Attr] = (),
    ) -> ir.Value:
        like = TypedShape(ir.DataType.FLOAT, tuple(shape))
        name = self._storage.new_name(name)
        return self._storage.derive(self._graph, op_type, inputs, attributes, name, like)


def _wanted(site: Site, shape: tuple[int, ...]) -> Layout:
    """From the matrix, in × out, to the constant as the site's node reads it."""
    # The second map of a spatial pair, ``B[r, kw·N]``, is read as ``[r·kw, N]``.
    stack = Layout.of(shape).reshape(*site.matrix.shape)
    return stack.then(site.matrix.layout.inverse()).then(site.operand.layout)
