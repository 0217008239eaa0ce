"""What the report says first where a result is not usable as it is, and what counts in a share."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from onnx_lowrank import Result, compress
from onnx_lowrank.cli.console import print_report
from onnx_lowrank.cli.screen import output_screen
from onnx_lowrank.compression.summary import by_chance, output_verdict
from onnx_lowrank.maps.choice import Choice
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.schema.measures import Check, Judged, OutputCheck, ProviderCheck
from onnx_lowrank.schema.report import OutputVerdict
from tests.helpers.models import known_rank, parse, uniform

_TEXT = """<ir_version: 8, opset_import: ["": 17]> g (float[N, 32] x) => (float[N, 32] y) {
    a = MatMul(x, w1)
    b = Tanh(a)
    y = MatMul(b, w2)
}"""
_PLAIN: dict[str, Any] = {"simplify": False, "bench": False, "rank_multiple": 1}


def model(rank: int | None = None) -> onnx.ModelProto:
    rng = np.random.default_rng(4)
    weights = {
        name: uniform((32, 32), rng) if rank is None else known_rank(32, 32, rank, rng)
        for name in ("w1", "w2")
    }
    return parse(_TEXT, weights)


def feeds() -> list[dict[str, Array]]:
    rng = np.random.default_rng(1)
    return [{"x": uniform((8, 32), rng)} for _ in range(20)]


def ruined(**options: Any) -> Result:
    return compress(model(), **{**_PLAIN, "rank": 2, "calibration": feeds(), **options})


def test_a_ruined_result_is_said_first(capsys: pytest.CaptureFixture[str]) -> None:
    report = ruined().report
    assert report.verdict is not None
    assert report.verdict.level == "unusable"
    assert "output 'y' is off by " in report.verdict.text
    assert report.to_dict()["verdict"]["level"] == "unusable"
    print_report(report, output_screen())
    assert capsys.readouterr().out.splitlines()[0].startswith("unusable: output 'y' is off by ")


def test_damages_that_differ_by_chance_are_said_to() -> None:
    text = by_chance((1.0, 0.5), (2.0, 1.0))
    assert text is not None
    assert "predicted as 1 and is 2" in text
    assert "standard errors are 0.5 and 1" in text
    text = by_chance((1.0, None), (2.0, 0.01))  # one sample predicts
    assert text is not None
    assert "unknown and 0.01" in text
    assert by_chance((1.0, 0.1), (2.0, 0.1)) is None  # that is no chance
    assert by_chance((1.0, 0.5), (1.4, 1.0)) is None  # near enough
    assert by_chance((None, None), (1.0, 0.5)) is None
    assert by_chance((1.0, 0.5), (0.0, None)) is None


def test_a_run_says_that_its_damage_is_of_few_samples() -> None:
    # Of all that judge one is far from what the factors were fitted to.
    own = feeds()
    own[-1] = {"x": 40.0 * np.roll(own[-1]["x"], 1, axis=1)}
    found = compress(
        model(), **_PLAIN, keep=0.5, calibration=own[:12], data=own[12:], samples=8, calibrate=True
    ).report
    goal, check = found.goal, found.check
    assert goal is not None
    assert check is not None
    assert goal.achieved_error == check.damage_error
    assert (goal.achieved_error or 0.0) > 0.0
    assert (goal.predicted_error or 0.0) > 0.0
    chance = by_chance(
        (goal.predicted_damage, goal.predicted_error), (goal.achieved_damage, goal.achieved_error)
    )
    assert [note for note in found.notes if "may be chance" in note] == ([chance] if chance else [])


def test_random_input_is_no_judge() -> None:
    verdict = ruined(calibration=None, dims={"N": 4}).report.verdict
    assert verdict is not None
    assert "on random input; judge it on real samples" in verdict.text


def test_no_verdict_where_nothing_is_wrong_or_the_user_set_the_limit() -> None:
    assert compress(model(4), **_PLAIN, rank=4, calibration=feeds()).report.verdict is None
    assert ruined(rank=None, energy=1.0).report.verdict is None  # nothing is factored
    assert ruined(max_error=5.0).report.verdict is None
    assert ruined(check=False).report.verdict is None


@pytest.mark.parametrize(
    ("error", "agreement", "level"),
    [
        (0.09, None, None),
        (0.11, None, "doubtful"),
        (0.6, None, "unusable"),
        (0.05, 0.97, "doubtful"),
        (0.05, 0.5, "unusable"),
        (float("inf"), 1.0, "unusable"),
    ],
)
def test_levels(error: float, agreement: float | None, level: str | None) -> None:
    output = OutputCheck("y", error, error, 0.9, agreement)
    check = Check("data.npz", 4, (ProviderCheck("CPUExecutionProvider", (output,)),))
    decisions = _decisions()
    verdict = output_verdict(check, decisions, random=False)
    assert (verdict.level if isinstance(verdict, OutputVerdict) else None) == level
    if verdict is not None and agreement == 1.0:
        assert "the same in every row" in verdict.text


@pytest.mark.parametrize(
    ("changed", "rows", "level"),
    [
        (1, 16, None),
        (2, 16, "doubtful"),
        (5, 16, "unusable"),
        (3, 256, None),
        (16, 256, "doubtful"),
        (39, 256, "unusable"),
    ],
)
def test_few_rows_are_no_reason_to_warn(changed: int, rows: int, level: str | None) -> None:
    output = OutputCheck("y", 0.05, 0.05, 0.9, 1.0 - changed / rows, rows)
    check = Check("data.npz", 16, (ProviderCheck("CPUExecutionProvider", (output,)),))
    verdict = output_verdict(check, _decisions(), random=False)
    assert (None if verdict is None else verdict.level) == level
    if verdict is not None:
        assert f"% of the rows ({changed} of {rows}: " in verdict.text


@pytest.mark.parametrize(("error", "level"), [(0.6, "doubtful"), (float("inf"), "unusable")])
def test_a_metric_that_the_user_named_tells_how_bad_it_is(error: float, level: str) -> None:
    output = OutputCheck("y", error, error, 0.9, None)
    check = Check("data.npz", 4, (ProviderCheck("CPUExecutionProvider", (output,)),))
    judged = Judged(0.17, 17.7, 20.7, 4, metric="perplexity")
    verdict = output_verdict(check, _decisions(), random=False, judged=judged)
    assert verdict is not None
    assert verdict.level == level
    assert "the loss by perplexity is 0.17; tolerance=… limits it" in verdict.text
    assert "judging it by your own metric" not in verdict.text


def _decisions() -> list[Any]:
    site = SimpleNamespace(choice=Choice(2, "a rank"))
    return [site]


def test_what_is_excluded_counts_in_no_share() -> None:
    (first, second) = ruined().report.layers
    result = compress(model(), **_PLAIN, keep=0.5, calibration=feeds(), exclude=(first.name,))
    totals = result.report.totals
    assert totals.linear_parameters_before == second.parameters_before
    assert totals.linear_parameters_after <= 0.5 * second.parameters_before
    assert result.report.layers[0].rank is None


def test_a_header_without_factored_layers_speaks_of_no_energy(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_report(ruined(rank=None, energy=1.0).report, output_screen())
    assert "2 linear maps, 0 factored\n" in capsys.readouterr().out


def test_a_shared_first_factor_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(4)
    text = """<ir_version: 8, opset_import: ["": 17]> g (float[N, 32] x) => (float[N, 32] y) {
        q = MatMul(x, wq) k = MatMul(x, wk) t = Tanh(q) y = Mul(t, k)
    }"""
    left = uniform((32, 4), rng)
    weights = {name: left @ uniform((4, 32), rng) for name in ("wq", "wk")}
    result = compress(parse(text, weights), **_PLAIN, keep=0.2, min_gain=0.0, calibration=feeds())
    sharing = [layer for layer in result.report.layers if layer.first_factor_of]
    assert [layer.first_factor_of for layer in sharing] == [
        layer.name for layer in result.report.layers if layer not in sharing
    ]
    print_report(result.report, output_screen())
    assert "first factor shared with " in capsys.readouterr().out
