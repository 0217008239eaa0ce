"""Adapters: what fine-tuning left beside a weight, one linear map together with it.

``X·W + s·((X·A)·B) + c  ->  X·(W + s·A·B) + c``        all of W, A, B, s constant

The scale s, one number or one for each column, may stand before A, between A and B or behind B, as
a Mul, a Div or the α of a Gemm.  Biases may stand anywhere; those of the adapter are added up.
The products are MatMul, Gemm or Einsum of rows with a matrix, the Add has its operands in either
order, and several adapters may follow each other.  Identity, Cast between floats, and Dropout
(which does nothing in inference) are passed over.  The sum takes the place of W: three products
are one, and whatever is done to a linear map is done to all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from onnx_lowrank.graph.constant import Constant
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.graph.elements import put_elements
from onnx_lowrank.graph.names import Names
from onnx_lowrank.graph.spool import Spool
from onnx_lowrank.graph.walk import attribute, float_attribute, node_name, operator
from onnx_lowrank.maps.emit import Storage
from onnx_lowrank.maps.forms import Form, Site
from onnx_lowrank.maps.rewrite import remove_unread
from onnx_lowrank.maps.swapped import PRODUCTS, passed_over
from onnx_lowrank.numerics.arrays import Array

__all__ = ["Merged", "merge_adapters"]

_LONGEST = 12  # steps of an adapter


@dataclass(frozen=True, eq=False)
class Merged:
    """What became of the adapters of a model.

    Attributes:
        nodes: product with the weight that an adapter was added to -> how many elements the
            adapter had.
        left: name of such a product -> why its adapter stays beside it.
    """

    nodes: Mapping[ir.Node, int] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _Product:
    """``α·X·W + β·c``, where rows of X are multiplied with a matrix."""

    site: Site
    x: ir.Value
    scale: float
    bias: Constant | None
    beta: float


@dataclass(frozen=True, eq=False)
class _Step:
    """One step of an adapter: times a matrix, times a scale, or plus a bias."""

    kind: str
    array: Callable[[], Array]


@dataclass(frozen=True, eq=False)
class _Adapter:
    """What is added to a product.

    Attributes:
        base: the product with W.
        total: the Add.
        side: which operand of it is the adapter's.
        steps: from X to that operand.
        nodes: of the adapter.
        elements: of its matrices.
    """

    base: _Product
    total: ir.Node
    side: int
    steps: tuple[_Step, ...]
    nodes: tuple[ir.Node, ...]
    elements: int

    def change(self) -> tuple[Array, Array]:
        """``s·A·B``, shape [m, n], and what the adapter adds to every row, shape [n]."""
        matrix: Array | None = None
        scale: Array = np.ones((), np.float64)
        shift: Array = np.zeros((), np.float64)
        for step in self.steps:
            array = step.array().astype(np.float64)
            if step.kind == "matrix":
                shift = np.zeros(array.shape[1]) if matrix is None else shift @ array
                matrix = scale * array if matrix is None else matrix @ array
            elif matrix is None:
                scale = scale * array.reshape(())
            elif step.kind == "scale":
                matrix, shift = matrix * array, shift * array
            else:
                shift = shift + array
        assert matrix is not None
        return matrix, shift


def merge_adapters(
    model: ir.Model,
    constants: Constants,
    forms: Iterable[Form],
    spool: Spool,
    stays: Callable[[ir.Node, Sequence[ir.Node]], str | None] = lambda *_: None,
) -> Merged:
    """Add every adapter of the main graph to the weight that it stands beside, in place.

    The node of the product with W and its weight keep their names.

    Args:
        model: the model; its graph is changed.
        constants: resolver of its constants.
        forms: those that are chosen: products of others are left without a word.
        spool: where the sums wait until they are saved.
        stays: asked with the node of the product and those of the adapter why they are left.
    """
    chosen = {form.name: form for form in forms}
    nodes: dict[ir.Node, int] = {}
    left: dict[str, str] = {}
    storage = Storage(model, Names(model), spool)
    for node in list(model.graph):
        if node.graph is None or operator(node) != ("", "Add"):  # it went with another one
            continue
        found = _adapter(node, constants, chosen)
        if found is None:
            continue
        base = found.base.site.node
        why = _left(found, constants) or stays(base, found.nodes)
        if why is not None:
            left[node_name(base)] = why
            continue
        _merge(found, spool, storage)
        nodes[base] = nodes.get(base, 0) + found.elements
    return Merged(nodes, left)


def _left(adapter: _Adapter, constants: Constants) -> str | None:
    """Why an adapter cannot be added to its weight."""
    site = adapter.base.site
    root = site.operand.root
    readers = [node for node, _ in constants.readers(root)]
    if len(readers) > 1 or root.is_graph_output():
        return f"{site.operand.name} is also read by others, the sum would stand beside it"
    if root.is_graph_input():
        return f"{site.operand.name} is an input"
    return None


def _merge(adapter: _Adapter, spool: Spool, storage: Storage) -> None:
    base, total = adapter.base, adapter.total
    matrix = base.site.matrix
    change, shift = adapter.change()
    own = matrix.numpy()
    merged = (own.astype(np.float64) + change[None] / base.scale).astype(own.dtype)
    put_elements(matrix.root, np.ascontiguousarray(matrix.layout.inverse().apply(merged)), spool)
    kept, gone = total.inputs[1 - adapter.side], total.inputs[adapter.side]
    graph, output = total.graph, total.outputs[0]
    assert kept is not None
    assert gone is not None
    assert isinstance(graph, ir.Graph)
    if shift.any():
        array = shift.astype(ir.DataType.numpy(base.site.operand.dtype))
        wanted = f"{node_name(total)}.adapter_bias"
        bias = storage.store(graph, array, wanted, in_node=matrix.root.producer() is not None)
        total.replace_input_with(adapter.side, bias)
    else:
        # What gives the sum now has the name, type and shape of the sum.
        name, kind, shape = output.name, output.type, output.shape
        output.name = None
        output.replace_all_uses_with(kept, replace_graph_outputs=True)
        graph.remove(total, safe=True)
        kept.name = name
        kept.type, kept.shape = kind or kept.type, shape or kept.shape
        kept.metadata_props.update(output.metadata_props)
    _remove_unread(gone)


def _remove_unread(value: ir.Value) -> None:
    """Remove what gives a value, and all that only it reads, where nothing reads the value."""
    if value.uses() or value.is_graph_output():
        return
    node = value.producer()
    if node is None or node.op_type == "Constant":
        if node is not None or value.is_initializer():
            remove_unread(value)
        return
    if node.graph is None or any(v.uses() or v.is_graph_output() for v in node.outputs):
        return
    read = [other for other in node.inputs if other is not None]
    node.graph.remove(node, safe=True)
    for other in read:
        _remove_unread(other)


def _adapter(total: ir.Node, constants: Constants, chosen: Mapping[str, Form]) -> _Adapter | None:
    """The adapter whose sum with its product an Add gives; None where there is none."""
    for side in (0, 1):
        base = _base(total.inputs[1 - side], constants, chosen)
        value = total.inputs[side]
        if base is None or value is None or value is total.inputs[1 - side]:
            continue
        kept, whole = total.inputs[1 - side], total.outputs[0]
        shapes = None if kept is None else kept.shape, whole.shape
        if shapes[0] is not None and shapes[1] is not None and len(shapes[0]) != len(shapes[1]):
            continue  # a scale or a bias of the adapter adds axes
        walked = _walked(value, base, constants, chosen)
        if walked is not None:
            steps, nodes, elements = walked
            return _Adapter(base, total, side, steps, nodes, elements)
    return None


def _base(
    value: ir.Value | None, constants: Constants, chosen: Mapping[str, Form]
) -> _Product | None:
    """The product with W that a value is, but for biases."""
    for _ in range(_LONGEST):
        node = None if value is None else value.producer()
        if node is None or value is None or not _alone(value):
            return None
        if passed_over(node, value):
            value = node.inputs[0]
            continue
        if operator(node) == ("", "Add"):
            added = [constants.resolve(one) for one in node.inputs]
            if not isinstance(added[0], Constant) and isinstance(added[1], Constant):
                value = node.inputs[0]
            elif isinstance(added[0], Constant) and not isinstance(added[1], Constant):
                value = node.inputs[1]
            else:
                return None
            continue
        found = _product(node, constants, chosen)
        return found if found is not None and found.scale else None
    return None


def _walked(
    value: ir.Value, base: _Product, constants: Constants, chosen: Mapping[str, Form]
) -> tuple[tuple[_Step, ...], tuple[ir.Node, ...], int] | None:
    """From X to a value through two matrices: the steps, their nodes, elements of the matrices."""
    width, products, elements = base.site.n, 0, 0
    steps: list[_Step] = []
    nodes: list[ir.Node] = []
    while value is not base.x or products < 2:
        node = value.producer()
        # The product with A may have other readers: other adapters that share it.
        if node is None or len(nodes) == _LONGEST or not (products or _alone(value)):
            return None
        nodes.append(node)
        if operator(node)[1] in PRODUCTS:
            product = _product(node, constants, chosen)
            if product is None or product.site.n != width or products == 2:
                return None
            products, width = products + 1, product.site.m
            elements += product.site.operand.size
            if product.bias is not None:
                steps.append(_Step("shift", _row(product.bias, product.bias.size, product.beta)))
            matrix, scale = product.site.matrix, product.scale
            steps.append(_Step("matrix", _matrix(matrix, scale)))
            value = product.x
        elif passed_over(node, value):
            assert node.inputs[0] is not None
            value = node.inputs[0]
        else:
            following = _moved(node, width, constants, before=products == 2)
            if following is None:
                return None
            step, value = following
            steps.append(step)
    return tuple(reversed(steps)), tuple(nodes), elements


def _moved(
    node: ir.Node, width: int, constants: Constants, *, before: bool
) -> tuple[_Step, ir.Value] | None:
    """A scale or a bias, and what it is applied to; before A a single scale alone."""
    domain, kind = operator(node)
    if domain or kind not in ("Add", "Mul", "Div") or len(node.inputs) != 2:
        return None
    found = [constants.resolve(value) for value in node.inputs]
    side = next((i for i, one in enumerate(found) if isinstance(one, Constant)), None)
    if side is None or (kind == "Div" and side == 0):
        return None
    constant, other = found[side], node.inputs[1 - side]
    assert isinstance(constant, Constant)
    fits = constant.size == 1 or (constant.size == width and constant.shape[-1:] == (width,))
    if not fits or other is None or (before and (constant.size != 1 or kind == "Add")):
        return None
    row = _row(constant, constant.size, 1.0)
    if kind == "Div":
        return _Step("scale", lambda: 1.0 / row()), other
    return _Step("shift" if kind == "Add" else "scale", row), other


def _matrix(constant: Constant, scale: float) -> Callable[[], Array]:
    """The first of the matrices ``W[1, m, n]``, in double precision and scaled."""
    return lambda: scale * constant.numpy()[0].astype(np.float64)


def _row(constant: Constant, size: int, scale: float) -> Callable[[], Array]:
    """A constant of so many elements as a vector in double precision; a single one as a number."""
    shape = () if size == 1 else (size,)
    return lambda: scale * constant.numpy().astype(np.float64).reshape(shape)


def _product(node: ir.Node, constants: Constants, chosen: Mapping[str, Form]) -> _Product | None:
    """A product of rows with a constant matrix."""
    for form in chosen.values():
        if operator(node) not in form.targets or operator(node)[1] not in PRODUCTS:
            continue
        site = form.match(node, constants)
        if not isinstance(site, Site) or site.index != 1 or site.slices > 1:
            continue
        x = form.activation(site)
        if x is None or len(site.operand.shape) != 2 or not _plain(node):
            continue
        if node.op_type != "Gemm":
            return _Product(site, x, 1.0, None, 0.0)
        scale, beta = (float_attribute(node, name, 1.0) for name in ("alpha", "beta"))
        added = node.inputs[2] if len(node.inputs) > 2 else None
        if added is None or beta == 0.0:
            return _Product(site, x, scale, None, 0.0)
        bias = constants.resolve(added)
        if isinstance(bias, Constant) and bias.size in (1, site.n):
            if bias.size == site.n and bias.shape[-1:] != (site.n,):
                continue  # one number for each row of X
            return _Product(site, x, scale, bias, beta)
    return None


def _plain(node: ir.Node) -> bool:
    """Whether a product takes the rows of its first operand and gives rows."""
    if node.op_type == "Gemm":
        return not attribute(node, "transA", 0)
    if node.op_type != "Einsum":
        return True
    left, arrow, result = node.attributes["equation"].as_string().replace(" ", "").partition("->")
    x, _, w = left.partition(",")
    if not arrow or len(w) != 2 or x[-1:] not in w:
        return False
    return result == x[:-1] + w.replace(x[-1], "")


def _alone(value: ir.Value) -> bool:
    """Whether one node alone reads a value."""
    return len(list(value.uses())) == 1 and not value.is_graph_output()
