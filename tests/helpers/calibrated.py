"""Models and samples for the tests of calibration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from onnx_lowrank.fitting.gather import gather
from onnx_lowrank.fitting.statistics import Statistics, statistics_of
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.maps.find import Group, find
from onnx_lowrank.maps.forms import all_forms, chosen_forms
from onnx_lowrank.numerics.arrays import Array
from tests.helpers.models import parse, run_ort, uniform

__all__ = [
    "HEAD",
    "Array",
    "Feed",
    "attention",
    "gathered",
    "groups_of",
    "narrow",
    "single",
    "texts",
]

Feed = dict[str, Array]

HEAD = '<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>'


_ATTENTION = f"""{HEAD} g (float[B, T, 6] x, int64[B, T] attention_mask) => (float[B, T, 6] y) {{
    h = Tanh(x)
    q = MatMul(h, Wq)
    k = MatMul(h, Wk)
    flat_shape = Constant<value = int64[2] {{-1, 6}}>()
    both = Add(q, k)
    flat = Reshape(both, flat_shape)
    g = Gemm<transB=1>(flat, Wg)
    z = Einsum<equation="btd,dhk->bthk">(h, We)
    shape = Shape(x)
    back = Reshape(g, shape)
    zs = Reshape(z, shape)
    y = Add(back, zs)
}}"""


def attention(rng: np.random.Generator) -> onnx.ModelProto:
    """Four maps, three of which read one activation."""
    weights = {"Wq": (6, 6), "Wk": (6, 6), "Wg": (6, 6), "We": (6, 2, 3)}
    return parse(_ATTENTION, {name: uniform(shape, rng) for name, shape in weights.items()})


def texts(rng: np.random.Generator, count: int) -> list[Feed]:
    """Sequences of different lengths, padded."""
    feeds = []
    for _ in range(count):
        length = int(rng.integers(2, 6))
        mask = (np.arange(length) < rng.integers(1, length + 1, (2, 1))).astype(np.int64)
        x = uniform((2, length, 6), rng)
        feeds.append({"x": x, "attention_mask": mask})
    return feeds


def single(rng: np.random.Generator) -> onnx.ModelProto:
    """One map of 32 elements."""
    return parse(
        f"{HEAD} g (float[N, 32] x) => (float[N, 24] y) {{ y = MatMul(x, W) }}",
        {"W": uniform((32, 24), rng)},
    )


def narrow(rng: np.random.Generator, count: int, rows: int = 40) -> list[Feed]:
    """Inputs that lie near a plane of 5 of 32 dimensions."""
    basis = np.random.default_rng(1).standard_normal((5, 32))
    return [
        {
            "x": (rng.standard_normal((rows, 5)) @ basis).astype(np.float32)
            + 0.01 * uniform((rows, 32), rng)
        }
        for _ in range(count)
    ]


def groups_of(model: ir.Model, ops: tuple[str, ...] = ("all",)) -> tuple[Group, ...]:
    """Groups of the linear maps of these forms."""
    return find(model, Constants(model, False), all_forms(), chosen_forms(ops)).groups


def gathered(
    proto: onnx.ModelProto,
    fit: Sequence[Feed],
    *,
    held: Sequence[Feed] = (),
    mask: str | None = None,
    ops: tuple[str, ...] = ("all",),
) -> tuple[Statistics, list[list[str]], tuple[Group, ...]]:
    """Statistics, the outputs of each model that was run, and the groups."""
    model = ir.from_proto(proto)
    groups = groups_of(model, ops)
    opened: list[list[str]] = []

    def open_model(copy: ir.Model) -> Any:
        made = ir.to_proto(copy)
        opened.append([output.name for output in made.graph.output])
        names = {value.name for value in made.graph.input}
        return lambda feed: run_ort(made, {k: v for k, v in feed.items() if k in names})

    found = gather(model, groups, open_model, fit, held, mask, lambda _: None).whole
    return statistics_of(model, groups, found), opened, groups
