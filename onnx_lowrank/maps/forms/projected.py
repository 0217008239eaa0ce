"""What the forms share whose node projects its input itself: a MatMul is put before the node.

``node(X, W, …)  ->  node(X @ A, B, …)``        with W read as ``W[m, n] ≈ A·B``
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable

import onnx_ir as ir

from onnx_lowrank.graph.constant import Constant, Unusable
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.maps.emit import Emitter, Factor, Pair
from onnx_lowrank.maps.forms.base import (
    Dims,
    Form,
    Refusal,
    Site,
)

__all__ = ["Projected"]


class Projected(Form):
    """A node with its activation in input 0 and the projection's weight in input 1."""

    @abc.abstractmethod
    def matrix(self, weight: Constant) -> Constant:
        """The weight read as ``W[1, m, n]``."""

    @abc.abstractmethod
    def second(self, site: Site, pair: Pair) -> Factor:
        """``B[1, k, n]`` as the node wants it."""

    def match(self, node: ir.Node, constants: Constants) -> Site | Refusal | None:
        """A node whose weight is constant."""
        weight = constants.resolve(node.inputs[1])
        if weight is None:
            return None
        if isinstance(weight, Unusable):
            return Refusal.of(weight)
        return self.site(node, 1, weight, self.matrix(weight))

    def rewrite(self, site: Site, pair: Pair, emit: Emitter) -> None:
        """``X @ A`` before the node, B in place of its weight."""
        x = site.node.inputs[0]
        assert x is not None
        shape = None if x.shape is None else ir.Shape([*list(x.shape)[:-1], pair.rank])
        first = emit.factor(pair.first.reshape(site.m, pair.rank))
        emit.replace(0, emit.node("MatMul", [x, first], shape=shape))
        emit.replace(1, emit.factor(self.second(site, pair)))

    def rows(self, site: Site, dims: Callable[[ir.Value], Dims | None]) -> int | None:
        """All positions of the activation."""
        x = site.node.inputs[0]
        shape = None if x is None else dims(x)
        if shape is None or None in shape:
            return None
        return math.prod(d or 0 for d in shape[:-1])
