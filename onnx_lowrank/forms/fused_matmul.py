"""com.microsoft.FusedMatMul with a constant operand, as ONNX Runtime's optimizer writes it.

Right:  ``α·X'·W'  ->  α·(X' @ A)·B``        with ``W' ≈ A·B``
Left:   ``α·W'·X'  ->  α·Bᵀ·(Aᵀ @ X')``      with ``W'ᵀ ≈ A·B``

``X'`` and ``W'`` are X and W as transA and transB say.  The first map takes the transposition of X
(a FusedMatMul again where it is set, else a plain MatMul), the node keeps α and that of W.
transBatchA and transBatchB reorder batch axes and are left alone.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, ClassVar

import onnx_ir as ir

from onnx_lowrank.constants import Constants, Unusable
from onnx_lowrank.forms.base import Array, Form, Refusal, Site, attribute
from onnx_lowrank.forms.matmul import by_slice, hidden_shape, refusal, stack

if TYPE_CHECKING:
    from onnx_lowrank.emit import Emitter, Factor, Pair

__all__ = ["FusedMatMulLeft", "FusedMatMulRight"]

_TRANSPOSED = ("transA", "transB")


class _FusedMatMul(Form):
    """A FusedMatMul; ``side`` is the index of its constant."""

    ops = "fused-matmul"
    side: ClassVar[int]

    def match(self, node: ir.Node, constants: Constants) -> Site | Refusal | None:
        """A FusedMatMul with a constant operand on this side (on the right if on both)."""
        operand, other = (constants.resolve(node.inputs[i]) for i in (self.side, 1 - self.side))
        if operand is None or (self.side == 0 and other is not None):
            return None
        refused = refusal(operand, other, node.inputs[1 - self.side])
        if refused is not None or isinstance(operand, Unusable):
            return refused
        if attribute(node, "transBatchA", 0) or attribute(node, "transBatchB", 0):
            return Refusal(
                operand.name, operand.size, operand.shape, "transBatchA or transBatchB is set"
            )
        turned = bool(attribute(node, _TRANSPOSED[self.side], 0))
        matrix = stack(operand, transposed=turned != (self.side == 0))
        return self.site(node, self.side, operand, matrix)

    def vectors(self, site: Site, array: Array) -> Array:
        """The rows of X', by slice."""
        rows = array.swapaxes(-1, -2) if attribute(site.node, "transA", 0) else array
        return by_slice(rows, site.operand.shape[:-2])

    def reading(self, site: Site) -> Hashable:
        """The rows or columns, and how a batch of weights takes them."""
        kind = "columns" if attribute(site.node, "transA", 0) else "rows"
        return (kind, site.m, *site.operand.shape[:-2])

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
