"""com.microsoft.FusedMatMul with a constant operand, as ONNX Runtime's optimizer writes it.

Right:  ``α·X'·W'  ->  α·(X' @ A)·B``        with ``W' ≈ A·B``
Left:   ``α·W'·X'  ->  α·Bᵀ·(Aᵀ @ X')``      with ``W'ᵀ ≈ A·B``

``X'`` and ``W'`` are X and W as transA and transB say.  The first map takes the transposition of X
(a FusedMatMul again where it is set, else a plain MatMul), the node keeps α and that of W.
transBatchA and transBatchB reorder batch axes and are left alone.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import ClassVar

import onnx_ir as ir

from onnx_lowrank.graph.constant import Constant
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.graph.walk import attribute
from onnx_lowrank.maps.emit import Emitter, Factor, Pair
from onnx_lowrank.maps.forms.base import (
    Form,
    Refusal,
    Site,
)
from onnx_lowrank.maps.forms.product import (
    by_slice,
    constant_operand,
    hidden_shape,
    stack,
)
from onnx_lowrank.numerics.arrays import Array

__all__ = ["FusedMatMulLeft", "FusedMatMulRight"]

_TRANSPOSED = ("transA", "transB")


class _FusedMatMul(Form):
    """A FusedMatMul; ``side`` is the index of its constant."""

    ops = "fused-matmul"
    side: ClassVar[int]

    def match(self, node: ir.Node, constants: Constants) -> Site | Refusal | None:
        """A FusedMatMul with a constant operand on this side (on the right if on both)."""
        operand = constant_operand(node, self.side, constants)
        if not isinstance(operand, Constant):
            return operand
        if attribute(node, "transBatchA", 0) or attribute(node, "transBatchB", 0):
            return Refusal.because(operand, "transBatchA or transBatchB is set")
        turned = bool(attribute(node, _TRANSPOSED[self.side], 0))
        matrix = stack(operand, transposed=turned != (self.side == 0))
        return self.site(node, self.side, operand, matrix)

    def vectors(self, site: Site, array: Array) -> Array:
        """The rows of X', or its columns where W is on the left, by slice."""
        rows = array.swapaxes(-1, -2) if self._columns(site.node) else array
        return by_slice(rows, site.operand.shape[:-2])

    def reading(self, site: Site) -> Hashable:
        """The rows or columns, and how a batch of weights takes them."""
        kind = "columns" if self._columns(site.node) else "rows"
        return (kind, site.m, *site.operand.shape[:-2])

    def _columns(self, node: ir.Node) -> bool:
        """Whether the map multiplies the columns of X as it stands."""
        turned = bool(attribute(node, _TRANSPOSED[1 - self.side], 0))
        return turned != (self.side == 0)

    def rewrite(self, site: Site, pair: Pair, emit: Emitter) -> None:
        """``α·(X' @ A)·B``, or ``α·Bᵀ·(Aᵀ @ X')``."""
        node, side = site.node, self.side
        lead = site.operand.shape[:-2]
        left = side == 0
        first = _matrices(pair.first, lead, turn=left)
        turned = attribute(node, _TRANSPOSED[1 - side], 0)
        x = node.inputs[1 - side]
        factor = emit.factor(first)
        hidden = emit.node(
            "FusedMatMul" if turned else "MatMul",
            [factor, x] if left else [x, factor],
            shape=hidden_shape(node.outputs[0], -2 if left else -1, pair.rank, None),
            attributes=[ir.AttrInt64(_TRANSPOSED[1 - side], 1)] if turned else [],
            domain="com.microsoft" if turned else "",
        )
        stored = bool(attribute(node, _TRANSPOSED[side], 0))
        emit.replace(1 - side, hidden)
        emit.replace(side, emit.factor(_matrices(pair.second, lead, turn=stored != left)))
        emit.reset(_TRANSPOSED[1 - side])


def _matrices(factor: Factor, lead: tuple[int, ...], *, turn: bool) -> Factor:
    """A factor with the weight's leading axes, transposed where asked for."""
    if turn:
        factor = factor.transpose(0, 2, 1)
    return factor.reshape(*lead, *factor.shape[1:])


class FusedMatMulRight(_FusedMatMul):
    """``α·X'·W'``."""

    name = "fused-matmul-right"
    side = 1
    targets: ClassVar[frozenset[tuple[str, str]]] = frozenset({("com.microsoft", "FusedMatMul")})


class FusedMatMulLeft(_FusedMatMul):
    """``α·W'·X'``."""

    name = "fused-matmul-left"
    side = 0
    targets: ClassVar[frozenset[tuple[str, str]]] = frozenset({("com.microsoft", "FusedMatMul")})
