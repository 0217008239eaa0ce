"""Gather from a constant table, an embedding, off by default.

``Gather(E, i)  ->  Gather(A, i) @ B``        with ``E[V, D] ≈ A[V, r]·B[r, D]``

An output head that reads the same table, transposed, is a MatMul or Gemm of its own and shares the
factors: ``h @ Eᵀ = (h @ Bᵀ) @ Aᵀ``.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import ClassVar

import onnx_ir as ir

from onnx_lowrank.graph.constant import FLOATS, Constant
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.graph.walk import attribute
from onnx_lowrank.maps.emit import Emitter, Pair
from onnx_lowrank.maps.forms.base import (
    Cost,
    Dims,
    Form,
    Refusal,
    Site,
)
from onnx_lowrank.maps.forms.product import hidden_shape
from onnx_lowrank.numerics.arrays import Array

__all__ = ["Gather"]


class Gather(Form):
    """Rows of a constant table."""

    name = "gather"
    ops = "gather"
    default = False
    indices = True
    targets: ClassVar[frozenset[tuple[str, str]]] = frozenset({("", "Gather")})

    def match(self, node: ir.Node, constants: Constants) -> Site | Refusal | None:
        """A Gather of rows, by computed indices, from a constant matrix of floats."""
        table = constants.resolve(node.inputs[0])
        if not isinstance(table, Constant) or table.dtype not in FLOATS:
            return None  # indices into shapes and the like: nothing to say
        if len(table.shape) != 2 or attribute(node, "axis", 0) not in (0, -2):
            return None
        if constants.resolve(node.inputs[1]) is not None:
            return None
        return self.site(node, 0, table, table.reshape(1, *table.shape))

    def vectors(self, site: Site, array: Array) -> Array:  # noqa: ARG002
        """The row numbers."""
        return array.reshape(1, -1)

    def reading(self, site: Site) -> Hashable:
        """One-hot vectors of so many rows."""
        return ("indices", site.m)

    def rewrite(self, site: Site, pair: Pair, emit: Emitter) -> None:
        """``Gather(A, i) @ B``; the node becomes the MatMul."""
        node = site.node
        hidden = emit.node(
            "Gather",
            [emit.factor(pair.first.reshape(site.m, pair.rank)), node.inputs[1]],
            shape=hidden_shape(node.outputs[0], -1, pair.rank, None),
            attributes=[ir.AttrInt64("axis", 0)],
        )
        emit.become("MatMul", [hidden, emit.factor(pair.second.reshape(pair.rank, site.n))])

    def cost(self, site: Site, dims: Callable[[ir.Value], Dims | None]) -> Cost | None:
        """Reading rows costs nothing; the MatMul behind it does."""
        rows = self.rows(site, dims)
        return None if rows is None else Cost(0, 0, rows * site.n)
