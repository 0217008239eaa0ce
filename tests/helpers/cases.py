"""Cases of forms: a graph around one node with a constant weight, and what becomes of it.

The weights are exactly of rank 4 as their form reads them, so a pair of rank 4 is the same map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx_ir as ir

from onnx_lowrank.numerics.arrays import Array
from tests.helpers.models import (
    as_proto,
    assert_same,
    assert_valid,
    factored,
    op_types,
    parameters,
    parse,
    uniform,
)

Shape = tuple[int | str, ...]

RANK = 4
OPSETS = '["": 17, "com.microsoft": 1]'


def declared(values: Mapping[str, Shape | str]) -> str:
    """Inputs or outputs as ONNX text: a shape of floats, or the type and shape written out."""
    return ", ".join(
        f"{shape if isinstance(shape, str) else 'float' + str(list(shape)).replace(chr(39), '')}"
        f" {name}"
        for name, shape in values.items()
    )


@dataclass(frozen=True)
class Case:
    """A graph around one node with a constant W.

    ``macs`` are those of the whole graph as it is, counted by hand.
    """

    node: str
    x: Shape
    y: Shape
    weight: Callable[[np.random.Generator], Array]
    ops: tuple[str, ...]
    form: str
    shape: tuple[int, int]
    macs: int
    slices: int = 1
    more: dict[str, tuple[int, ...]] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    feeds: dict[str, Any] = field(default_factory=dict)
    outputs: dict[str, Shape | str] = field(default_factory=dict)
    arguments: tuple[str, ...] | None = None  # ops= of compress
    reference: bool = True
    opsets: str = OPSETS
    within: float | None = None

    def model(self, rng: np.random.Generator) -> onnx.ModelProto:
        return parse(
            f"""<ir_version: 8, opset_import: {self.opsets}>
            one ({declared({"x": self.x, **self.inputs})})
            => ({declared({"y": self.y, **self.outputs})}) {{ {self.node} }}""",
            {
                "W": self.weight(rng),
                **{name: uniform(shape, rng) for name, shape in self.more.items()},
            },
        )

    def fed(self, rng: np.random.Generator) -> dict[str, Array]:
        sizes = [3 if isinstance(size, str) else size for size in self.x]
        return {"x": uniform(sizes, rng), **self.feeds}


def check(case: Case, rng: np.random.Generator) -> onnx.ModelProto:
    """Factor it at its rank and compare everything that can be; the result."""
    model = case.model(rng)
    assert np.prod(model.graph.initializer[0].dims) == case.slices * math.prod(case.shape)
    dims = {axis: 3 for axis in case.x if isinstance(axis, str)}
    options = {"check": True, "samples": 1, "dims": dims}
    result = factored(model, rank=RANK, ops=case.arguments, **options)
    (layer,) = result.report.layers
    assert (layer.status, layer.form, layer.rank) == ("factored", case.form, RANK), layer.reason
    assert (layer.slices, layer.shape) == (case.slices, case.shape)
    pair = case.slices * RANK * sum(case.shape)
    assert (layer.parameters_before, layer.parameters_after) == (
        case.slices * math.prod(case.shape),
        pair,
    )
    after = as_proto(result.model)
    assert tuple(op_types(after)) == case.ops
    assert parameters(model) - parameters(after) == layer.parameters_before - pair
    assert "W" not in {tensor.name for tensor in after.graph.initializer}
    assert after.graph.node[-1].output == model.graph.node[-1].output
    assert after.graph.node[-1].name == model.graph.node[-1].name
    assert_valid(after)
    feeds = case.fed(rng)
    assert_same(model, after, feeds, in_reference=case.reference, within=case.within)
    totals = result.report.totals
    assert totals.macs_before == case.macs
    # The pair's cost is a form's own sum; counted on the result it has to be the same.
    again = factored(after, rank=RANK - 1, ops=("all",), **options)
    assert again.report.totals.macs_before == totals.macs_after
    # A pair stays a pair.
    assert tuple(op_types(again.model)) == case.ops
    assert any(f"of a pair of rank {RANK}" in row.reason for row in again.report.layers)
    return after


def node_protos(model: onnx.ModelProto | ir.Model) -> list[onnx.NodeProto]:
    """The nodes of the main graph; a domain may be left out or empty, which is the same."""
    proto = onnx.ModelProto()
    proto.CopyFrom(as_proto(model))
    for node in proto.graph.node:
        if not node.domain:
            node.ClearField("domain")
    return list(proto.graph.node)


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
