"""Raise the opset of a model, in place and only where nothing changes its meaning.

An operator that was only given more types, or attributes and inputs that may be left out, means
the same in the newer opset.  Others are written anew by the rules of
`onnx_lowrank.graph.opset_rules`; any other change is an error that names the node.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, MutableMapping

import onnx
import onnx.defs
import onnx_ir as ir

from onnx_lowrank.errors import InputError
from onnx_lowrank.graph.opset_rules import RULES, Editor, Rule
from onnx_lowrank.graph.walk import node_name

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
                raise InputError(
                    f"node {node_name(node)!r}: {node.op_type} of opset {version} {why}; expected "
                    f"a model of opset {opset}, export it again"
                )
        edit = Editor(model)
        for version, node in nodes:
            for rule in _rules(node.op_type, version, opset):
                rule.apply(node, edit)
        for own, _ in owners:
            key = "ai.onnx" if "ai.onnx" in own else ""
            own[key] = max(own.get(key, opset), opset)
    model.ir_version = max(model.ir_version or 0, needed)
    return None if current >= opset else f"opset {current} was raised to {opset}"


def _owners(model: ir.Model) -> Iterator[tuple[MutableMapping[str, int], list[ir.Node]]]:
    """What the main graph and each function import, and their nodes of ONNX itself."""
    bodies: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for body in bodies:
        nodes = ir.traversal.RecursiveGraphIterator(body)
        yield body.opset_imports, [node for node in nodes if node.domain in ("", "ai.onnx")]


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
        return f"is older than opset {_OLDEST}"
    op_type, given = node.op_type, set(node.attributes)
    for rule in _rules(op_type, current, opset):
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
    for name, attribute in before.attributes.items():
        newer = after.attributes.get(name)
        if newer is None and name not in given:
            continue
        if newer is None or newer.type != attribute.type:
            return f"has an attribute {name!r} that opset {opset} has not"
        # Also where the node says it: what is new as a default replaced what was there, as a name.
        if newer.default_value != attribute.default_value:
            return f"has another default of {name!r} in opset {opset}"
    if any(
        new.required and name not in before.attributes for name, new in after.attributes.items()
    ):
        return f"has an attribute in opset {opset} that it has not"
    names = [item.name for item in before.inputs], [item.name for item in after.inputs]
    if len(names[0]) > len(names[1]) or after.min_input > before.min_input:
        return f"has other inputs in opset {opset}"
    return None
