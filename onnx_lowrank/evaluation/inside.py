"""Inside: values inside a model that count as outputs, because the user names them.

What is wanted of a model is not always an output: an encoder is read at its class token, a detector
at its features.  Such values are outputs of the model as long as it is measured, so that nothing
simplifies them away and every comparison sees them.  They are no outputs of the result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx_ir as ir

from onnx_lowrank.errors import InputError, named
from onnx_lowrank.graph.fixed import infer_shapes
from onnx_lowrank.graph.load import LoadedModel
from onnx_lowrank.graph.walk import all_nodes
from onnx_lowrank.phrases import near_names
from onnx_lowrank.runtime.taps import give_out

__all__ = ["giving_out", "inside_note", "taken_back", "values_named"]


def values_named(model: ir.Model, names: Sequence[str]) -> tuple[str, ...]:
    """The values that the user means, each once, without those that are outputs anyway.

    Args:
        model: the model.
        names: of values of its main graph, or of nodes, whose first outputs are meant.

    Raises:
        InputError: a name is neither, or its value is not computed in the main graph.
    """
    if not names:
        return ()
    values = {value.name: value for node in model.graph for value in node.outputs if value.name}
    nodes = {node.name: node for node in model.graph if node.name and node.outputs}
    outputs = {value.name for value in model.graph.outputs}
    found: dict[str, None] = {}
    for name in names:
        value = values.get(name)
        if value is None and name in nodes:
            value = nodes[name].outputs[0]
        why = _unfit(model, name, value)
        if why is not None:
            raise InputError(f"{named('judge_at', name)}: {why}")
        assert value is not None
        assert value.name is not None
        if value.name not in outputs:
            found[value.name] = None
    return tuple(found)


def _unfit(model: ir.Model, name: str, value: ir.Value | None) -> str | None:
    """Why a value cannot count as an output; None where it can."""
    expected = "expected a value that a node of the main graph computes, or such a node; got"
    if value is not None:
        node = value.producer()
        if node is not None and node.op_type == "Constant":
            return f"{expected} a constant"
        if value.type is not None and not isinstance(value.type, ir.TensorType):
            return f"{expected} {value.type}, which is no tensor"
        return None
    if any(given.name == name for given in model.graph.inputs):
        return f"{expected} an input"
    if name in model.graph.initializers:
        return f"{expected} a constant"
    inner = (node for node in all_nodes(model) if node.graph is not model.graph)
    if any(name in (node.name, *(v.name for v in node.outputs)) for node in inner):
        return f"{expected} one inside a subgraph or function"
    return f"the model has no value or node of this name; {near_names(name, _names(model))}"


def _names(model: ir.Model) -> list[str]:
    values = [value.name for node in model.graph for value in node.outputs]
    return [name for name in (*values, *(node.name for node in model.graph)) if name]


def giving_out(source: LoadedModel, names: Sequence[str]) -> LoadedModel:
    """A model that gives values inside out as well, after its own outputs.

    Args:
        source: the model; it is not changed.
        names: as `values_named` answers.

    Returns:
        A model in memory, of the same name and size; the same one without names.
    """
    if not names:
        return source
    model = source.model.clone()
    values = {v.name: v for node in model.graph for v in node.outputs if v.name in names}
    declared = {name: (value.type, value.shape) for name, value in values.items()}
    if any(part is None for parts in declared.values() for part in parts):
        known = model.clone()
        infer_shapes(known)
        for value in (v for node in known.graph for v in node.outputs if v.name in names):
            kind, shape = declared[value.name]
            declared[value.name] = kind or value.type, shape or value.shape
    give_out(model, names)
    for name, (kind, shape) in declared.items():
        # With the sizes, as outputs have them: they tell where an output has the mask's axes.
        values[name].type, values[name].shape = kind, shape
    return dataclasses.replace(source, model=model, path=None)


def taken_back(model: ir.Model, names: Sequence[str], original: ir.Model) -> None:
    """Let values be no outputs any more, in place.

    Args:
        model: what was made of a model that `giving_out` made.
        names: the values.
        original: the model as it was given; what it does not declare of a value is not declared.
    """
    if not names:
        return
    own = [value for value in model.graph.outputs if value.name not in names]
    taken = [value for value in model.graph.outputs if value.name in names]
    del model.graph.outputs[:]
    model.graph.outputs.extend(own)
    before = {v.name: v for node in original.graph for v in node.outputs if v.name in names}
    for value in taken:
        old = before[value.name]
        if old.type is None and old.shape is None:
            value.type = value.shape = None


def inside_note(names: Sequence[str]) -> str:
    """What to say of values that count as outputs."""
    return f"counted as outputs: {', '.join(repr(name) for name in names)} inside the model"
