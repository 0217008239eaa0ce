"""How many samples the methods want."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from onnx_lowrank import compress
from tests.helpers.models import parse

TEXT = """<ir_version: 8, opset_import: ["": 17]>
agraph (float[N, 32] x) => (float[N, 32] y) <float[32, 32] w> { y = MatMul(x, w) }"""


@pytest.fixture
def model(rng: np.random.Generator) -> onnx.ModelProto:
    return parse(TEXT, {"w": rng.normal(size=(32, 32)).astype("f4")})


def notes(
    model: onnx.ModelProto, count: int, rng: np.random.Generator, **options: Any
) -> list[str]:
    feeds = [{"x": rng.normal(size=(2, 32)).astype("f4")} for _ in range(count)]
    plain: dict[str, Any] = {"rank": 4, "simplify": False, "bench": False, "check": False}
    report = compress(model, calibration=feeds, **plain, **options).report
    return [note for note in report.notes if "samples to fit to are few" in note]


def test_few_samples_are_told_once_with_what_would_do(
    model: onnx.ModelProto, rng: np.random.Generator
) -> None:
    assert notes(model, 8, rng, refit=True) == [
        "6 samples to fit to are few for these layers: enough would be for calibration about 16, "
        "refit about 20; expect little gain from these methods, or none"
    ]


def test_enough_samples_need_no_note(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    assert notes(model, 40, rng, refit=True) == []


def test_a_batch_counts_as_its_rows(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    def said(size: int) -> list[str]:
        feeds = [{"x": rng.normal(size=(size, 32)).astype("f4")} for _ in range(40)]
        options: dict[str, Any] = {"simplify": False, "bench": False, "check": False}
        report = compress(model, calibration=feeds, rank=4, heal=1, **options).report
        return [note for note in report.notes if "samples to fit to are few" in note]

    assert ["healing about 80" in note for note in said(2)] == [True]
    assert said(8) == []
