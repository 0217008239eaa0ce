"""MatMul with a constant operand.

Right:  ``X @ W                ->  (X @ A) @ B``              with ``W ≈ A·B``
Left:   ``W @ X                ->  Bᵀ @ (Aᵀ @ X)``            with ``Wᵀ ≈ A·B``

W may have leading batch dimensions: every slice then has its own factors, of one shared rank.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import ClassVar

import onnx_ir as ir

from onnx_lowrank.graph.constant import Constant
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.graph.walk import only_sum
from onnx_lowrank.maps.emit import Emitter, Pair
from onnx_lowrank.maps.forms.base import (
    Form,
    Refusal,
    Site,
)
from onnx_lowrank.maps.forms.product import (
    by_slice,
    constant_operand,
    hidden_shape,
    row_constant,
    stack,
)
from onnx_lowrank.numerics.arrays import Array

__all__ = ["MatMulLeft", "MatMulRight"]


class MatMulRight(Form):
    """``X @ W``."""

    name = "matmul-right"
    ops = "matmul"
    shares_first = True
    targets: ClassVar[frozenset[tuple[str, str]]] = frozenset({("", "MatMul")})

    def match(self, node: ir.Node, constants: Constants) -> Site | Refusal | None:
        """A MatMul whose second operand is constant."""
        operand = constant_operand(node, 1, constants)
        if not isinstance(operand, Constant):
            return operand
        return self.site(node, 1, operand, stack(operand, transposed=False))

    def vectors(self, site: Site, array: Array) -> Array:
        """The rows of X, by slice."""
        return by_slice(array, site.operand.shape[:-2])

    def reading(self, site: Site) -> Hashable:
        """The rows, and how a batch of weights takes them."""
        return ("rows", site.m, *site.operand.shape[:-2])

    def mapped(self, site: Site, _: Constants) -> Callable[[Array], Array] | None:
        """The rows of Y, of a single matrix."""
        return None if site.slices > 1 else lambda output: output.reshape(-1, site.n)

    def bias(self, site: Site, constants: Constants) -> Constant | None:
        """What an Add right behind a single matrix adds."""
        behind = only_sum(site.node.outputs[0])
        if site.slices > 1 or behind is None:
            return None
        return row_constant(behind[1], site.n, constants)

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
        operand = constant_operand(node, 0, constants)
        if not isinstance(operand, Constant):
            return operand
        return self.site(node, 0, operand, stack(operand, transposed=True))

    def vectors(self, site: Site, array: Array) -> Array:
        """The columns of X, by slice."""
        columns = array[None] if array.ndim == 1 else array.swapaxes(-1, -2)
        return by_slice(columns, site.operand.shape[:-2])

    def reading(self, site: Site) -> Hashable:
        """The columns, and how a batch of weights takes them."""
        return ("columns", site.m, *site.operand.shape[:-2])

    def mapped(self, site: Site, _: Constants) -> Callable[[Array], Array] | None:
        """The columns of Y, of a single matrix."""
        if site.slices > 1:
            return None
        return lambda output: (output if output.ndim == 1 else output.swapaxes(-1, -2)).reshape(
            -1, site.n
        )

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
