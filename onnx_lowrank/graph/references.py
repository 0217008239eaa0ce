"""Attributes by reference: values that a function's nodes take from its call, made plain values.

Inside a function an attribute may name one of the function's own attributes (``ref_attr_name``)
in place of a value; such an attribute has no value of its own.  Where all calls agree, the value
takes the place of the reference (`resolve`), and the reference is restored when the model is
written (`written_as_references`).  Where calls differ, the reference stays (`unresolved`): such a
node is left as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import onnx_ir as ir

from onnx_lowrank.graph.walk import all_nodes

__all__ = ["resolve", "restore", "unresolved", "written_as_references"]

_META = "onnx_lowrank.references"
# Not resolved: a weight or a graph would stand in the model twice.
_LARGE = (
    ir.AttributeType.TENSOR,
    ir.AttributeType.TENSORS,
    ir.AttributeType.SPARSE_TENSOR,
    ir.AttributeType.SPARSE_TENSORS,
    ir.AttributeType.GRAPH,
    ir.AttributeType.GRAPHS,
)


def resolve(model: ir.Model) -> None:
    """Give nodes in functions the values of their attributes by reference, in place.

    A reference is resolved where every call of the function gives the same value, or none gives
    one and the function has a default, or neither: the node then has no such attribute.

    Args:
        model: the model; the references are kept in the metadata of the nodes.
    """
    again = True
    while again:  # a call within a function may pass on what that function was given
        again = False
        calls: dict[ir.OperatorIdentifier, list[ir.Node]] = {}
        for node in all_nodes(model):
            if node.op_identifier() in model.functions:
                calls.setdefault(node.op_identifier(), []).append(node)
        for identifier, function in model.functions.items():
            for node in ir.traversal.RecursiveGraphIterator(function):
                for reference in [item for item in node.attributes.values() if item.is_ref()]:
                    if reference.type not in _LARGE:
                        again |= _resolved(node, reference, function, calls.get(identifier, []))


def unresolved(node: ir.Node) -> tuple[str, ...]:
    """Names of a node's attributes whose values only a call of its function knows."""
    return tuple(name for name, item in node.attributes.items() if item.is_ref())


def restore(model: ir.Model) -> None:
    """Put the references back for good, in place: the undoing of `resolve`.

    A node whose attribute got another value since keeps that value.

    Args:
        model: the model, as `resolve` left it.
    """
    _put_back(model)
    for node in all_nodes(model):
        node.meta.pop(_META, None)


@contextmanager
def written_as_references(model: ir.Model) -> Iterator[None]:
    """The model with its references in place, as long as the context lasts.

    Args:
        model: the model, as `resolve` left it.
    """
    changed = _put_back(model)
    try:
        yield
    finally:
        for node, name, own in changed:
            if own is None:
                del node.attributes[name]
            else:
                node.attributes[name] = own


def _put_back(model: ir.Model) -> list[tuple[ir.Node, str, ir.Attr | None]]:
    """Exchange values for the references they are from; what stood there, to undo it."""
    changed = []
    for function in model.functions.values():
        for node in ir.traversal.RecursiveGraphIterator(function):
            for reference, value in node.meta.get(_META, ()):
                own = node.attributes.get(reference.name)
                if (None if own is None else own.value) == value:
                    changed.append((node, reference.name, own))
                    node.attributes[reference.name] = reference
    return changed


def _resolved(
    node: ir.Node, reference: ir.Attr, function: ir.Function, calls: list[ir.Node]
) -> bool:
    """Whether a reference could be replaced by what all calls give."""
    source = reference.ref_attr_name
    assert source is not None
    declared = function.attributes.get(source)
    default = None if declared is None or declared.value is None else declared
    given = [call.attributes.get(source, default) for call in calls]
    if not given or any(item is not None and item.is_ref() for item in given):
        return False
    values = [None if item is None else item.value for item in given]
    kinds = {item.type for item in given if item is not None}
    if any(value != values[0] for value in values) or not kinds <= {reference.type}:
        return False
    kept = node.meta.get(_META, ())
    node.meta[_META] = (*kept, (reference, values[0]))
    if values[0] is None:
        del node.attributes[reference.name]
    else:
        node.attributes[reference.name] = ir.Attr(reference.name, reference.type, values[0])
    return True
