"""Hidden units: ``f(X·A + a)·B`` with an elementwise f.

Units are left out: their columns of A and a, and their rows of B; what remains of B is fitted again
so that it makes up for them, ``f(X·A·S + a·S)·T`` with S of some columns of 1, and
``T = (Sᵀ·C·S)⁻¹·Sᵀ·C·B`` with ``C = E[hᵀh]`` of the units h.
"""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from onnx_lowrank.graph.constant import Constant
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.graph.walk import operator
from onnx_lowrank.maps.forms.base import Site
from onnx_lowrank.maps.forms.inner import Inner, InnerForm, closed, first_of, gemm_row, own_row

__all__ = ["HiddenUnits"]

# Operators that work on each element for itself, and leave a unit's place as it is.
_ELEMENTWISE = frozenset(
    {
        *("Abs", "Add", "Celu", "Clip", "Div", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid"),
        *("HardSwish", "Identity", "LeakyRelu", "Log", "Max", "Min", "Mish", "Mul", "Neg", "Pow"),
        *("Reciprocal", "Relu", "Selu", "Sigmoid", "Softplus", "Softsign", "Sqrt", "Sub"),
        *("Swish", "Tanh", "ThresholdedRelu"),
    }
)
_CONTRIBUTED = frozenset({("com.microsoft", "Gelu"), ("com.microsoft", "QuickGelu")})


class HiddenUnits(InnerForm):
    """A product of what an elementwise function makes of another product."""

    name = "hidden"
    ops = "hidden"
    targets: ClassVar[frozenset[tuple[str, str]]] = frozenset({("", "MatMul"), ("", "Gemm")})

    def heads(self, _: Inner) -> int:
        """All units alike."""
        return 1

    def inner(self, plain: Site, constants: Constants) -> Inner | None:
        """The units between two maps."""
        width, activation = plain.m, plain.node.inputs[0]
        rows: list[Constant] = []
        between: dict[ir.Node, None] = {}
        first: Site | None = None
        waiting = [activation]
        while waiting:
            value = waiting.pop()
            producer = None if value is None else value.producer()
            if value is None or producer is None:
                return None
            if producer in between or (first is not None and producer is first.node):
                continue
            if operator(producer) in (("", "MatMul"), ("", "Gemm")):
                found = first_of(value, width, constants)
                if found is None or first is not None:
                    return None
                first = found
                continue
            if not _elementwise(producer):
                return None
            between[producer] = None
            for read in producer.inputs:
                constant = constants.resolve(read)
                if read is None or (isinstance(constant, Constant) and constant.size == 1):
                    continue
                if constant is None:
                    waiting.append(read)
                    continue
                row = own_row(read, width, constants)
                if row is None:
                    return None
                rows.append(row)
        if first is None or not between:
            return None
        fits, own = gemm_row(first, constants)
        if not fits or not closed(first.node, between, plain.node, constants.model.graph):
            return None
        return Inner(first, (*own, *rows), tuple(between), selects=True)


def _elementwise(node: ir.Node) -> bool:
    domain, op_type = operator(node)
    return op_type in _ELEMENTWISE if not domain else (domain, op_type) in _CONTRIBUTED
