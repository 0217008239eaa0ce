"""Inner widths: what lies between maps and nothing else reads, so that all may be narrower.

``g(X·A + a)·B``, where g mixes no two of its elements, or none of different heads: fewer elements
between the maps make both of them smaller, and add no node.  There may be several first maps, as
in ``g(X·A, X·U)·B`` of gated units.  The last map is where such maps are found, chosen and
counted; the first ones go with it.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import onnx_ir as ir

from onnx_lowrank.graph.constant import FLOATS, Constant
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.graph.walk import attribute, float_attribute
from onnx_lowrank.maps.emit import Emitter, Pair
from onnx_lowrank.maps.forms.base import Form, Refusal, Site
from onnx_lowrank.maps.forms.gemm import GemmRight
from onnx_lowrank.maps.forms.matmul import MatMulRight
from onnx_lowrank.numerics.arrays import Array

__all__ = ["Inner", "InnerForm", "owned", "plain_map"]

_PLAIN: dict[str, Form] = {"MatMul": MatMulRight(), "Gemm": GemmRight()}


@dataclass(frozen=True, eq=False)
class Inner:
    """The width between maps.

    Attributes:
        firsts: the maps that make it, ``A[l, c·e·m]`` of e heads, c times side by side.
        constants: of c·e·m elements each, that are added or multiplied between the maps.
        between: the nodes between the maps.
        reshapes: those of them whose last size is the width, or that of a head.
        cuts: those of them that take the c parts of one product apart.
        selects: whether elements can only be kept or left out; else those of a head may be mixed.
    """

    firsts: tuple[Site, ...]
    constants: tuple[Constant, ...]
    between: tuple[ir.Node, ...]
    reshapes: tuple[ir.Node, ...] = ()
    cuts: tuple[ir.Node, ...] = ()
    selects: bool = False


class InnerForm(Form):
    """The last of maps with a width between them; it reads rows times a matrix."""

    default = False
    pairs = False

    @abc.abstractmethod
    def inner(self, plain: Site, constants: Constants) -> Inner | str | None:
        """The width in front of a map.

        Args:
            plain: the last map, as a plain product.
            constants: resolver of the model's constants.

        Returns:
            why it stays as it is, where there is one that cannot be narrowed; None without any.
        """

    @abc.abstractmethod
    def heads(self, inner: Inner) -> int:
        """How many parts the width has that are narrowed alike."""

    def match(self, node: ir.Node, constants: Constants) -> Site | Refusal | None:
        """A product of rows with a matrix of its own, with a width in front."""
        plain = plain_map(node, constants)
        inner = None if plain is None else self.inner(plain, constants)
        if plain is None or inner is None:
            return None
        if isinstance(inner, str):
            return Refusal.because(plain.operand, inner)
        count = self.heads(inner)
        matrix = plain.matrix.reshape(count, plain.m // count, plain.n)
        return Site(node, self, plain.index, plain.operand, matrix)

    def width(self, site: Site, constants: Constants) -> Inner:
        """The width in front of a site of this form."""
        plain = plain_map(site.node, constants)
        found = None if plain is None else self.inner(plain, constants)
        assert isinstance(found, Inner)
        return found

    def vectors(self, site: Site, array: Array) -> Array:
        """The rows, by head: shape [e, N, m]."""
        return array.reshape(-1, site.slices, site.m).transpose(1, 0, 2)

    def reading(self, site: Site) -> tuple[object, ...]:
        """The rows, and into how many heads they are cut."""
        return ("rows", site.m) if site.slices == 1 else ("heads", site.slices, site.m)

    def mapped(self, site: Site, constants: Constants) -> Callable[[Array], Array] | None:
        """The rows of what all heads give together."""
        plain = plain_map(site.node, constants)
        return None if plain is None else plain.form.mapped(plain, constants)

    def bias(self, site: Site, constants: Constants) -> Constant | None:
        """What is added to the product."""
        plain = plain_map(site.node, constants)
        return None if plain is None else plain.form.bias(plain, constants)

    def rewrite(self, site: Site, pair: Pair, emit: Emitter) -> None:
        """Never called: both maps keep their nodes (`onnx_lowrank.maps.narrow`)."""
        raise NotImplementedError(f"{self.name}: {site.node.name} keeps its node")


def owned(site: Site, constants: Constants) -> bool:
    """Whether a map is rows times a matrix that its node alone reads, in the main graph."""
    root, graph = site.operand.root, constants.model.graph
    own = [(node, index) for node, index in constants.readers(root)]
    plain = site.node.inputs[site.index] is root
    return (
        plain
        and own == [(site.node, site.index)]
        and site.node.graph is graph
        and site.slices == 1
        and len(site.operand.shape) == 2
        and site.operand.dtype == site.operand.tensor.dtype
        and not attribute(site.node, "transA", 0)
    )


def first_of(value: ir.Value, width: int, constants: Constants) -> Site | None:
    """The map of its own whose product a value is, with nothing scaled; None if it is none such."""
    producer = value.producer()
    site = None if producer is None else plain_map(producer, constants)
    if site is None or site.n != width:
        return None
    scaled = float_attribute(site.node, "alpha", 1.0) != 1.0
    return None if scaled or float_attribute(site.node, "beta", 1.0) != 1.0 else site


def own_row(value: ir.Value | None, width: int, constants: Constants) -> Constant | None:
    """A float constant of as many elements as the width, along the last axis, read once."""
    found = constants.resolve(value)
    if not isinstance(found, Constant) or found.shape[-1:] != (width,) or found.size != width:
        return None
    root = found.root
    plain = root is value and not root.is_graph_output()
    alone = plain and len(list(root.uses())) == 1
    return found if alone and found.dtype in FLOATS and found.dtype == found.tensor.dtype else None


def gemm_row(site: Site, constants: Constants) -> tuple[bool, tuple[Constant, ...]]:
    """Whether what a first map adds itself can be narrowed, and that constant if there is one."""
    added = site.node.inputs[2] if len(site.node.inputs) > 2 else None
    if added is None:
        return True, ()
    row = own_row(added, site.n, constants)
    return row is not None, () if row is None else (row,)


def seen_by(
    firsts: Iterable[ir.Node],
    between: Iterable[ir.Node],
    last: ir.Node,
    graph: ir.Graph | ir.Function,
) -> str | None:
    """Who else sees what lies between; None where only the last node reads it, and once."""
    inside = dict.fromkeys((*firsts, *between))
    for node in inside:
        if node.graph is not graph:
            return "a subgraph"
        for output in node.outputs:
            if output.is_graph_output():
                return "an output of the model"
            for use in output.uses():
                if use.node not in inside and (use.node is not last or use.idx != 0):
                    return "another node"
    return None


def plain_map(node: ir.Node, constants: Constants) -> Site | None:
    """Rows times a matrix that a node alone reads, as a plain product; None if it is none such."""
    form = _PLAIN.get(node.op_type)
    if form is None or node.domain not in ("", "ai.onnx"):
        return None
    found = form.match(node, constants)
    return found if isinstance(found, Site) and owned(found, constants) else None
