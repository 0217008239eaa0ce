"""The result in one sentence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from onnx_lowrank.compression.headline import headline
from onnx_lowrank.schema.json_report import File
from onnx_lowrank.schema.measures import Check, Judged, OutputCheck, ProviderCheck
from onnx_lowrank.schema.report import Calibration, Report
from tests.helpers.reports import latency, run_report

_FITTED = Calibration("d.npz", 64, 16, None, 3, {})


def check(error: float, data: str = "d.npz", samples: int = 200) -> Check:
    output = OutputCheck("y", error, error, 1.0, None)
    return Check(data, samples, (ProviderCheck("CPUExecutionProvider", (output,)),))


def result(**changes: Any) -> Report:
    base = replace(
        run_report(3),
        input=File("in.onnx", 1000, 250),
        output=File("out.onnx", 590, 147),
        calibration=_FITTED,
        check=check(0.009),
        latency=(latency(1.38, 1.3, 1.45),),
    )
    return replace(base, **changes)


def test_the_whole_sentence() -> None:
    assert headline(result()) == (
        "41 % smaller, 1.38× as fast on cpu, outputs off by 0.9 % on 200 samples that nothing was "
        "fitted to"
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"output": File(None, 1500, 1)}, "50 % larger, "),
        ({"output": File(None, 1000, 1)}, "as large as before, "),
        ({"output": File(None, 967, 1)}, "3.3 % smaller, "),
        ({"latency": ()}, ", not timed, "),
        ({"latency": (latency(0.8, 0.75, 0.85),)}, ", 0.80× as fast on cpu, "),
        ({"latency": (latency(1.0, 0.99, 1.01),)}, ", as fast as before on cpu, "),
        ({"latency": (latency(1.2, 0.9, 1.5),)}, ", its speed on cpu too noisy to tell, "),
        ({"check": None}, ", outputs not compared"),
        ({"check": check(0.0)}, ", the same outputs on 200 samples that nothing was fitted to"),
        ({"check": check(float("inf"))}, ", outputs beyond any measure on 200 samples"),
        ({"check": check(1e-7)}, ", outputs off by less than 0.001 % on 200 samples"),
        ({"check": check(0.51, "random", 4)}, ", outputs off by 51 % on random input"),
    ],
)
def test_parts(changes: dict[str, Any], said: str) -> None:
    assert said in headline(result(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"calibration": None},
        {"calibration": replace(_FITTED, samples=1)},
        {"settings": {"ep": "cpu", "load_stats": "s.npz"}},
    ],
)
def test_samples_that_may_have_been_fitted_to_are_not_called_unseen(
    changes: dict[str, Any],
) -> None:
    assert headline(result(**changes)).endswith("off by 0.9 % on 200 samples of d.npz")


def test_the_metric_that_the_user_named_follows() -> None:
    judged = Judged(0.003, 0.952, 0.949, 200, 0.001, "top1")
    assert headline(result(judged=judged)).endswith("nothing was fitted to, top1 0.952 → 0.949")
    plain = replace(judged, metric="relative-l2")
    assert headline(result(judged=plain)).endswith("nothing was fitted to")


def test_what_was_not_done_is_not_claimed() -> None:
    plan = result(settings={"dry_run": True}, latency=(), check=None)
    assert headline(plan) == "a plan only: 41 % smaller; nothing was written, run or timed"
    same = File("out.onnx", 1000, 250)
    dense = tuple(
        replace(layer, status="dense", rank=None, format=None) for layer in result().layers
    )
    assert headline(result(layers=dense, output=same)).startswith("nothing was replaced")
