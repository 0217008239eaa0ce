"""Coordinates: what factors are fitted to is decided before the ranks are searched."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from onnx_lowrank import compress
from onnx_lowrank.compression import coordinates as module
from onnx_lowrank.compression.effort import FISHER
from onnx_lowrank.ranks.probe import Probe
from onnx_lowrank.schema.report import EffortStep, Report
from tests.helpers.blocks import error, feeds_of
from tests.helpers.models import parse

PLAIN: dict[str, Any] = {"simplify": False, "bench": False, "rank_multiple": 1}


def blocks(rng: np.random.Generator) -> onnx.ModelProto:
    """Two layers of which only some outputs are felt, with a sum of both behind them."""
    text = """<ir_version: 8, opset_import: ["": 17]>
    g (float[N, 24] x) => (float[N, 8] y)
    <float[24, 32] w, float[32] s, float[32, 32] u, float[32, 8] v>
    { h = MatMul(x, w)  t = Tanh(h)  m = Mul(t, s)  r = MatMul(m, u)  q = Tanh(r)
      n = Mul(q, s)  y = MatMul(n, v) }"""
    shapes = {"w": (24, 32), "u": (32, 32), "v": (32, 8)}
    arrays = {name: rng.normal(size=s).astype("f4") * 0.2 for name, s in shapes.items()}
    return parse(text, {**arrays, "s": np.where(np.arange(32) % 2, 1.0, 0.01).astype("f4")})


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    return blocks(np.random.default_rng(4))


@pytest.fixture(scope="module")
def feeds() -> list[Any]:
    return feeds_of(np.random.default_rng(5), 136)


def step_of(report: Report) -> EffortStep:
    (step,) = (step for step in report.steps if step.method == FISHER)
    return step


def test_ranks_are_searched_in_the_better_coordinates(
    model: onnx.ModelProto, feeds: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Probe] = []

    def begun(probe: Probe, *arguments: Any, **options: Any) -> None:
        made.append(probe)
        begin(probe, *arguments, **options)

    begin = Probe.__init__
    monkeypatch.setattr(Probe, "__init__", begun)
    options: dict[str, Any] = {"keep": 0.5, "calibration": feeds[16:], **PLAIN}
    found = compress(model, data=feeds[:16], effort="standard", **options)
    assert len(made) == 1  # what decides, what searches and what judges the refit ask it the same
    step = step_of(found.report)
    assert step.taken
    assert step.error_before is not None
    assert step.error_after is not None
    assert step.error_after < step.error_before
    assert step.at == "with 50 % of the layers, before ranks are searched"
    assert {layer.energy_of for layer in found.report.layers} == {"fisher"}
    quick = compress(model, data=feeds[:16], effort="quick", **options)
    unseen = feeds_of(np.random.default_rng(99), 8)
    assert error(model, found.model, unseen) < 0.8 * error(model, quick.model, unseen)


def test_a_layer_of_few_outputs_does_not_hide_the_others() -> None:
    rng = np.random.default_rng(7)
    text = """<ir_version: 8, opset_import: ["": 17]>
    g (float[N, 24] x) => (float[N, 4] y)
    <float[24, 32] w, float[32, 32] u, float[32, 4] v>
    { h = MatMul(x, w)  t = Tanh(h)  r = MatMul(t, u)  q = Tanh(r)  y = MatMul(q, v) }"""
    fall = 0.5 ** np.arange(24)
    arrays = {
        "w": (rng.normal(size=(24, 24)) * fall @ rng.normal(size=(24, 32)) * 0.2).astype("f4"),
        "u": (rng.normal(size=(32, 24)) * fall @ rng.normal(size=(24, 32)) * 0.2).astype("f4"),
        "v": rng.normal(size=(32, 4)).astype("f4"),
    }
    found = compress(
        parse(text, arrays),
        data=feeds_of(rng, 16),
        calibration=feeds_of(rng, 120),
        keep=0.5,
        effort="standard",
        **PLAIN,
    )
    step = step_of(found.report)
    # A pair of half of the parameters of the last layer has rank 1 of 4: it alone loses over half.
    assert step.error_before is not None
    assert step.error_before < 0.1


def test_coordinates_that_do_not_help_are_dropped(
    model: onnx.ModelProto, feeds: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = iter((0.1, 0.2))
    monkeypatch.setattr(module, "error_of", lambda *_: next(errors))
    options: dict[str, Any] = {"keep": 0.5, "calibration": feeds[16:], "refit": False, **PLAIN}
    found = compress(model, data=feeds[:16], effort="standard", **options)
    step = step_of(found.report)
    assert not step.taken
    assert (step.error_before, step.error_after) == (0.1, 0.2)
    assert {layer.energy_of for layer in found.report.layers} == {"output"}
    assert found.recipe.methods["fisher"] is False


def test_outputs_that_show_no_error_decide_nothing(
    model: onnx.ModelProto, feeds: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "error_of", lambda *_: None)
    options: dict[str, Any] = {"keep": 0.5, "calibration": feeds[16:], **PLAIN}
    step = step_of(compress(model, data=feeds[:16], **options).report)
    assert step.why_not == "no sample kept aside shows an error"


def test_when_the_time_is_up_nothing_is_compared(model: onnx.ModelProto, feeds: list[Any]) -> None:
    options: dict[str, Any] = {"keep": 0.5, "calibration": feeds[16:], "time_limit": 1e-3, **PLAIN}
    step = step_of(compress(model, data=feeds[:16], **options).report)
    assert step.why_not == "the time is up"


def test_a_goal_without_a_search_tries_it_at_its_own_ranks(
    model: onnx.ModelProto, feeds: list[Any]
) -> None:
    options: dict[str, Any] = {"rank": 5, "calibration": feeds[16:], **PLAIN}
    step = step_of(
        compress(model, data=feeds[:16], effort="thorough", time_limit="1h", **options).report
    )
    assert step.at == ""
    assert step.error_after is not None


def test_statistics_hold_what_was_decided(
    model: onnx.ModelProto, feeds: list[Any], tmp_path: Any
) -> None:
    path = tmp_path / "moments.npz"
    calibration = feeds[16:]
    found = compress(
        model, data=feeds[:16], calibration=calibration, keep=0.5, save_stats=path, **PLAIN
    )
    assert step_of(found.report).taken
    again = compress(model, data=feeds[:16], load_stats=path, keep=0.5, **PLAIN)
    assert [row.rank for row in again.report.layers] == [row.rank for row in found.report.layers]
    assert {row.energy_of for row in again.report.layers} == {"fisher"}
    assert any("as in the run that saved them" in note for note in again.report.notes)


def test_a_recipe_has_the_coordinates_of_its_search(
    model: onnx.ModelProto, feeds: list[Any], tmp_path: Any
) -> None:
    path = tmp_path / "recipe.json"
    samples: dict[str, Any] = {"data": feeds[:16], "calibration": feeds[16:]}
    found = compress(model, keep=0.5, save_recipe=path, **samples, **PLAIN)
    again = compress(model, recipe=path, bench=False, **samples)
    assert step_of(found.report).taken
    assert found.recipe.methods["fisher"] is True
    assert error(found.model, again.model, feeds[:8]) < 1e-4
