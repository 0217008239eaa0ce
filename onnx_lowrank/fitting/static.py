"""Static: products of integers whose inputs and results have steps that were found on samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnx_lowrank.fitting.ranges import METHODS, Method, Ranges
from onnx_lowrank.fitting.rounding import Postponed
from onnx_lowrank.graph.names import Names
from onnx_lowrank.graph.opset import raise_opset
from onnx_lowrank.graph.spool import Spool
from onnx_lowrank.maps.emit import Storage
from onnx_lowrank.maps.format_writer import FormatWriter
from onnx_lowrank.maps.static import ByteStep, StaticWriter, rounded_values
from onnx_lowrank.numerics.arrays import Feed
from onnx_lowrank.progress import Advance
from onnx_lowrank.runtime.taps import OpenModel, tapped

__all__ = ["StaticSteps", "chosen_steps", "put_static"]

_MOST = 256
"""Samples that ranges are taken from, which lie evenly among all."""


@dataclass(frozen=True, eq=False)
class StaticSteps:
    """Steps of a model before its weights are rounded.

    Attributes:
        method: that loses least.
        steps: by it, of what products read and give.
        damages: what the rounding of all inputs and results does to the outputs, by method; None
            where the outputs cannot be compared.
    """

    method: Method
    steps: Mapping[str, ByteStep]
    damages: Mapping[Method, float | None]

    def __str__(self) -> str:
        shown = ", ".join(
            f"{method} {'not known' if damage is None else f'{damage:.2g}'}"
            for method, damage in self.damages.items()
        )
        return f"{self.method} (damage of what they round: {shown})"


def chosen_steps(
    model: ir.Model,
    nodes: Sequence[ir.Node],
    feeds: Sequence[Feed],
    open_model: OpenModel,
    damage_of: Callable[[ir.Model, Sequence[Feed]], float | None],
    advance: Advance,
    opset: int,
) -> StaticSteps:
    """Steps by each method from every other sample; the others say which method loses least.

    Args:
        model: the model; it is not changed.
        nodes: its products whose inputs and results are to be rounded.
        feeds: samples, at least one.
        open_model: makes a runner of a model.
        damage_of: damage of a model against this one on samples.
        advance: called with 1 for each sample and each method.
        opset: what the operators that round need at least; copies of the model are raised to it.

    Raises:
        InputError: a value is not finite, or the model does not run or cannot be raised.
    """
    some = _spread(feeds)
    ranges = Ranges()
    run = tapped(model, rounded_values(nodes), open_model)
    names = set(rounded_values(nodes))
    damages: dict[Method, float | None] = {}
    for place, part in enumerate((some[::2], some[1::2])):
        for feed in part:
            ranges.see({name: array for name, array in run(feed).items() if name in names})
            advance(1)
        if place:
            break
        for method in METHODS:
            with Spool() as spool:
                copy = model.clone()
                node_of = dict(zip(model.graph, copy.graph, strict=True))
                raise_opset(copy, opset)
                writer = StaticWriter(copy.graph, Storage(copy, Names(copy), spool))
                writer.surround([node_of[node] for node in nodes], ranges.steps(method))
                damages[method] = damage_of(copy, some[1::2] or some)
            advance(1)
    known = {method: damage for method, damage in damages.items() if damage is not None}
    method = min(known, key=lambda own: known[own], default=METHODS[0])
    return StaticSteps(method, ranges.steps(method), damages)


def put_static(
    model: ir.Model,
    waiting: Sequence[Postponed],
    method: Method,
    feeds: Sequence[Feed],
    open_model: OpenModel,
    spool: Spool,
    advance: Advance = lambda _: None,
) -> None:
    """Let products that wait multiply integers; their steps are those of the model as it is now.

    Args:
        model: that multiplies with what the codes stand for; it is changed.
        waiting: the products.
        method: by which steps are found.
        feeds: samples.
        open_model: makes a runner of a model.
        spool: where the integers wait until they are saved.
        advance: called with 1 for each sample.

    Raises:
        InputError: a value is not finite, or the model does not run.
    """
    nodes = [node for own in waiting for node in own.nodes]
    names, ranges = set(rounded_values(nodes)), Ranges()
    run = tapped(model, names, open_model)
    for feed in _spread(feeds):
        ranges.see({name: array for name, array in run(feed).items() if name in names})
        advance(1)
    writer, steps = FormatWriter(model, spool), ranges.steps(method)
    for own in waiting:
        writer.put(own.nodes, own.codes, own.form)
    writer.surround(nodes, steps)


def _spread(feeds: Sequence[Feed]) -> list[Feed]:
    count = len(feeds)
    if count <= _MOST:
        return list(feeds)
    return [feeds[place * count // _MOST] for place in range(_MOST)]
