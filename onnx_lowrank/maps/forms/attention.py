"""com.microsoft.Attention: the projection of queries, keys and values in one weight ``W[D, 3·H]``.

``Attention(X, W, b, …)  ->  Attention(X @ A, B, b, …)``        with ``W ≈ A·B``

Q, K and V share the first map; the node keeps its heads, mask and bias.
"""

from __future__ import annotations

from typing import ClassVar

from onnx_lowrank.graph.constant import Constant
from onnx_lowrank.maps.emit import Factor, Pair
from onnx_lowrank.maps.forms.base import Site
from onnx_lowrank.maps.forms.projected import Projected

__all__ = ["Attention"]


class Attention(Projected):
    """The packed projection of an Attention node."""

    name = "attention"
    ops = "attention"
    targets: ClassVar[frozenset[tuple[str, str]]] = frozenset({("com.microsoft", "Attention")})

    def matrix(self, weight: Constant) -> Constant:
        """``W[D, 3·H]`` itself."""
        return weight.reshape(1, *weight.shape)

    def second(self, site: Site, pair: Pair) -> Factor:
        """``B[k, 3·H]``."""
        return pair.second.reshape(pair.rank, site.n)
