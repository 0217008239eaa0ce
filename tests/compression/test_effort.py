"""Effort: what is tried for more accuracy, kept where it helps, and dropped where it does not."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnx_lowrank import UsageError, compress
from onnx_lowrank.cli.console import print_report
from onnx_lowrank.cli.screen import output_screen
from onnx_lowrank.compression import effort as module
from onnx_lowrank.compression.effort import FISHER, REFIT
from onnx_lowrank.fitting.refit import Refitted
from onnx_lowrank.ranks.goals import seconds_of
from onnx_lowrank.schema.report import EffortStep, Report
from tests.helpers.blocks import error, feeds_of, two_blocks
from tests.helpers.models import parse

PLAIN: dict[str, Any] = {"simplify": False, "bench": False}


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    return two_blocks(np.random.default_rng(11))


@pytest.fixture(scope="module")
def feeds() -> list[Any]:
    return feeds_of(np.random.default_rng(11), 48)


def steps_of(report: Report) -> dict[str, EffortStep]:
    return {step.method: step for step in report.steps}


def weights(result: Any) -> dict[str, Any]:
    return {
        name: value.const_value.numpy() for name, value in result.model.graph.initializers.items()
    }


def test_standard_is_what_a_run_with_samples_does(model: onnx.ModelProto, feeds: list[Any]) -> None:
    result = compress(model, data=feeds, rank=9, **PLAIN)
    quick = compress(model, data=feeds, rank=9, effort="quick", **PLAIN)
    step = steps_of(result.report)[REFIT]
    assert step.taken
    assert step.error_before is not None
    assert step.error_after is not None
    assert step.error_after < step.error_before
    assert not quick.report.steps
    unseen = feeds_of(np.random.default_rng(99), 8)
    assert error(model, result.model, unseen) < 0.99 * error(model, quick.model, unseen)


def test_with_few_samples_nothing_is_tried_and_nothing_is_lost(
    model: onnx.ModelProto, feeds: list[Any]
) -> None:
    few = [{"x": feed["x"][:1]} for feed in feeds]
    result = compress(model, data=few, rank=9, **PLAIN)
    quick = compress(model, data=few, rank=9, effort="quick", **PLAIN)
    steps = steps_of(result.report)
    assert not any(step.taken for step in steps.values())
    assert "36 samples to fit to, 60 would be enough" in steps[REFIT].why_not
    assert error(quick.model, result.model, few) < 1e-4


def test_what_does_not_help_is_dropped(
    model: onnx.ModelProto, feeds: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = compress(model, data=feeds, rank=9, time_limit="0.001s", **PLAIN)

    def worse(_: Any, __: Any, pairs: Any, *___: Any) -> Refitted:
        factors = {g: dataclasses.replace(p, second=0.5 * p.second) for g, p in pairs.items()}
        return Refitted(factors, {}, 0)

    monkeypatch.setattr(module, "refit", worse)
    result = compress(model, data=feeds, rank=9, **PLAIN)
    step = steps_of(result.report)[REFIT]
    assert not step.taken
    assert step.error_after is not None
    assert step.error_before is not None
    assert step.error_after > step.error_before
    for name, array in weights(plain).items():
        np.testing.assert_array_equal(weights(result)[name], array)
    assert steps_of(plain.report)[REFIT].why_not == "the time is up"


def test_a_method_that_is_named_is_all_that_is_done(
    model: onnx.ModelProto, feeds: list[Any]
) -> None:
    result = compress(model, data=feeds, rank=9, fisher=True, **PLAIN)
    assert not result.report.steps
    assert all(layer.refit is None for layer in result.report.layers)
    both = compress(model, data=feeds, rank=9, refit=True, effort="standard", **PLAIN)
    assert REFIT not in steps_of(both.report)
    assert any(layer.refit for layer in both.report.layers)


def hardly_felt(rng: np.random.Generator) -> onnx.ModelProto:
    """Half of what the first layer gives is multiplied by almost 0."""
    felt = np.where(np.arange(32) % 2, 1.0, 0.01).astype("f4")
    text = """<ir_version: 8, opset_import: ["": 17]>
    g (float[N, 24] x) => (float[N, 8] y) <float[24, 32] w, float[32] s, float[32, 8] v>
    { h = MatMul(x, w)  t = Tanh(h)  m = Mul(t, s)  y = MatMul(m, v) }"""
    shapes = {"w": (24, 32), "v": (32, 8)}
    arrays = {name: rng.normal(size=s).astype("f4") * 0.2 for name, s in shapes.items()}
    return parse(text, {**arrays, "s": felt})


def test_under_a_budget_fisher_information_is_tried(feeds: list[Any]) -> None:
    rng = np.random.default_rng(4)
    model = hardly_felt(rng)
    many = feeds_of(rng, 120)
    options: dict[str, Any] = {"keep": 0.6, "rank_multiple": 1, "calibration": many, **PLAIN}
    result = compress(model, data=feeds[:16], **options)
    quick = compress(model, data=feeds[:16], effort="quick", **options)
    steps = steps_of(result.report)
    assert [step.method for step in result.report.steps] == [FISHER, REFIT]
    assert steps[FISHER].taken
    unseen = feeds_of(np.random.default_rng(99), 8)
    assert error(model, result.model, unseen) < 0.9 * error(model, quick.model, unseen)
    # Ranks are those of what the outputs feel, and so is the error in the report.
    assert {layer.energy_of for layer in result.report.layers} == {"fisher"}


def test_a_batch_of_samples_counts_as_its_rows() -> None:
    rng = np.random.default_rng(4)
    model, options = hardly_felt(rng), {"keep": 0.6, "rank_multiple": 1, **PLAIN}
    tried = []
    for size in (1, 8):
        feeds = [{"x": rng.normal(size=(size, 24)).astype("f4")} for _ in range(24)]
        steps = steps_of(compress(model, data=feeds[:2], calibration=feeds, **options).report)
        tried.append(steps[FISHER].error_before is not None)
    assert tried == [False, True]


def test_thorough_heals_until_it_helps_no_more(model: onnx.ModelProto, feeds: list[Any]) -> None:
    result = compress(model, data=feeds, rank=9, effort="thorough", **PLAIN)
    step, healing = steps_of(result.report)["healing"], result.report.healing
    assert healing is not None
    assert healing.steps >= 100
    assert healing.rate in (2.5e-4, 1e-3, 4e-3, 1.2e-2)
    assert step.taken
    assert healing.error_after < healing.error_before
    standard = compress(model, data=feeds, rank=9, **PLAIN)
    unseen = feeds_of(np.random.default_rng(99), 8)
    assert error(model, result.model, unseen) < error(model, standard.model, unseen)


def test_when_the_time_is_up_no_step_begins(model: onnx.ModelProto, feeds: list[Any]) -> None:
    options: dict[str, Any] = {"rank": 9, "effort": "thorough", "time_limit": 1e-3, **PLAIN}
    steps = steps_of(compress(model, data=feeds, **options).report)
    assert {steps[method].why_not for method in (REFIT, "healing")} == {"the time is up"}
    named = compress(model, data=feeds, rank=9, heal=10, time_limit=1e-3, **PLAIN)
    assert named.report.healing is None
    assert steps_of(named.report)["healing"].why_not == "the time is up"


def test_a_tolerance_is_kept_by_what_is_tried_after_its_search(
    model: onnx.ModelProto, feeds: list[Any]
) -> None:
    result = compress(model, data=feeds, tolerance=0.2, objective="size", **PLAIN)
    goal = result.report.goal
    assert goal is not None
    assert goal.loss is not None
    assert goal.loss <= 0.2
    assert steps_of(result.report)[REFIT].error_before is not None


def test_a_tolerance_uses_what_is_gained() -> None:
    """What is tried after the search leaves room: the result gets smaller, and holds."""
    rng = np.random.default_rng(4)
    model, many = hardly_felt(rng), feeds_of(rng, 200)
    options: dict[str, Any] = {
        "tolerance": 0.3, "objective": "size", "rank_multiple": 1, "min_gain": 0.0, **PLAIN
    }  # fmt: skip
    quick, standard = (
        compress(model, data=many, effort=effort, **options).report
        for effort in ("quick", "standard")
    )
    assert any(step.taken for step in standard.steps)
    assert quick.goal is not None
    assert standard.goal is not None
    assert standard.goal.loss is not None
    assert standard.goal.loss <= 0.3
    assert standard.totals.linear_parameters_after < quick.totals.linear_parameters_after


def test_a_recipe_does_it_again(model: onnx.ModelProto, feeds: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    options: dict[str, Any] = {"rank_multiple": 1, "keep": 0.6, **PLAIN}
    many = feeds + feeds_of(np.random.default_rng(5), 60)
    result = compress(model, data=many, save_recipe=path, **options)
    again = compress(model, data=many, recipe=path, bench=False)
    taken = {step.method: step.taken for step in result.report.steps}
    assert any(taken.values())
    assert {step.method: step.taken for step in again.report.steps} == taken
    assert error(result.model, again.model, feeds) < 1e-4


def test_each_step_is_a_line(
    model: onnx.ModelProto, feeds: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    report = compress(model, data=feeds, rank=9, **PLAIN).report
    print_report(report, output_screen())
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("refit: error on samples kept")]) == 1
    assert len([line for line in lines if line.startswith("Fisher information: not tried")]) == 1


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90.0), ("10m", 600.0), ("1.5 h", 5400.0), (7, 7.0), ("2min", 120)]
)
def test_times(text: float | str, seconds: float) -> None:
    assert seconds_of(text, "time_limit") == seconds


@pytest.mark.parametrize("text", ["soon", "0s", "-1s", "5ms", True])
def test_no_times(text: Any) -> None:
    with pytest.raises(UsageError, match=r"time_limit=…: expected a time such as 90s, 10m or 2h"):
        seconds_of(text, "time_limit")
