"""Linear models of the ai.onnx.ml domain: recognised, and left alone.

``LinearClassifier(X)``, ``LinearRegressor(X)``, ``SVM…(X)``  ->  as they are

Their coefficients are attributes of the node, and the node does more than multiply by them.
"""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.graph.walk import node_name
from onnx_lowrank.maps.emit import Emitter, Pair
from onnx_lowrank.maps.forms.base import Form, Refusal, Site

__all__ = ["MlLinear"]

_OPS = ("LinearClassifier", "LinearRegressor", "SVMClassifier", "SVMRegressor")


class MlLinear(Form):
    """A linear model of classical machine learning."""

    name = "ml-linear"
    ops = "ml-linear"
    targets: ClassVar[frozenset[tuple[str, str]]] = frozenset(("ai.onnx.ml", op) for op in _OPS)

    def match(self, node: ir.Node, constants: Constants) -> Site | Refusal | None:  # noqa: ARG002
        """Always a refusal."""
        coefficients = node.attributes.get("coefficients")
        count = 0 if coefficients is None else len(coefficients.as_floats())
        return Refusal(
            f"{node_name(node)}.coefficients",
            0,  # attributes are no parameters of the model (see `File`)
            None,
            f"its {count} coefficients are an attribute of the node, not a weight that can be "
            "factored",
        )

    def rewrite(self, site: Site, pair: Pair, emit: Emitter) -> None:
        """Never called: there are no sites."""
        raise AssertionError(f"{site.node.op_type} has no sites: {pair}, {emit}")
