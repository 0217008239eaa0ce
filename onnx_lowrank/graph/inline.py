"""Inline: calls of model functions that are given weights, so that these stand in the graph.

A function's body knows a weight that its call gives only by the name of an argument.  Where the
body takes the place of the call, the weight is an ordinary constant of the main graph.  A node
that was put there knows its call, so that a call whose nodes stayed as they were can come back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence

import onnx_ir as ir
import onnx_ir.passes.common as passes

from onnx_lowrank.graph.constant import FLOATS, Constant
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.graph.elements import constant_value
from onnx_lowrank.graph.walk import all_nodes, graph_values, static_shape

__all__ = ["call_of", "given_weights", "inline", "put_back"]

_META = "onnx_lowrank.call"
# The overload that a function has whose one call is inlined next.
_NEXT = "onnx_lowrank.inline"
# Bytes of a body's own constants which may stand in the model once for each call.
_SMALL = 256


def call_of(node: ir.Node) -> str | None:
    """The call that a node was put in place of, by its first output; None where there is none."""
    found = node.meta.get(_META)
    return None if found is None else str(found)


def given_weights(model: ir.Model, constants: Constants) -> list[ir.Node]:
    """The calls of the main graph that give a function weights and can be inlined at no cost.

    That is where a function is called once, or has next to no constants of its own.

    Args:
        model: the model.
        constants: its constants.
    """
    functions = model.functions
    counts = Counter(node.op_identifier() for node in all_nodes(model))
    return [
        node
        for node in model.graph
        if node.op_identifier() in functions
        and _gives_weights(node, constants)
        and (counts[node.op_identifier()] == 1 or _bytes(functions[node.op_identifier()]) <= _SMALL)
        and _fits(model, node, functions[node.op_identifier()])
        and _takes(node, functions[node.op_identifier()])
    ]


def _takes(call: ir.Node, function: ir.Function) -> bool:
    """Whether the attributes of a call are of the types that the nodes of the function read."""
    references = (
        item
        for node in ir.traversal.RecursiveGraphIterator(function)
        for item in node.attributes.values()
        if item.is_ref()
    )
    for item in references:
        given = call.attributes.get(item.ref_attr_name or "")
        if given is not None and not given.is_ref() and given.type != item.type:
            return False
    return True


def inline(model: ir.Model, calls: Collection[ir.Node]) -> None:
    """Put bodies in place of calls, in place.

    A node is named by its call and its name in the function, and has the call's metadata.

    Args:
        model: the model.
        calls: of its main graph, see `given_weights`.
    """
    before = set(_called(model))
    for number, call in enumerate(calls):
        body = model.functions[call.op_identifier()].clone()
        base = call.name or call.outputs[0].name or call.op_type
        for node in ir.traversal.RecursiveGraphIterator(body):
            node.meta[_META] = call_of(call) or call.outputs[0].name
            node.name = f"{base}/{node.name or node.op_type}"
            for value in node.outputs:
                if value.name:
                    value.name = f"{base}/{value.name}"
        call.overload = f"{_NEXT}{number}"
        own = ir.Function(
            call.domain, call.op_type, call.overload, graph=body.graph,
            attributes=list(body.attributes.values()),
        )  # fmt: skip
        model.functions[own.identifier()] = own
    passes.InlinePass(lambda function: function.overload.startswith(_NEXT))(model)
    after = set(_called(model))
    for identifier in before - after:
        model.functions.pop(identifier, None)


def put_back(model: ir.Model, inlined: ir.Model, original: ir.Model) -> None:
    """Let calls stand again whose nodes are as they were, in place.

    Args:
        model: what was made of the next one.
        inlined: a model as `inline` left it.
        original: the model before that.
    """
    before, after = _by_call(inlined), _by_call(model)
    olds = {node.outputs[0].name: node for node in original.graph if node.outputs}
    values = {value.name: value for value in graph_values(model.graph)}
    nodes = {
        call: own
        for call, own in after.items()
        if _same(own, before.get(call, []))
        and all(
            v is None or v.name in values or v.const_value is not None for v in olds[call].inputs
        )
    }
    if not nodes:
        return
    for name, inner in nodes.items():
        old = olds[name]
        for value in old.inputs:
            if value is not None and value.name not in values:  # dropped: the body does not read it
                assert value.const_value is not None
                values[value.name] = constant_value(value.const_value)
                model.graph.register_initializer(values[value.name])
        new = ir.Node(
            *(old.domain, old.op_type),
            [None if value is None else values[value.name] for value in old.inputs],
            list(old.attributes.values()),
            overload=old.overload,
            num_outputs=len(old.outputs),
            name=old.name,
            doc_string=old.doc_string,
            metadata_props=dict(old.metadata_props),
        )
        model.graph.insert_before(inner[0], new)
        for given, value in zip(old.outputs, new.outputs, strict=True):
            current = values[given.name]
            value.type, value.shape = current.type, current.shape
            value.metadata_props.update(given.metadata_props)
            value.meta.update(given.meta)
            current.replace_all_uses_with(value, replace_graph_outputs=True)
            current.name, value.name = None, given.name
            values[given.name] = value
        model.graph.remove(inner, safe=True)
    _functions_back(model, original)
    if nodes.keys() == before.keys():
        model.opset_imports.clear()
        model.opset_imports.update(original.opset_imports)


def _by_call(model: ir.Model) -> dict[str, list[ir.Node]]:
    """The nodes of the main graph that were put in place of each call."""
    found: dict[str, list[ir.Node]] = {}
    for node in model.graph:
        call = call_of(node)
        if call is not None:
            found.setdefault(call, []).append(node)
    return found


def _same(some: Sequence[ir.Node], others: Sequence[ir.Node]) -> bool:
    """Whether nodes of two copies of a model are alike, with the very same constants."""
    return len(some) == len(others) and all(
        node.op_identifier() == other.op_identifier()
        and node.name == other.name
        and _names(node.inputs) == _names(other.inputs)
        and _names(node.outputs) == _names(other.outputs)
        and node.attributes.keys() == other.attributes.keys()
        and all(_alike(item, other.attributes[name]) for name, item in node.attributes.items())
        for node, other in zip(some, others, strict=True)
    )


def _names(values: Sequence[ir.Value | None]) -> list[str | None]:
    return [None if value is None else value.name for value in values]


def _alike(one: ir.Attr, other: ir.Attr) -> bool:
    """Whether two attributes are the same; of a subgraph's nodes, too."""
    if one.type != other.type or one.ref_attr_name != other.ref_attr_name:
        return False
    if one.type == ir.AttributeType.GRAPH and not one.is_ref():
        return _same(list(one.as_graph()), list(other.as_graph()))
    if one.type in (ir.AttributeType.GRAPHS, ir.AttributeType.TENSOR):
        return one.value is other.value
    return bool(one.value == other.value)


