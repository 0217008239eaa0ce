"""Hidden units: ``f(X·A + a)·B`` with an elementwise f, which may read several maps.

Units are left out: their columns of A and a, and their rows of B; what remains of B is fitted again
so that it makes up for them, ``f(X·A·S + a·S)·T`` with S of some columns of 1, and
``T = (Sᵀ·C·S)⁻¹·Sᵀ·C·B`` with ``C = E[hᵀh]`` of the units h.

Gated units are ``h = f(X·A + a) ⊙ (X·U + u)`` (SwiGLU, GeGLU; N. Shazeer, 2020): the columns of U
and u go with those of A and a.  A and U may be two maps or one, ``X·[A | U]``, that is taken apart
behind.
"""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from onnx_lowrank.graph.constant import Constant
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.graph.cuts import parts_of
from onnx_lowrank.graph.walk import operator
from onnx_lowrank.maps.forms.base import Site
from onnx_lowrank.maps.forms.inner import Inner, InnerForm, first_of, gemm_row, own_row, seen_by

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
_CONTRIBUTED = frozenset({"BiasGelu", "FastGelu", "Gelu", "QuickGelu"})  # of com.microsoft


class HiddenUnits(InnerForm):
    """A product of what an elementwise function makes of other products."""

    name = "hidden"
    ops = "hidden"
    targets: ClassVar[frozenset[tuple[str, str]]] = frozenset({("", "MatMul"), ("", "Gemm")})

    def heads(self, _: Inner) -> int:
        """All units alike."""
        return 1

    def inner(self, plain: Site, constants: Constants) -> Inner | str | None:
        """The units between maps."""
        walk = _Walk(plain, constants)
        if not walk.back():
            return None
        nodes = [site.node for site in walk.firsts]
        seen = seen_by(nodes, walk.between, plain.node, constants.model.graph)
        if seen is not None:
            return f"{seen} sees what lies in front of it too"
        if walk.problem is not None:
            return walk.problem
        cuts = tuple(node for node in walk.between if operator(node) in _CUTS)
        return Inner(
            tuple(walk.firsts), tuple(walk.rows), tuple(walk.between), cuts=cuts, selects=True
        )


_CUTS = frozenset({("", "Split"), ("", "Slice")})


class _Walk:
    """Back from the last map, through what works on each element, to the maps that make them.

    Attributes:
        firsts: these maps.
        rows: constants of as many elements.
        between: the nodes in between.
        problem: why the units cannot be left out; None where they can.
    """

    def __init__(self, plain: Site, constants: Constants) -> None:
        self._plain, self._constants = plain, constants
        self.firsts: list[Site] = []
        self.rows: list[Constant] = []
        self.between: dict[ir.Node, int] = {}  # with the width of what it gives
        self.problem: str | None = None

    def back(self) -> bool:
        """Walk; whether there is nothing but such nodes in between, at least one, and maps."""
        plain, found = self._plain, False
        waiting: list[tuple[ir.Value | None, int]] = [(plain.node.inputs[0], plain.m)]
        while waiting:
            value, width = waiting.pop()
            node = None if value is None else value.producer()
            if value is None or node is None:
                return False
            if operator(node) in (("", "MatMul"), ("", "Gemm")):
                found = True
                self._map(value, width)
            elif node in self.between:
                if self.between[node] != width:
                    return False
            elif operator(node) in _CUTS:
                parts = parts_of(node, width)
                if parts is None:
                    return False
                self.between[node] = width
                waiting.append((node.inputs[0], parts * width))
            elif not _elementwise(node):
                return False
            else:
                self.between[node] = width
                waiting += [(read, width) for read in self._computed(node, width)]
        return found and bool(self.between)

    def _map(self, value: ir.Value, width: int) -> None:
        known = next((site for site in self.firsts if site.node is value.producer()), None)
        if known is not None:
            if known.n != width:
                self._left(_NO_MAP)
            return
        site = first_of(value, width, self._constants)
        if site is None:
            self._left(_NO_MAP)
            return
        self.firsts.append(site)
        fits, own = gemm_row(site, self._constants)
        self.rows += own
        if not fits:
            self._left(_ELSEWHERE)

    def _computed(self, node: ir.Node, width: int) -> list[ir.Value]:
        """What a node reads that is not constant."""
        found = []
        for read in node.inputs:
            constant = self._constants.resolve(read)
            if read is None or (isinstance(constant, Constant) and constant.size == 1):
                continue
            if constant is None:
                found.append(read)
                continue
            row = own_row(read, width, self._constants)
            if row is None:
                self._left(_ELSEWHERE)
            else:
                self.rows.append(row)
        return found

    def _left(self, why: str) -> None:
        self.problem = self.problem or why


_NO_MAP = "a map in front of it is no plain product with a float weight of its own"
_ELSEWHERE = "a constant in front of it has another shape, or is read elsewhere too"


def _elementwise(node: ir.Node) -> bool:
    domain, op_type = operator(node)
    own = {"": _ELEMENTWISE, "com.microsoft": _CONTRIBUTED}
    return op_type in own.get(domain, ())
