"""Value heads: what attention passes on of each head, and the rows of the next map that read it.

``Y = [P₁·V₁ | … | Pₑ·Vₑ]·B`` with ``V = X·A + a``: the attention weights Pᵢ mix rows, not the
elements of a head, so that ``Vᵢ·Bᵢ`` is a pair that can have a lower rank, as
``(Vᵢ·Sᵢ)·Tᵢ`` with ``Bᵢ ≈ Sᵢ·Tᵢ``; Sᵢ goes into A and a.  All heads keep as many elements.
(C.-H. Lin et al., "MoDeGPT", ICLR 2025, and FLAT-LLM do the same to decoders.)
"""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from onnx_lowrank.graph.constant import Constant
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.graph.sizes import last_sizes
from onnx_lowrank.graph.walk import operator
from onnx_lowrank.maps.forms.base import Site
from onnx_lowrank.maps.forms.inner import Inner, InnerForm, first_of, gemm_row, own_row, seen_by

__all__ = ["ValueHeads"]

_PERMUTATION = [0, 2, 1, 3]


class ValueHeads(InnerForm):
    """The product of what attention gives, with heads side by side."""

    name = "heads"
    ops = "heads"
    targets: ClassVar[frozenset[tuple[str, str]]] = frozenset({("", "MatMul"), ("", "Gemm")})

    def heads(self, inner: Inner) -> int:
        """How many heads there are."""
        sizes = last_sizes(inner.reshapes[0].inputs[1], 2)
        assert sizes is not None
        return sizes[0]

    def inner(self, plain: Site, constants: Constants) -> Inner | None:
        """The values of the heads between two maps, with the attention around them."""
        width = plain.m
        together = _made_by(plain.node.inputs[0], "Reshape")
        turned = None if together is None else _made_by(together.inputs[0], "Transpose")
        mixed = None if turned is None else _made_by(turned.inputs[0], "MatMul")
        values = None if mixed is None else _made_by(mixed.inputs[1], "Transpose")
        apart = None if values is None else _made_by(values.inputs[0], "Reshape")
        if together is None or turned is None or mixed is None or values is None or apart is None:
            return None
        if any(_permutation(node) != _PERMUTATION for node in (turned, values)):
            return None
        sizes, joined = last_sizes(apart.inputs[1], 2), last_sizes(together.inputs[1], 1)
        if sizes is None or joined is None or joined[0] not in (width, -1):
            return None
        count, size = sizes
        if count < 1 or width % count or size not in (width // count, -1) or width == count:
            return None
        product = apart.inputs[0]
        between = [apart, values, mixed, turned, together]
        added = _made_by(product, "Add")
        found: list[Constant] = []
        if added is not None:
            for place in (0, 1):
                row = own_row(added.inputs[place], width, constants)
                if row is not None:
                    found, product = [row], added.inputs[1 - place]
                    between.insert(0, added)
                    break
            else:
                return None
        first = None if product is None else first_of(product, width, constants)
        if first is None:
            return None
        fits, own = gemm_row(first, constants)
        if not fits or seen_by([first.node], between, plain.node, constants.model.graph):
            return None
        return Inner((first,), (*own, *found), tuple(between), (apart, together))


def _made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node of an operator that makes a value, which is read once."""
    node = None if value is None else value.producer()
    if value is None or node is None or operator(node) != ("", op_type):
        return None
    return node if len(list(value.uses())) == 1 else None


def _permutation(node: ir.Node) -> list[int]:
    return list(node.attributes["perm"].as_ints()) if "perm" in node.attributes else []
