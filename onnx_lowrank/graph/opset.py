"""Raise the opset of a model, in place and only where nothing changes its meaning.

An operator that was only given more types, or attributes and inputs that may be left out, means
the same in the newer opset.  Others are written anew by the rules of
`onnx_lowrank.graph.opset_rules`; any other change is an error that names the node.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence

import onnx
import onnx.defs
import onnx_ir as ir

from onnx_lowrank.errors import InputError
from onnx_lowrank.graph.fixed import infer_shapes
from onnx_lowrank.graph.opset_rules import FLATTENED_BELOW, FLATTENING, RULES, Editor, Rule
from onnx_lowrank.graph.references import unresolved
from onnx_lowrank.graph.walk import attribute, graph_values, node_name

__all__ = ["raise_opset"]

# Below it operators stretch their inputs in another way.
_OLDEST = 7
# A change of meaning that the signature does not show.
_CHANGED = {"GroupNormalization": 21}


def raise_opset(model: ir.Model, opset: int) -> str | None:
    """Import a newer opset of ONNX's own operators, with the IR version that it asks for.

    Args:
        model: the model; it is changed, unless an error is raised.
        opset: what is needed at least.

    Returns:
        What was done, for the user; None where the model is new enough.

    Raises:
        InputError: an operator means something else in the newer opset.
    """
    owners = list(_owners(model))
    current = min(_version(own, opset) for own, _ in owners)
    needed = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])
    if current < opset:
        nodes = [(_version(own, opset), node) for own, nodes in owners for node in nodes]
        for version, node in nodes:
            why = _differs(node, version, opset)
            if why is not None:
                enough = opset if version >= _OLDEST else f"{_OLDEST} or later"
                raise InputError(
                    f"node {node_name(node)!r}: {node.op_type} of opset {version} {why}; expected "
                    f"a model of opset {enough}, export it again"
                )
        inferred = _inferred(model, opset)
        _say_last_axes(model, nodes, inferred)
        _rewrite(model, opset)
        wrong = _undeclared(model, inferred)
    model.ir_version = max(model.ir_version or 0, needed)
    if current >= opset:
        return None
    return "; ".join([f"opset {current} was raised to {opset}", *wrong])


def _owners(model: ir.Model) -> Iterator[tuple[MutableMapping[str, int], list[ir.Node]]]:
    """What the main graph and each function import, and their nodes of ONNX itself."""
    bodies: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for body in bodies:
        nodes = ir.traversal.RecursiveGraphIterator(body)
        yield body.opset_imports, [node for node in nodes if node.domain in ("", "ai.onnx")]


def _rewrite(model: ir.Model, opset: int) -> None:
    """Write every operator anew that has rules, and import the opset."""
    owners, edit = list(_owners(model)), Editor(model)
    for own, nodes in owners:
        version = _version(own, opset)
        for node in nodes:
            for rule in _rules(node.op_type, version, opset):
                rule.apply(node, edit)
    for own, _ in owners:
        key = "ai.onnx" if "ai.onnx" in own else ""
        own[key] = max(own.get(key, opset), opset)


def _inferred(model: ir.Model, opset: int) -> Mapping[str | None, ir.Shape | None]:
    """Shapes of the values of the main graph by name, as far as the newer opset tells them."""
    copy = model.clone()
    for value in copy.graph.outputs:
        value.shape = None
    _rewrite(copy, opset)
    infer_shapes(copy)
    return {value.name: value.shape for value in graph_values(copy.graph)}


def _say_last_axes(
    model: ir.Model,
    nodes: Sequence[tuple[int, ir.Node]],
    inferred: Mapping[str | None, ir.Shape | None],
) -> None:
    """Write the last axis as -1 where operators flatten their input, which is not needed then."""
    for version, node in nodes:
        if version >= FLATTENED_BELOW or node.op_type not in FLATTENING:
            continue
        x = node.inputs[0]
        outer = node.graph is model.graph and x is not None
        shape = inferred.get(x.name) if outer and x is not None and x.shape is None else None
        if shape is not None and attribute(node, "axis", 1) == len(shape) - 1:
            node.attributes["axis"] = ir.AttrInt64("axis", -1)


def _undeclared(model: ir.Model, inferred: Mapping[str | None, ir.Shape | None]) -> list[str]:
    """Correct outputs that declare another number of axes than they have; what was corrected.

    In the older opset nothing could tell that it is wrong, as some exporters leave it.
    """
    said = []
    for value in model.graph.outputs:
        found = inferred.get(value.name)
        if found is not None and value.shape is not None and len(found) != len(value.shape):
            said.append(
                f"output {value.name!r} declares {len(value.shape)} axes and has {len(found)}, "
                "which it declares now"
            )
            value.shape = ir.Shape([None] * len(found))
    return said


def _version(imports: MutableMapping[str, int], opset: int) -> int:
    """Which opset a graph or function imports; the wanted one where it imports none."""
    return imports.get("", imports.get("ai.onnx", opset))


def _rules(op_type: str, current: int, opset: int) -> Iterator[Rule]:
    """The rules for an operator on its way from one opset to another, in their order."""
    while True:
        rule = next((r for r in RULES.get(op_type, ()) if current < r.since <= opset), None)
        if rule is None:
            return
        yield rule
        op_type, current = rule.becomes or op_type, rule.since


def _differs(node: ir.Node, current: int, opset: int) -> str | None:
    """What changed of an operator between opsets, as the end of a sentence; None if nothing."""
    if current < _OLDEST:
        return "is too old to be raised"
    op_type, given = node.op_type, set(node.attributes)
    for rule in _rules(op_type, current, opset):
        if open_ := unresolved(node):
            return f"has {', '.join(open_)} from the call of the function around it"
        why = _unlike(op_type, given, current, rule.since - 1) or rule.refused(node)
        if why is not None:
            return why
        op_type, current = rule.becomes or op_type, rule.since
        given -= set(rule.attributes)
    return _unlike(op_type, given, current, opset)


def _unlike(op_type: str, given: Collection[str], current: int, opset: int) -> str | None:
    """What changed of an operator between opsets without a rule, in the same way.

    Args:
        op_type: the operator.
        given: names of the attributes that its node has.
        current: the opset of the node.
        opset: the newer one.
    """
    try:
        before = onnx.defs.get_schema(op_type, current, "")
        after = onnx.defs.get_schema(op_type, opset, "")
    except onnx.defs.SchemaError:
        return "is not known to this version of onnx"
    if after.deprecated:
        return f"is gone in opset {opset}"
    if before.since_version < _CHANGED.get(op_type, 0) <= after.since_version:
        return f"means something else in opset {opset}"
    for name, old in before.attributes.items():
        newer = after.attributes.get(name)
        unsaid = old.default_value.type == onnx.AttributeProto.UNDEFINED
        if newer is None and unsaid and name not in given:
            continue
        if newer is None or newer.type != old.type:
            return f"has an attribute {name!r} that opset {opset} has not"
        # Also where the node says it: what is new as a default replaced what was there, as a name.
        if newer.default_value != old.default_value:
            return f"has another default of {name!r} in opset {opset}"
    if any(
        new.required and name not in before.attributes for name, new in after.attributes.items()
    ):
        return f"has an attribute in opset {opset} that it has not"
    names = [item.name for item in before.inputs], [item.name for item in after.inputs]
    if len(names[0]) > len(names[1]) or after.min_input > before.min_input:
        return f"has other inputs in opset {opset}"
    return None
