"""Gemm with a constant operand; ``X'`` is X or Xᵀ as transA and transB say.

Right:  ``α·X'·W' + β·C  ->  α·(X' @ A)·B + β·C``        with ``W' ≈ A·B``
Left:   ``α·W'·X' + β·C  ->  α·Bᵀ·(Aᵀ @ X') + β·C``      with ``W'ᵀ ≈ A·B``

The first map is a plain MatMul (a Gemm without C needs opset 11 and crashes some providers); the
second is the node itself, with its α, β, C and the transposition of its weight unchanged.  An
activation that the Gemm transposes is transposed before the MatMul.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnx_lowrank.graph.constant import Constant
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.graph.walk import attribute, float_attribute
from onnx_lowrank.maps.emit import Emitter, Pair
from onnx_lowrank.maps.forms.base import (
    Form,
    Refusal,
    Site,
)
from onnx_lowrank.maps.forms.product import constant_operand, hidden_shape, row_constant
from onnx_lowrank.numerics.arrays import Array

__all__ = ["GemmLeft", "GemmRight"]


class GemmRight(Form):
    """``α·X'·W' + β·C``."""

    name = "gemm-right"
    ops = "gemm"
    shares_first = True
    targets: ClassVar[frozenset[tuple[str, str]]] = frozenset({("", "Gemm")})

    def match(self, node: ir.Node, constants: Constants) -> Site | Refusal | None:
        """A Gemm whose second operand is constant."""
        operand = constant_operand(node, 1, constants)
        if not isinstance(operand, Constant):
            return operand
        matrix = operand.reshape(1, *operand.shape)
        if attribute(node, "transB", 0):
            matrix = matrix.transpose(0, 2, 1)
        return self.site(node, 1, operand, matrix)

    def vectors(self, site: Site, array: Array) -> Array:
        """The rows of X'."""
        return (array.T if attribute(site.node, "transA", 0) else array)[None]

    def mapped(self, site: Site, constants: Constants) -> Callable[[Array], Array] | None:
        """``(Y − β·C) / α`` where C is constant."""
        node = site.node
        alpha, beta = _scales(node)
        added = node.inputs[2] if len(node.inputs) > 2 else None
        if added is None or beta == 0.0:
            return None if alpha == 0.0 else lambda output: output / alpha
        bias = constants.resolve(added)
        if not isinstance(bias, Constant) or alpha == 0.0:
            return None
        constant = beta * bias.numpy().astype(np.float32)
        return lambda output: (output - constant) / alpha

    def bias(self, site: Site, constants: Constants) -> Constant | None:
        """C where it is one row, and neither it nor the product is scaled."""
        node = site.node
        if len(node.inputs) < 3 or _scales(node) != (1.0, 1.0):
            return None
        return row_constant(node.inputs[2], site.n, constants)

    def reading(self, site: Site) -> Hashable:
        """Whether they are the rows or the columns of X."""
        return ("columns" if attribute(site.node, "transA", 0) else "rows", site.m)

    def rewrite(self, site: Site, pair: Pair, emit: Emitter) -> None:
        """``α·(X' @ A)·B + β·C``."""
        node = site.node
        x = emit.transposed(node.inputs[0], attribute(node, "transA", 0))
        hidden = emit.node(
            "MatMul",
            [x, emit.factor(pair.first.reshape(site.m, pair.rank))],
            shape=hidden_shape(node.outputs[0], -1, pair.rank, x.shape),
        )
        second = pair.second
        if attribute(node, "transB", 0):
            second = second.transpose(0, 2, 1)
        emit.replace(0, hidden)
        emit.replace(1, emit.factor(second.reshape(*second.shape[1:])))
        emit.reset("transA")


def _scales(node: ir.Node) -> tuple[float, float]:
    """α and β."""
    return float_attribute(node, "alpha", 1.0), float_attribute(node, "beta", 1.0)


class GemmLeft(Form):
    """``α·W'·X' + β·C``."""

    name = "gemm-left"
    ops = "gemm"
    targets: ClassVar[frozenset[tuple[str, str]]] = frozenset({("", "Gemm")})

    def match(self, node: ir.Node, constants: Constants) -> Site | Refusal | None:
        """A Gemm whose first operand alone is constant."""
        operand = constant_operand(node, 0, constants)
        if not isinstance(operand, Constant):
            return operand
        matrix = operand.reshape(1, *operand.shape)
        if not attribute(node, "transA", 0):
            matrix = matrix.transpose(0, 2, 1)
        return self.site(node, 0, operand, matrix)

    def vectors(self, site: Site, array: Array) -> Array:
        """The columns of X'."""
        return (array if attribute(site.node, "transB", 0) else array.T)[None]

    def reading(self, site: Site) -> Hashable:
        """Whether they are the rows or the columns of X."""
        return ("rows" if attribute(site.node, "transB", 0) else "columns", site.m)

    def rewrite(self, site: Site, pair: Pair, emit: Emitter) -> None:
        """``α·Bᵀ·(Aᵀ @ X') + β·C``."""
        node = site.node
        x = emit.transposed(node.inputs[1], attribute(node, "transB", 0))
        first = pair.first.transpose(0, 2, 1)
        hidden = emit.node(
            "MatMul",
            [emit.factor(first.reshape(pair.rank, site.m)), x],
            shape=hidden_shape(node.outputs[0], -2, pair.rank, None),
        )
        second = pair.second
        if not attribute(node, "transA", 0):
            second = second.transpose(0, 2, 1)
        emit.replace(0, emit.factor(second.reshape(*second.shape[1:])))
        emit.replace(1, hidden)
        emit.reset("transB")
