"""Values inside a model, read off a copy that gives them out.

`tapped` gives the values themselves, for any sample; `look` gives their shapes in one run, and
their contents where these are asked for.  Static shape inference gives up on the reshapes that
exporters write for dynamic shapes, so `look` runs the model once with a Shape node behind every
value that matters, or an Identity behind those whose contents matter.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from onnx_lowrank.graph.types_aside import unread
from onnx_lowrank.numerics.arrays import Array, Feed

__all__ = [
    "OpenModel",
    "Run",
    "Runner",
    "Seen",
    "give_out",
    "look",
    "tapped",
    "tapped_model",
]

Run = Callable[[ir.Model], Feed]
"""Runs a model on one sample and gives its outputs by name."""
Runner = Callable[[Feed], Feed]
"""Runs one model on a sample and gives its outputs by name."""
OpenModel = Callable[[ir.Model], Runner]
"""Makes a runner of a model."""


@dataclass(frozen=True, eq=False)
class Seen:
    """Values of the main graph in one run.

    Attributes:
        shapes: value -> sizes.
        contents: value -> elements, of those that were asked for.
    """

    shapes: Mapping[str, tuple[int, ...]]
    contents: Feed


def look(
    model: ir.Model, names: Collection[str], run: Run, contents: Collection[str] = frozenset()
) -> Seen:
    """Run a model once and note the shapes of some of its values.

    Args:
        model: the model; it is not changed.
        names: values of its main graph; an initializer's shape is known without a run.
        run: runs a model on one sample.
        contents: those whose elements are wanted too.

    Raises:
        InputError: from ``run``.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    probes: dict[str, str] = {}
    copy, found = _without_outputs(model, names)
    for name, value in found.items():
        if value.const_value is not None and value.is_initializer():
            shapes[name] = tuple(int(d) for d in value.const_value.shape)  # type: ignore[arg-type]
            continue
        if unread(value):  # a map has no shape
            continue
        whole = name in contents
        label = f"lowrank_probe_{len(probes)}"
        probe = ir.Node("", "Identity" if whole else "Shape", [value], name=label)
        output = probe.outputs[0]
        output.name = f"{label}_out"
        if not whole:
            output.dtype, output.shape = ir.DataType.INT64, ir.Shape([None])
        elif value.dtype is not None:  # else ONNX Runtime infers it
            output.dtype = value.dtype
        copy.graph.append(probe)
        copy.graph.outputs.append(output)
        probes[output.name] = name
    elements: dict[str, Array] = {}
    if probes:
        for label, array in run(copy).items():
            name = probes[label]
            if name in contents:
                elements[name] = array
                shapes[name] = tuple(array.shape)
            else:
                shapes[name] = tuple(int(d) for d in array)
    return Seen(shapes, elements)


def tapped(model: ir.Model, names: Iterable[str], open_model: OpenModel) -> Runner:
    """From a feed to values of the main graph by name, what is fed among them.

    Args:
        model: the model; it is not changed.
        names: inputs, or outputs of nodes; others are left out.
        open_model: makes a runner of a model that gives its outputs by name.
    """
    copy = tapped_model(model, names)
    if copy is None:
        return lambda feed: feed
    run = open_model(copy)
    return lambda feed: {**feed, **run(feed)}


def tapped_model(model: ir.Model, names: Iterable[str]) -> ir.Model | None:
    """A copy that gives out values of the main graph, and nothing else; None if all are inputs.

    Args:
        model: the model; it is not changed.
        names: inputs, or outputs of nodes; others are left out.
    """
    wanted = set(names)
    if wanted.issubset(value.name for value in model.graph.inputs):
        return None
    copy, found = _without_outputs(model, wanted)
    for value in found.values():
        if value.producer() is not None:
            value.shape = None  # a declared shape may be too narrow for what is fed
            copy.graph.outputs.append(value)
    return copy


def give_out(model: ir.Model, names: Collection[str]) -> None:
    """Make values of the main graph outputs as well, in place.

    Args:
        model: a copy that is only run.
        names: outputs of nodes.
    """
    for node in model.graph:
        for value in node.outputs:
            if value.name in names:
                value.shape = None  # a declared shape may be too narrow for what is fed
                model.graph.outputs.append(value)


def _without_outputs(
    model: ir.Model, names: Collection[str]
) -> tuple[ir.Model, dict[str, ir.Value]]:
    """A copy that gives nothing out, and those of its values that are named."""
    copy = model.clone()
    del copy.graph.outputs[:]
    values = (v for node in copy.graph for v in (*node.inputs, *node.outputs) if v is not None)
    return copy, {value.name: value for value in values if value.name and value.name in names}
