"""Switches: products of a model that round their inputs and results in some runs.

Where products may round their inputs a switch before each of them does the same with the operators
that are written, and where they round their results another one behind it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from onnx_lowrank.fitting.static import StaticSteps
from onnx_lowrank.graph.names import Names
from onnx_lowrank.graph.opset import raise_opset
from onnx_lowrank.maps.find import Group
from onnx_lowrank.maps.formats import Format
from onnx_lowrank.maps.static import ByteStep

__all__ = ["switched"]


def switched(
    model: ir.Model, copy: ir.Model, groups: Mapping[Group, Format], static: StaticSteps | None
) -> dict[Group, str]:
    """Put switches around the products of groups, in a copy of the model.

    Args:
        model: as it is.
        copy: of it, which is changed.
        groups: whose products may round, and in which format.
        static: steps of what is rounded with ranges that are known before; None without any.

    Returns:
        group -> the input that turns its switches on.
    """
    if not groups:
        return {}
    node_of = dict(zip(model.graph, copy.graph, strict=True))
    raise_opset(copy, max(form.opset for form in groups.values()))
    names, switches = Names(copy), {}
    for group, form in groups.items():
        switch = ir.Value(
            name=names.new(f"{group.matrix.name}.rounds"),
            type=ir.TensorType(ir.DataType.BOOL),
            shape=ir.Shape([]),
        )
        copy.graph.inputs.append(switch)
        switches[group] = switch.name or ""
        for member in group.members:
            node = node_of[member.site.node]
            x, y = node.inputs[0], node.outputs[0]
            assert x is not None
            steps = static.steps if form.static and static is not None else {}
            chosen = _switch(switch, x, steps.get(x.name or ""), names)
            copy.graph.insert_before(node, chosen)
            node.replace_input_with(0, chosen.outputs[0])
            if form.static:
                _behind(node, y, _switch(switch, y, steps.get(y.name or ""), names), names)
    return switches


def _switch(switch: ir.Value, value: ir.Value, step: ByteStep | None, names: Names) -> ir.Node:
    """A node that gives a value rounded, or as it is."""
    chosen = ir.Node("", "If", [switch], _branches(value, step, names), name=names.new("rounds"))
    result = chosen.outputs[0]
    result.name, result.type, result.shape = names.new("rounded"), value.type, value.shape
    return chosen


def _behind(node: ir.Node, y: ir.Value, chosen: ir.Node, names: Names) -> None:
    """Let all that reads what a node gives read another node's output in its place and name."""
    graph, result = node.graph, chosen.outputs[0]
    assert graph is not None
    graph.insert_after(node, chosen)
    inside = {own for attr in chosen.attributes.values() for own in attr.as_graph()}
    for use in list(y.uses()):
        if use.node not in inside:
            use.node.replace_input_with(use.idx, result)
    for index, output in enumerate(graph.outputs):
        if output is y:
            graph.outputs[index] = result
    result.name, y.name = y.name, names.new("exact")


def _branches(x: ir.Value, step: ByteStep | None, names: Names) -> list[ir.Attr]:
    """What an If gives: a value as integers stand for it, with a known step or not; or itself."""
    if step is None:
        quantized = ir.Node("", "DynamicQuantizeLinear", [x], num_outputs=3)
        integers = [quantized, ir.Node("", "DequantizeLinear", list(quantized.outputs))]
    else:
        arrays = np.array(step.scale, np.float32), np.array(step.zero, np.uint8)
        known = [
            ir.Node("", "Constant", [], [ir.AttrTensor("value", ir.tensor(array))])
            for array in arrays
        ]
        step_of = [node.outputs[0] for node in known]
        quantized = ir.Node("", "QuantizeLinear", [x, *step_of])
        again = ir.Node("", "DequantizeLinear", [quantized.outputs[0], *step_of])
        integers = [*known, quantized, again]
    branches = {"then_branch": integers, "else_branch": [ir.Node("", "Identity", [x])]}
    found = []
    for name, nodes in branches.items():
        for value in (value for node in nodes for value in node.outputs):
            value.name = names.new("rounding")
        result = nodes[-1].outputs[0]
        result.type, result.shape = ir.TensorType(ir.DataType.FLOAT), x.shape
        found.append(ir.AttrGraph(name, ir.Graph([], [result], nodes=nodes, name=name)))
    return found
