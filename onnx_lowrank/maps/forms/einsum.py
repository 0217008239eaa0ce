"""Einsum of an activation and a constant, with any letters.

``Einsum("bsd,dhk->bshk", X, W)  ->  Einsum("bsd,dhk->bshk", X @ A, B)``

The letters of W fall into three kinds: contracted (c, in X but not in the result), new (o, in the
result but not in X) and batch (b, in both).  W is then the stack of matrices ``W[b, c, o]``.  Where
one letter is contracted and is the last of X, the first map is a plain MatMul and the node keeps
its equation, the letter now standing for the rank; otherwise, with a fresh letter r:

``Einsum(x, bcr -> h)`` with h = x without c, then r;  ``Einsum(h, bro -> result)``
"""

from __future__ import annotations

import math
import string
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnx_lowrank.graph.constant import Constant, Unusable
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.maps.emit import Emitter, Pair
from onnx_lowrank.maps.forms.base import (
    Form,
    Refusal,
    Site,
)
from onnx_lowrank.numerics.arrays import Array

__all__ = ["Einsum"]

_DOTS = "..."


@dataclass(frozen=True)
class _Equation:
    """The letters of activation, weight and result; dots may stand in the first and last."""

    x: str
    w: str
    result: str
    weight_first: bool
    arrow: bool
    """Whether the result was written out; the order of one that was not is the runtime's."""

    @property
    def batch(self) -> str:
        return "".join(c for c in self.w if c in self.x and c in self.result)

    @property
    def contracted(self) -> str:
        return "".join(c for c in self.w if c in self.x and c not in self.result)

    @property
    def new(self) -> str:
        return "".join(c for c in self.w if c not in self.x)

    @property
    def plain(self) -> bool:
        """Whether the first map is ``X @ A``."""
        return not self.batch and len(self.contracted) == 1 and self.x.endswith(self.contracted)

    def letters(self, w: str, x: str, result: str | None) -> str:
        operands = ",".join((w, x) if self.weight_first else (x, w))
        return operands if result is None else f"{operands}->{result}"


class Einsum(Form):
    """Einsum with one constant operand."""

    name = "einsum"
    ops = "einsum"
    targets: ClassVar[frozenset[tuple[str, str]]] = frozenset({("", "Einsum")})

    def match(self, node: ir.Node, constants: Constants) -> Site | Refusal | None:
        """An Einsum of two operands, exactly one of them constant."""
        found = [constants.resolve(value) for value in node.inputs]
        constant = [index for index, value in enumerate(found) if value is not None]
        if len(constant) != 1:
            return None
        index = constant[0]
        operand = found[index]
        if isinstance(operand, Unusable):
            return Refusal.of(operand)
        assert operand is not None
        equation = _parse(node, index)
        if not isinstance(equation, str) and len(equation.w) != len(operand.shape):
            equation = f"einsum has {equation.w!r} for a constant of {len(operand.shape)} axes"
        if isinstance(equation, str):
            return Refusal.because(operand, equation)
        return self.site(node, index, operand, _matrices(operand, equation))

    def vectors(self, site: Site, array: Array) -> Array:
        """X with its batch letters first and its contracted letters last."""
        equation = _parse(site.node, site.index)
        assert isinstance(equation, _Equation)
        head, dots, tail = equation.x.partition(_DOTS)
        spare = array.ndim - len(head) - len(tail)
        letters = [*head, *([f"{_DOTS}{axis}" for axis in range(spare)] if dots else []), *tail]
        size = dict(zip(equation.w, site.operand.shape, strict=True))
        # ONNX Runtime stretches axes of length 1, of either operand.
        wanted = [
            size[c] if array.shape[i] == 1 and c in size else -1 for i, c in enumerate(letters)
        ]
        stretched = [d if w < 0 else w for d, w in zip(array.shape, wanted, strict=True)]
        array = np.broadcast_to(array, stretched)
        short = [i for i, c in enumerate(letters) if c in equation.contracted and size[c] == 1]
        array = array.sum(tuple(short), keepdims=True, dtype=array.dtype) if short else array
        own = [letters.index(c) for c in equation.batch if size[c] > 1]
        last = [letters.index(c) for c in equation.contracted]
        rest = [axis for axis in range(array.ndim) if axis not in own + last]
        return array.transpose(*own, *rest, *last).reshape(site.slices, -1, site.m)

    def reading(self, site: Site) -> Hashable:
        """The places of its letters."""
        equation = _parse(site.node, site.index)
        assert isinstance(equation, _Equation)
        places = [equation.x.index(c) for c in equation.batch + equation.contracted]
        if not equation.batch and equation.plain:
            return ("rows", site.m)
        return ("einsum", equation.x, *places)

    def rewrite(self, site: Site, pair: Pair, emit: Emitter) -> None:
        """``Einsum(X @ A, B)``, or two Einsums."""
        node = site.node
        equation = _parse(node, site.index)
        assert isinstance(equation, _Equation)
        size = dict(zip(equation.w, site.operand.shape, strict=True))
        batch = [size[c] for c in equation.batch]
        contracted = [size[c] for c in equation.contracted]
        new = [size[c] for c in equation.new]
        x_index = 1 - site.index
        x = node.inputs[x_index]
        assert x is not None
        second = pair.second.reshape(*batch, pair.rank, *new)
        if equation.plain:
            shape = None if x.shape is None else ir.Shape([*list(x.shape)[:-1], pair.rank])
            hidden = emit.node(
                "MatMul", [x, emit.factor(pair.first.reshape(site.m, pair.rank))], shape=shape
            )
            order = equation.contracted + equation.new
            second = second.transpose(*(order.index(c) for c in equation.w))
        else:
            rank = next(c for c in string.ascii_letters if c not in equation.x + equation.w)
            kept = "".join(c for c in equation.x if c not in equation.contracted) + rank
            first = emit.factor(pair.first.reshape(*batch, *contracted, pair.rank))
            letters = equation.batch + equation.contracted + rank
            operands = [first, x] if equation.weight_first else [x, first]
            hidden = emit.node(
                "Einsum",
                operands,
                shape=_hidden_shape(x, equation, size, pair.rank),
                attributes=[ir.AttrString("equation", equation.letters(letters, equation.x, kept))],
            )
            letters = equation.batch + rank + equation.new
            result = equation.result if equation.arrow else None
            node.attributes["equation"] = ir.AttrString(
                "equation", equation.letters(letters, kept, result)
            )
        emit.replace(x_index, hidden)
        emit.replace(site.index, emit.factor(second))


