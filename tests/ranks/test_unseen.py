"""Layers that no sample shows: their damage is not measured, which is not called zero."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from onnx_lowrank import Result, compress
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.schema.layer import Layer
from tests.helpers.models import parse

_HEAD = '<ir_version: 8, opset_import: ["": 17]>'

# The seen layer and the other one are alike; the other one is behind what no sample passes.
_BRANCH = f"""{_HEAD} g (float[N, 32] x, bool flag) => (float[N, 32] y) {{
    a = MatMul(x, seen)
    h = Tanh(a)
    y = If(flag) <
        then_branch = taken () => (float[N, 32] t) {{ t = MatMul(h, unseen) }},
        else_branch = other () => (float[N, 32] e) {{ e = Identity(h) }}
    >
}}"""
_LOOP = f"""{_HEAD} g (float[N, 32] x, int64 trips) => (float[N, 32] y) {{
    a = MatMul(x, seen)
    h = Tanh(a)
    more = Constant<value = bool {{1}}>()
    y = Loop(trips, more, h) <
        body = step (int64 i, bool c, float[N, 32] s) => (bool d, float[N, 32] t) {{
            d = Identity(c)
            t = MatMul(s, unseen)
        }}
    >
}}"""
_DEAD = f"""{_HEAD} g (float[N, 32] x) => (float[N, 32] y) {{
    a = MatMul(x, seen)
    h = Tanh(a)
    b = MatMul(h, unseen)
    low = Constant<value = float {{-1000.0}}>()
    c = Add(b, low)
    d = Relu(c)
    y = Add(h, d)
}}"""
_EXPERT = f"""{_HEAD} g (float[N, 32] x) => (float[N, 32] y) {{
    a = MatMul(x, seen)
    h = Tanh(a)
    far = Constant<value = float {{1000.0}}>()
    chosen = Greater(h, far)
    gate = Cast<to = 1>(chosen)
    z = Mul(h, gate)
    b = MatMul(z, unseen)
    y = Add(h, b)
}}"""
_MORE: dict[str, dict[str, Array]] = {
    _BRANCH: {"flag": np.array(False)},
    _LOOP: {"trips": np.array(0, np.int64)},
}
CASES = {"branch": _BRANCH, "loop": _LOOP, "dead": _DEAD, "expert": _EXPERT}


def model(text: str) -> onnx.ModelProto:
    rng = np.random.default_rng(3)
    weights = {name: rng.normal(size=(32, 32)).astype("f4") * 0.2 for name in ("seen", "unseen")}
    return parse(text, weights)


def run(text: str, calibrated: bool = True, **options: Any) -> tuple[Result, dict[str, Layer]]:
    rng = np.random.default_rng(1)
    feeds = [
        {"x": rng.normal(size=(16, 32)).astype("f4"), **_MORE.get(text, {})} for _ in range(40)
    ]
    plain: dict[str, Any] = {"simplify": False, "bench": False, "rank_multiple": 1}
    source = {"calibration": feeds} if calibrated else {"dims": {"N": 4}}
    result = compress(model(text), **{**plain, **source, **options})
    return result, {layer.weight: layer for layer in result.report.layers}


@pytest.mark.parametrize("case", CASES)
def test_an_unseen_layer_is_cut_no_deeper_than_its_own_error_allows(case: str) -> None:
    result, layers = run(CASES[case], keep=0.8, min_gain=0.0)
    unseen = layers["unseen"]
    if unseen.rank is not None:
        assert "damage not measured" in unseen.reason
        assert unseen.rank > 4  # a share of 0.8 can be had without rank 1 anywhere
    notes = [note for note in result.report.notes if note.startswith("damage not measured at ")]
    assert len(notes) == 1
    assert notes[0].startswith(f"damage not measured at {unseen.name}: ")


@pytest.mark.parametrize("case", CASES)
def test_everything_kept_keeps_an_unseen_layer(case: str) -> None:
    _, layers = run(CASES[case], keep=1.0, min_gain=0.0)
    assert layers["unseen"].rank is None


def test_a_damage_that_nothing_shows_is_not_called_zero() -> None:
    _, layers = run(_DEAD, energy=1.0, check=False)
    result, layers = run(_DEAD, keep=0.8, min_gain=0.0, exclude=(layers["seen"].name,))
    assert layers["unseen"].rank is not None
    goal = result.report.goal
    assert goal is not None
    assert goal.predicted_damage is None
    assert goal.achieved_damage is None
    assert goal.summed_damage is not None
    assert goal.summed_damage > 0.01


def test_a_tolerance_leaves_what_it_cannot_judge() -> None:
    result, layers = run(_BRANCH, tolerance=0.9, min_gain=0.0, objective="size")
    assert layers["seen"].rank is not None
    assert layers["unseen"].rank is None
    assert "no sample changes an output" in layers["unseen"].reason
    assert any("stay dense" in note for note in result.report.notes)


def test_an_input_that_is_always_zero_is_no_calibration() -> None:
    result, layers = run(_EXPERT, energy=0.9)
    unseen = layers["unseen"]
    assert unseen.energy_of == "weight"
    assert unseen.rank is None or unseen.rank > 8
    calibration = result.report.calibration
    assert calibration is not None
    assert calibration.missing == {unseen.name: "its input is zero on every sample"}


def test_gradients_that_are_zero_are_no_fisher_information() -> None:
    result, layers = run(_DEAD, energy=0.9, fisher=True)
    assert layers["seen"].energy_of == "fisher"
    assert layers["unseen"].energy_of == "output"
    assert any("gradients are zero on every sample" in note for note in result.report.notes)
