"""MatMul with a constant operand.

Right:  ``X @ W                ->  (X @ A) @ B``              with ``W ≈ A·B``
Left:   ``W @ X                ->  Bᵀ @ (Aᵀ @ X)``            with ``Wᵀ ≈ A·B``

W may have leading batch dimensions: every slice then has its own factors, of one shared rank.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_ir as ir

from onnx_lowrank.constants import Constant, Constants, Unusable
from onnx_lowrank.forms.base import Array, Form, Refusal, Site

if TYPE_CHECKING:
    from onnx_lowrank.emit import Emitter, Pair

__all__ = ["MatMulLeft", "MatMulRight"]


def stack(operand: Constant, *, transposed: bool) -> Constant:
    """The matrices ``[e, m, n]`` of an operand with any number of leading batch dimensions."""
    *lead, rows, columns = operand.shape
    matrices = operand.reshape(math.prod(lead), rows, columns)
    return matrices.transpose(0, 2, 1) if transposed else matrices


def refusal(
    constant: Constant | Unusable, other: Constant | Unusable | None, activation: ir.Value | None
) -> Refusal | None:
    """Why an operand of a matrix product cannot be factored, if so."""
    if isinstance(constant, Unusable):
        return Refusal.of(constant)
    if isinstance(other, Constant):
        return _refuse(constant, "both operands are constant; simplification folds the node")
    if len(constant.shape) < 2:
        return _refuse(constant, "a vector has no factors")
    if len(constant.shape) > 2:
        rank = None if activation is None or activation.shape is None else len(activation.shape)
        if rank is None:
            return _refuse(
                constant, "a batch of weights whose activation has an unknown number of axes"
            )
        if rank < 2:
            return _refuse(constant, "a batch of weights applied to a single vector")
    return None


def _refuse(constant: Constant, reason: str) -> Refusal:
    return Refusal(constant.name, constant.size, constant.shape, reason)


def by_slice(rows: Array, lead: Sequence[int]) -> Array:
    """The rows ``[…, N, m]`` of an activation by slice of ``W[*lead, m, n]``: [e, N', m]."""
    if math.prod(lead) == 1:
        return rows.reshape(1, -1, rows.shape[-1])
    batch = np.broadcast_shapes(rows.shape[:-2], tuple(lead))
    rows = np.broadcast_to(rows, (*batch, *rows.shape[-2:]))
    padded = [1] * (len(batch) - len(lead)) + list(lead)
    own = [axis for axis, size in enumerate(padded) if size > 1]
    rest = [axis for axis in range(rows.ndim) if axis not in own]
    return rows.transpose(*own, *rest).reshape(math.prod(lead), -1, rows.shape[-1])


def hidden_shape(
    output: ir.Value, axis: int, rank: int, fallback: ir.Shape | None
) -> ir.Shape | None:
    """Shape of ``X @ A``: the node's output with one axis (-1 or -2) replaced by the rank."""
    source = output.shape if output.shape is not None else fallback
    if source is None:
        return None
    dims = list(source)
    if axis == -2 and len(dims) < 2:
        axis = -1  # a vector on the right of a matrix
    if len(dims) < -axis:
        return None
    dims[axis] = rank
    return ir.Shape(dims)


class MatMulRight(Form):
    """``X @ W``."""

    name = "matmul-right"
    ops = "matmul"
    targets: ClassVar[frozenset[tuple[str, str]]] = frozenset({("", "MatMul")})

    def match(self, node: ir.Node, constants: Constants) -> Site | Refusal | None:
        """A MatMul whose second operand is constant."""
        operand = constants.resolve(node.inputs[1])
        if operand is None:
            return None
        other = constants.resolve(node.inputs[0])
        refused = refusal(operand, other, node.inputs[0])
        if refused is not None or isinstance(operand, Unusable):
            return refused
        return self.site(node, 1, operand, stack(operand, transposed=False))

    def vectors(self, site: Site, array: Array) -> Array:
        """The rows of X, by slice."""
        return by_slice(array, site.operand.shape[:-2])

    def reading(self, site: Site) -> Hashable:
        """The rows, and how a batch of weights takes them."""
        return ("rows", site.m, *site.operand.shape[:-2])

    def rewrite(self, site: Site, pair: Pair, emit: Emitter) -> None:
        """``(X @ A) @ B``."""
        *lead, m, n = site.operand.shape
        x = site.node.inputs[0]
        assert x is not None
        hidden = emit.node(
            "MatMul",
            [x, emit.factor(pair.first.reshape(*lead, m, pair.rank))],
            shape=hidden_shape(site.node.outputs[0], -1, pair.rank, None if lead else x.shape),
        )
        emit.replace(0, hidden)
        emit.replace(1, emit.factor(pair.second.reshape(*lead, pair.rank, n)))


class MatMulLeft(Form):
    """``W @ X``."""

    name = "matmul-left"
    ops = "matmul"
    targets: ClassVar[frozenset[tuple[str, str]]] = frozenset({("", "MatMul")})

    def match(self, node: ir.Node, constants: Constants) -> Site | Refusal | None:
        """A MatMul whose first operand alone is constant."""
        operand = constants.resolve(node.inputs[0])
        if operand is None or constants.resolve(node.inputs[1]) is not None:
            return None
        refused = refusal(operand, None, node.inputs[1])
        if refused is not None or isinstance(operand, Unusable):
            return refused
        return self.site(node, 0, operand, stack(operand, transposed=True))

    def vectors(self, site: Site, array: Array) -> Array:
        """The columns of X, by slice."""
        columns = array[None] if array.ndim == 1 else array.swapaxes(-1, -2)
        return by_slice(columns, site.operand.shape[:-2])

    def reading(self, site: Site) -> Hashable:
        """The columns, and how a batch of weights takes them."""
        return ("columns", site.m, *site.operand.shape[:-2])

    def rewrite(self, site: Site, pair: Pair, emit: Emitter) -> None:
        """``Bᵀ @ (Aᵀ @ X)``."""
        *lead, n, m = site.operand.shape
        x = site.node.inputs[1]
        assert x is not None
        hidden = emit.node(
            "MatMul",
            [emit.factor(pair.first.transpose(0, 2, 1).reshape(*lead, pair.rank, m)), x],
            shape=hidden_shape(site.node.outputs[0], -2, pair.rank, None),
        )
        emit.replace(0, emit.factor(pair.second.transpose(0, 2, 1).reshape(*lead, n, pair.rank)))
        emit.replace(1, hidden)
