"""Models, plans and timers for the tests of latencies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from onnx_lowrank.errors import InputError
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.maps.find import Group, find
from onnx_lowrank.maps.forms import all_forms, chosen_forms
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.ranks.costs import (
    CostPlan,
    CostTable,
    measure_costs,
    plan_costs,
)
from onnx_lowrank.ranks.formats import ONLY_FLOATS, Formats
from onnx_lowrank.ranks.microbench import Limits, Rounds
from onnx_lowrank.ranks.times import Place
from tests.helpers.models import parse, run_ort, uniform

__all__ = ["F32", "HEAD", "HERE", "QUICK", "groups_of", "measured", "planned", "product", "sized"]

HEAD = '<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>'
HERE = Place("CPUExecutionProvider", 1, "a CPU", "1.0")
QUICK = Limits(fewest=2, enough=2, most=2)
F32 = np.float32


def groups_of(model: ir.Model) -> tuple[Group, ...]:
    return find(model, Constants(model), all_forms(), chosen_forms(("all",))).groups


def planned(
    proto: onnx.ModelProto, feed: Mapping[str, Array], formats: Formats = ONLY_FLOATS
) -> tuple[CostPlan, tuple[Group, ...]]:
    """The plan of a model, whose values ONNX Runtime looked at on this feed."""
    model = ir.from_proto(proto)
    groups = groups_of(model)

    def run(copy: ir.Model) -> dict[str, Array]:
        made = ir.to_proto(copy)
        names = {value.name for value in made.graph.input}
        return run_ort(made, {k: v for k, v in feed.items() if k in names})

    return plan_costs(groups, model, run, dict.fromkeys(groups, formats)), groups


def sized(*, noise: float = 0.0, fail: Callable[[bytes], bool] = lambda _: False) -> Any:
    """A timer on which a model takes as many ns as its constants have elements, and noise."""
    generator = np.random.default_rng(0)

    def timer(models: Sequence[bytes], feed: Mapping[str, Array]) -> Rounds:
        if any(fail(data) for data in models):
            raise InputError("the map alone: no")
        for data in models:
            run_ort(onnx.load_from_string(data), feed)
        base = [
            float(sum(np.prod(t.dims) for t in onnx.load_from_string(data).graph.initializer))
            for data in models
        ]
        return lambda count: (
            np.array(base) * (1 + noise * generator.standard_normal((count, len(base))))
        )

    return timer


def measured(
    proto: onnx.ModelProto,
    feed: Mapping[str, Array],
    formats: Formats = ONLY_FLOATS,
    **options: Any,
) -> tuple[CostTable, tuple[Group, ...]]:
    plan, groups = planned(proto, feed, formats)
    options = {"timer": sized(), "limits": QUICK, **options}
    timer = options.pop("timer")
    return measure_costs(plan, timer, HERE, lambda _: None, **options), groups


def product(m: int, n: int, *, layers: int = 1) -> onnx.ModelProto:
    """``x @ W0 @ W1…`` of square layers, or of one m×n."""
    rng = np.random.default_rng(0)
    lines = [f"h{i + 1} = MatMul({'x' if i == 0 else f'h{i}'}, W{i})" for i in range(layers)]
    body = "\n".join([*lines, f"y = Relu(h{layers})"])
    return parse(
        f"{HEAD} g (float[N, {m}] x) => (float[N, {n}] y) {{ {body} }}",
        {f"W{i}": uniform((m, n), rng) for i in range(layers)},
    )
