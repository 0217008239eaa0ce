"""The last layer before the outputs: under an energy the outputs decide its rank."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_lowrank import compress
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.maps.find import find
from onnx_lowrank.maps.forms import all_forms
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.ranks.last import last_groups
from onnx_lowrank.schema.layer import Layer
from tests.helpers.models import parse, run_ort, uniform

HEAD = '<ir_version: 8, opset_import: ["": 17]>'
D, CLASSES = 48, 200

CLASSIFIER = f"""{HEAD} g (float[N, {D}] x) => (float[N, {CLASSES}] logits) {{
    a = MatMul(x, W) h = Relu(a) logits = MatMul(h, V)
}}"""


def classifier() -> onnx.ModelProto:
    """Nearly all of the logits' energy is in one direction, which all classes share."""
    rng = np.random.default_rng(0)
    shared = 3.0 * np.ones((D, 1)) @ np.ones((1, CLASSES))
    own = np.linalg.qr(rng.normal(size=(D, D)))[0] * 8.0 * 0.8 ** np.arange(D)
    weights = {"W": np.eye(D), "V": shared + own @ rng.normal(size=(D, CLASSES))}
    return parse(CLASSIFIER, {name: array.astype("f4") for name, array in weights.items()})


def feeds(count: int, seed: int) -> list[dict[str, Array]]:
    rng = np.random.default_rng(seed)
    return [{"x": np.abs(rng.normal(size=(4, D))).astype("f4")} for _ in range(count)]


def head(model: onnx.ModelProto, **options: Any) -> tuple[Layer, ir.Model]:
    given: dict[str, Any] = {"bench": False, "simplify": False, "min_gain": 0.0, "exclude": ["a"]}
    result = compress(model, data=feeds(60, 1), **{**given, **options})
    return next(layer for layer in result.report.layers if layer.weight == "V"), result.model


def agreement(model: ir.Model) -> float:
    same = []
    for feed in feeds(40, 9):
        before, after = run_ort(classifier(), feed), run_ort(model, feed)
        same.append(before["logits"].argmax(-1) == after["logits"].argmax(-1))
    return float(np.mean(same))


@pytest.mark.parametrize("energy", [0.8, 0.95])
def test_a_classifier_keeps_its_answers(energy: float) -> None:
    """By its own energy rank 1 would do."""
    layer, model = head(classifier(), energy=energy, rank_multiple=1)
    assert f"energy {energy:g} needs rank 1;" in layer.reason
    assert (
        "holds it of the model's outputs, which follow this layer (at rank 1: relative error"
        in (layer.reason)
    )
    assert layer.rank is not None
    assert layer.rank < 40
    assert agreement(model) > energy - 0.08
    assert agreement(head(classifier(), rank=1)[1]) < 0.5


def test_what_no_rank_holds_stays_dense_with_the_reason() -> None:
    layer, model = head(classifier(), energy=0.99, min_gain=0.8, rank_multiple=1)
    assert layer.rank is None
    assert "of the model's outputs, which follow this layer, is not held by rank" in layer.reason
    assert agreement(model) == 1.0


def test_plain_outputs_hold_the_energy() -> None:
    """A tanh behind the layer: what counts is the energy of the output."""
    rng = np.random.default_rng(2)
    text = f"""{HEAD} g (float[N, {D}] x) => (float[N, {D}] y) {{ a = MatMul(x, V) y = Tanh(a) }}"""
    decay = np.diag(30.0 * 0.7 ** np.arange(D))
    left, right = (np.linalg.qr(rng.normal(size=(D, D)))[0] for _ in range(2))
    proto = parse(text, {"V": (left @ decay @ right).astype("f4")})
    layer, model = head(proto, energy=0.95, rank_multiple=1, exclude=())
    assert layer.rank is not None
    errors = []
    for feed in feeds(40, 9):
        y, z = (run_ort(own, feed)["y"] for own in (proto, model))
        errors.append(np.sum((y - z) ** 2) / np.sum(y**2))
    assert np.mean(errors) < 0.06
    assert "of the model's outputs" in layer.reason


def test_without_data_nothing_is_judged() -> None:
    result = compress(
        classifier(), energy=0.8, rank_multiple=1, bench=False, simplify=False, exclude=["a"]
    )
    assert all("of the model's outputs" not in layer.reason for layer in result.report.layers)


GRAPHS = {
    "a chain": ("a = MatMul(x, P) b = Relu(a) y = MatMul(b, Q)", {"Q"}),
    "a residual around it": ("a = MatMul(x, P) b = MatMul(a, Q) y = Add(a, b)", {"Q"}),
    "two heads": ("a = MatMul(x, P) b = MatMul(a, Q) c = MatMul(a, R) y = Add(c, b)", {"Q", "R"}),
    "not through sizes": (
        "a = MatMul(x, P) s = Shape(a) b = MatMul(x, Q) c = Reshape(b, s) y = Add(c, a)",
        {"P", "Q"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GRAPHS)
def test_which_layers_are_last(name: str) -> None:
    body, expected = GRAPHS[name]
    rng = np.random.default_rng(0)
    weights = {key: uniform((8, 8), rng) for key in "PQR" if f", {key})" in body}
    model = ir.from_proto(
        parse(f"{HEAD} g (float[3, 8] x) => (float[3, 8] y) {{ {body} }}", weights)
    )
    found = last_groups(model, find(model, Constants(model), all_forms()))
    assert {group.matrix.name for group in found} == expected