def _parse(node: ir.Node, index: int) -> _Equation | str:
    """The equation, or why it is not handled."""
    text = node.attributes["equation"].as_string().replace(" ", "")
    left, arrow, result = text.partition("->")
    terms = left.split(",")
    if len(terms) != 2:
        return f"einsum {text!r} has {len(terms)} operands; two are handled"
    x, w = terms[1 - index], terms[index]
    if not arrow:  # the letters that occur once, in alphabetical order
        both = (x + w).replace(_DOTS, "")
        result = (_DOTS if _DOTS in left else "") + "".join(
            sorted(c for c in set(both) if both.count(c) == 1)
        )
    equation = _Equation(x, w, result, weight_first=index == 0, arrow=bool(arrow))
    letters = x.replace(_DOTS, "")
    if _DOTS in w:
        return f"einsum {text!r} has dots in its constant"
    if len(set(w)) < len(w) or len(set(letters)) < len(letters):
        return f"einsum {text!r} takes a diagonal"
    if any(c not in result for c in equation.new) or (any(c not in w + result for c in letters)):
        return f"einsum {text!r} sums an axis of one operand alone"
    if not equation.contracted or not equation.new:
        return f"einsum {text!r} is no matrix product: nothing is contracted, or nothing is new"
    return equation


def _matrices(operand: Constant, equation: _Equation) -> Constant:
    """The constant as ``W[b, c, o]``."""
    size = dict(zip(equation.w, operand.shape, strict=True))
    order = equation.batch + equation.contracted + equation.new
    return operand.transpose(*(equation.w.index(c) for c in order)).reshape(
        *(
            math.prod(size[c] for c in part)
            for part in (equation.batch, equation.contracted, equation.new)
        )
    )


def _hidden_shape(
    x: ir.Value, equation: _Equation, size: Mapping[str, int], rank: int
) -> ir.Shape | None:
    """Shape of the first Einsum's result; an axis of length 1 is stretched to the weight's."""
    if x.shape is None:
        return None
    head, dots, tail = equation.x.partition(_DOTS)
    extra = len(x.shape) - len(head + tail)
    if extra < 0 or (extra and not dots):
        return None
    labels = [*head, *[_DOTS] * extra, *tail]
    kept = [
        size[c] if size.get(c, 1) > 1 else d
        for c, d in zip(labels, x.shape, strict=True)
        if c not in equation.contracted
    ]
    return ir.Shape([*kept, rank])
