"""Raise the opset of a model, in place and only where nothing changes its meaning.

An operator that was only given more types, or attributes and inputs that may be left out, means
the same in the newer opset.  Those whose axes became an input are rewritten; any other change is
an error that names the node.
"""

from __future__ import annotations

import onnx
import onnx.defs
import onnx_ir as ir

from onnx_lowrank.errors import InputError
from onnx_lowrank.graph.names import Names
from onnx_lowrank.graph.walk import all_nodes, node_name

__all__ = ["raise_opset"]

# Older opsets have Softmax, Squeeze and others with another meaning.
_OLDEST = 13
# A change of meaning that the signature does not show.
_CHANGED = {"GroupNormalization": 21}
# Operators whose attribute `axes` became the second input, and the opset of that.
_AXES = 18


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
    imports = [model.opset_imports, *(f.opset_imports for f in model.functions.values())]
    current = min(own.get("", own.get("ai.onnx", opset)) for own in imports)
    needed = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])
    if current < opset:
        nodes = [node for node in all_nodes(model) if node.domain in ("", "ai.onnx")]
        for node in nodes:
            why = _differs(node, current, opset)
            if why is not None:
                raise InputError(
                    f"node {node_name(node)!r}: {node.op_type} of opset {current} {why}; expected "
                    f"a model of opset {opset}, export it again"
                )
        names = Names(model)
        for node in nodes:
            if _moved_axes(node, current, opset):
                _move_axes(node, names)
            elif _splits(node, current, opset):
                node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(node.outputs))
        for own in imports:
            key = "ai.onnx" if "ai.onnx" in own else ""
            own[key] = max(own.get(key, opset), opset)
    model.ir_version = max(model.ir_version or 0, needed)
    return None if current >= opset else f"opset {current} was raised to {opset}"


def _differs(node: ir.Node, current: int, opset: int) -> str | None:
    """What changed of an operator between opsets, as the end of a sentence; None if nothing."""
    if current < _OLDEST:
        return f"is older than opset {_OLDEST}"
    try:
        before = onnx.defs.get_schema(node.op_type, current, "")
        after = onnx.defs.get_schema(node.op_type, opset, "")
    except onnx.defs.SchemaError:
        return "is not known to this version of onnx"
    if after.deprecated:
        return f"is gone in opset {opset}"
    if before.since_version < _CHANGED.get(node.op_type, 0) <= after.since_version:
        return f"means something else in opset {opset}"
    if _moved_axes(node, current, opset) or _splits(node, current, opset):
        return None
    for name, attribute in before.attributes.items():
        newer = after.attributes.get(name)
        if newer is None and name not in node.attributes:
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


def _moved_axes(node: ir.Node, current: int, opset: int) -> bool:
    """Whether the axes of a Reduce operator become an input on the way."""
    reduces = node.op_type.startswith("Reduce") and node.op_type != "ReduceSum"
    return reduces and current < _AXES <= opset


def _move_axes(node: ir.Node, names: Names) -> None:
    axes = node.attributes.pop("axes", None)
    if axes is None:
        return
    name = names.new(f"{node_name(node)}.axes")
    attribute = ir.AttrInt64s("value_ints", axes.as_ints())
    constant = ir.Node("", "Constant", [], [attribute], name=name)
    value = constant.outputs[0]
    value.name, value.dtype = names.new(f"{name}_out"), ir.DataType.INT64
    value.shape = ir.Shape([len(axes.as_ints())])
    graph = node.graph
    assert graph is not None
    graph.insert_before(node, constant)
    node.resize_inputs(2)
    node.replace_input_with(1, value)


def _splits(node: ir.Node, current: int, opset: int) -> bool:
    """Whether a Split has to say its number of outputs from now on."""
    given = len(node.inputs) > 1 and node.inputs[1] is not None
    return node.op_type == "Split" and current < _AXES <= opset and not given
