"""What a form is: one way in which a constant linear map can stand in a graph.

A form is one module with one class.  It answers two questions: is this node such a map, and if
so, as which stack of matrices ``W[e, m, n]`` (in × out) is its constant read (`Form.match`)? And
how does the node read a pair ``A[e, m, k]``, ``B[e, k, n]`` instead (`Form.rewrite`)?  Everything
between the two, which rank and which factors, who shares the constant, where the factors are
stored and what becomes of the old constant, is the same for all forms and stands elsewhere.

Every class in a module of this package that derives from `Form` is registered automatically.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from onnx_lowrank.graph.constant import FLOATS, Constant, Unusable
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.maps.emit import Emitter, Pair
from onnx_lowrank.numerics.arrays import Array

__all__ = [
    "Cost",
    "Dims",
    "Form",
    "Refusal",
    "Site",
]

Dims = Sequence[int | None]


@dataclass(frozen=True)
class Cost:
    """Multiply-accumulates of one inference.

    Attributes:
        dense: of the map as it is.
        first: of the pair's first map, for each unit of rank.
        second: of its second map, for each unit of rank.
    """

    dense: int
    first: int
    second: int

    def pair(self, rank: int) -> int:
        """Multiply-accumulates of a pair."""
        return rank * (self.first + self.second)


@dataclass(frozen=True, eq=False)
class Site:
    """A constant linear map that can be factored.

    Attributes:
        node: the node.
        form: how the map stands there.
        index: which input of the node is the constant.
        operand: the constant as the node reads it.
        matrix: the same constant read as ``W[e, m, n]``, in × out.
    """

    node: ir.Node
    form: Form
    index: int
    operand: Constant
    matrix: Constant

    @property
    def slices(self) -> int:
        """Number e of matrices."""
        return self.matrix.shape[0]

    @property
    def m(self) -> int:
        """Inputs of the map."""
        return self.matrix.shape[1]

    @property
    def n(self) -> int:
        """Outputs of the map."""
        return self.matrix.shape[2]


@dataclass(frozen=True)
class Refusal:
    """A constant linear map that is left as it is whatever the rank, and why.

    Attributes:
        weight: the constant's name.
        size: its elements; 0 if not known.
        shape: as its node reads it; None if not known.
        reason: one sentence.
        site: how the constant is read where it may be stored in integers all the same.
    """

    weight: str
    size: int
    shape: tuple[int, ...] | None
    reason: str
    site: Site | None = None

    @classmethod
    def of(cls, unusable: Unusable) -> Refusal:
        """The refusal of a constant that cannot be used."""
        return cls(
            unusable.name, unusable.size, unusable.shape, f"{unusable.name} {unusable.reason}"
        )

    @classmethod
    def because(cls, constant: Constant, reason: str) -> Refusal:
        """The refusal of a constant that can be read, for a reason that is a whole sentence."""
        return cls(constant.name, constant.size, constant.shape, reason)


class Form(abc.ABC):
    """One way in which a constant linear map can stand in a graph."""

    name: ClassVar[str]
    """Name of the form, as it is reported."""
    ops: ClassVar[str]
    """The name under which the user chooses it."""
    shares_first: ClassVar[bool] = False
    """Whether its first map is a MatMul of the activation with A, which several nodes can share."""
    default: ClassVar[bool] = True
    """Whether it is on unless the user chooses others."""
    pairs: ClassVar[bool] = True
    """Whether it becomes a pair of maps; "all" is all of these."""
    targets: ClassVar[frozenset[tuple[str, str]]]
    """(domain, operator) of the nodes to look at."""

    @abc.abstractmethod
    def match(self, node: ir.Node, constants: Constants) -> Site | Refusal | None:
        """What the node is: a site of this form, one that is refused, or (None) neither."""

    @abc.abstractmethod
    def rewrite(self, site: Site, pair: Pair, emit: Emitter) -> None:
        """Make the site's node the second of a chain of two that reads the pair instead."""

    def rows(self, site: Site, dims: Callable[[ir.Value], Dims | None]) -> int | None:
        """How many vectors one inference maps, from concrete shapes; None if not known."""
        shape = dims(site.node.outputs[0])
        if shape is None or any(d is None for d in shape):
            return None
        return math.prod(d for d in shape if d is not None) // max(site.n, 1)

    indices: ClassVar[bool] = False
    """Whether the activation holds row numbers, that is one-hot vectors."""

    def activation(self, site: Site) -> ir.Value | None:
        """The value whose vectors the map multiplies."""
        index = 1 - site.index
        return site.node.inputs[index] if index < len(site.node.inputs) else None

    def vectors(self, site: Site, array: Array) -> Array:
        """The vectors that the map multiplies, from its activation as it was run.

        Args:
            site: the site.
            array: the activation.

        Returns:
            shape [e, N, m], e the site's slices; for ``indices`` the row numbers, shape [1, N].
        """
        return array.reshape(1, -1, site.m)

    def reading(self, site: Site) -> Hashable:
        """Equal for two sites of one activation if `vectors` gives the same for both."""
        return ("rows", site.m)

    def mapped(self, _site: Site, _constants: Constants, /) -> Callable[[Array], Array] | None:
        """How to read the rows ``x·W`` off the node's output, in the order of `vectors`.

        Args:
            _site: the site.
            _constants: resolver of the constants that the node adds.

        Returns:
            a function from the node's output to an array [N, n]; None where the form does not
            know one, or where what the node adds is no constant.
        """
        return None

    def bias(self, _site: Site, _constants: Constants, /) -> Constant | None:
        """The constant of n elements that is added to every row of ``x·W``, by the node or behind.

        Args:
            _site: the site.
            _constants: resolver of the model's constants.

        Returns:
            None where there is none, or where what is added is something else.
        """
        return None

    def cost(self, site: Site, dims: Callable[[ir.Value], Dims | None]) -> Cost | None:
        """What the map costs, from concrete shapes; None if they are not known."""
        rows = self.rows(site, dims)
        if rows is None:
            return None
        return Cost(rows * site.m * site.n, rows * site.m, rows * site.n)

    def site(
        self, node: ir.Node, index: int, operand: Constant, matrix: Constant
    ) -> Site | Refusal:
        """A site of this form, unless the constant's type rules it out."""
        if operand.dtype not in FLOATS or matrix.tensor.dtype not in FLOATS:
            return Refusal.because(
                operand,
                f"{operand.name} has type {operand.dtype.name.lower()}; only float16, bfloat16, "
                "float32 and float64 weights are factored",
            )
        return Site(node, self, index, operand, matrix)
