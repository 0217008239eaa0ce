"""Swapped: products with an adapter beside them whose weights are fed, which are left as they are.

``X·W + s·((X·A)·B)``        with A or B an input of the graph

A runtime may feed another adapter with every run.  Each was trained beside W as it is, and what an
error of W does to it cannot be known.  (Adapters of constants: `onnx_lowrank.maps.adapters`.)
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from onnx_lowrank.graph.constant import FLOATS, Constant
from onnx_lowrank.graph.constants import Constants, in_chain
from onnx_lowrank.graph.walk import attribute, only_sum, operator
from onnx_lowrank.maps.forms import Site

__all__ = ["PRODUCTS", "passed_over", "swapped"]

PRODUCTS = frozenset({"Einsum", "Gemm", "MatMul"})
"""Operators of which adapters are made."""
_LONGEST = 12  # steps of an adapter


def passed_over(node: ir.Node, value: ir.Value) -> bool:
    """Whether a node gives its first input, but for rounding."""
    domain, kind = operator(node)
    if domain:
        return False
    if kind == "Identity":
        return True
    if kind == "Cast":
        source = node.inputs[0]
        to = ir.DataType(attribute(node, "to", 0)) if attribute(node, "to", 0) else None
        return to in FLOATS and source is not None and source.dtype in FLOATS
    # From opset 12 on its mode is an input, which is absent or false in inference.
    trains = len(node.inputs) > 2 and node.inputs[2] is not None
    return kind == "Dropout" and value is node.outputs[0] and not trains


def swapped(sites: Iterable[Site], constants: Constants) -> dict[ir.Node, str]:
    """Products beside whose weight an adapter stands that is fed, and why they are left.

    Args:
        sites: the linear maps of a model.
        constants: resolver of its constants.
    """
    found = {}
    for site in sites:
        node = site.node
        if operator(node)[1] not in PRODUCTS or site.index != 1 or not node.outputs:
            continue
        fed = _fed(node.outputs[0], site, constants)
        if fed:
            names = " and ".join(repr(name) for name in fed)
            found[node] = (
                f"an adapter stands beside it whose weights are given as input, {names}: it was "
                "trained beside this weight and may be swapped at run time; export the model with "
                "its adapter merged to factor both"
            )
    return found


def _fed(output: ir.Value, site: Site, constants: Constants) -> list[str]:
    """Inputs that hold the adapter that is added to a product; none where there is none such."""
    x = site.form.activation(site)
    for _ in range(_LONGEST):
        behind = only_sum(output)
        if behind is None or x is None:
            return []
        total, other = behind
        if not isinstance(constants.resolve(other), Constant):
            return _inputs_of(other, x, constants)
        output = total.outputs[0]
    return []


def _inputs_of(value: ir.Value, x: ir.Value, constants: Constants) -> list[str]:
    """The inputs that a branch of two products from x multiplies with; none of another branch."""
    names: list[str] = []
    products = 0
    for _ in range(_LONGEST):
        if value is x:
            return names[::-1] if products == 2 else []
        node = value.producer()
        if node is None or not node.inputs or node.inputs[0] is None:
            return []
        kind = operator(node)[1]
        if kind in PRODUCTS and len(node.inputs) > 1:
            products += 1
            name = _input_name(node.inputs[1])
            if name is None and not isinstance(constants.resolve(node.inputs[1]), Constant):
                return []
            names += [] if name is None else [name]
            value = node.inputs[0]
        elif kind in ("Mul", "Div"):
            # The scale is what is constant or fed.
            a, b = node.inputs
            first = a is not None and (_input_name(a) or constants.resolve(a))
            value = b if first and a is not x and b is not None else node.inputs[0]
        elif passed_over(node, value):
            value = node.inputs[0]
        else:
            return []
    return []


def _input_name(value: ir.Value | None) -> str | None:
    """The input of the graph that a value is read from, also through relabelled elements."""
    while value is not None:
        if value.is_graph_input():
            return value.name
        node = value.producer()
        if node is None or not (in_chain(node, 0) or node.op_type == "Gather"):
            return None
        value = node.inputs[0]
    return None
