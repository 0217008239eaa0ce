"""com.microsoft.Attention: the projection of queries, keys and values in one weight ``W[D, 3·H]``.

``Attention(X, W, b, …)  ->  Attention(X @ A, B, b, …)``        with ``W ≈ A·B``

Q, K and V share the first map; the node keeps its heads, mask and bias.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

import onnx_ir as ir

from onnx_lowrank.constants import Constants, Unusable
from onnx_lowrank.forms.base import Dims, Form, Refusal, Site

if TYPE_CHECKING:
    from onnx_lowrank.emit import Emitter, Pair

__all__ = ["Attention"]


class Attention(Form):
    """The packed projection of an Attention node."""

    name = "attention"
    ops = "attention"
    targets: ClassVar[frozenset[tuple[str, str]]] = frozenset({("com.microsoft", "Attention")})

    def match(self, node: ir.Node, constants: Constants) -> Site | Refusal | None:
        """An Attention with a constant weight."""
        weight = constants.resolve(node.inputs[1])
        if weight is None:
            return None
        if isinstance(weight, Unusable):
            return Refusal.of(weight)
        return self.site(node, 1, weight, weight.reshape(1, *weight.shape))

    def rewrite(self, site: Site, pair: Pair, emit: Emitter) -> None:
        """``Attention(X @ A, B)``."""
        x = site.node.inputs[0]
        assert x is not None
        shape = None if x.shape is None else ir.Shape([*list(x.shape)[:-1], pair.rank])
        first = emit.factor(pair.first.reshape(site.m, pair.rank))
        emit.replace(0, emit.node("MatMul", [x, first], shape=shape))
        emit.replace(1, emit.factor(pair.second.reshape(pair.rank, site.n)))

    def rows(self, site: Site, dims: Callable[[ir.Value], Dims | None]) -> int | None:
        """Batch times sequence."""
        x = site.node.inputs[0]
        shape = None if x is None else dims(x)
        if shape is None or None in shape:
            return None
        return math.prod(d or 0 for d in shape[:-1])