def _functions_back(model: ir.Model, original: ir.Model) -> None:
    """Let the functions stand again that are called, in the order that they had."""
    olds = original.clone().functions
    known = {identifier: model.functions.get(identifier, old) for identifier, old in olds.items()}
    before = set(model.functions)
    model.functions.clear()
    model.functions.update(known)
    wanted = before | set(_called(model))
    for identifier in set(known) - wanted:
        del model.functions[identifier]


def _called(model: ir.Model) -> Iterator[ir.OperatorIdentifier]:
    """The functions that the main graph calls, also by way of others."""
    waiting = list(ir.traversal.RecursiveGraphIterator(model.graph))
    seen: set[ir.OperatorIdentifier] = set()
    while waiting:
        identifier = waiting.pop().op_identifier()
        if identifier in model.functions and identifier not in seen:
            seen.add(identifier)
            yield identifier
            waiting += ir.traversal.RecursiveGraphIterator(model.functions[identifier])


def _gives_weights(call: ir.Node, constants: Constants) -> bool:
    for value in call.inputs:
        found = constants.resolve(value)
        if isinstance(found, Constant) and found.dtype in FLOATS and len(found.shape) > 1:
            return True
    return any(
        item.type == ir.AttributeType.TENSOR
        and not item.is_ref()
        and item.as_tensor().dtype in FLOATS
        and len(static_shape(item.as_tensor().shape) or ()) > 1
        for item in call.attributes.values()
    )


def _bytes(function: ir.Function) -> int:
    """Of the tensors in a function's body."""
    return sum(
        item.as_tensor().nbytes
        for node in ir.traversal.RecursiveGraphIterator(function)
        for item in node.attributes.values()
        if item.type == ir.AttributeType.TENSOR and not item.is_ref()
    )


def _fits(model: ir.Model, call: ir.Node, function: ir.Function) -> bool:
    """Whether the body can take the place of the call, with all names as they are."""
    graphs = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    return (
        len(call.outputs) == len(function.outputs) == len(set(function.outputs))
        and len(call.inputs) <= len(function.inputs)
        and all(value.name for value in call.outputs)
        and all(value.producer() is not None for value in function.outputs)
        and all(item.type not in graphs for item in call.attributes.values())
        and all(
            model.opset_imports.get(domain, version) == version
            for domain, version in function.opset_imports.items()
        )
    )
