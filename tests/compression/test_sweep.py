"""A sweep: one model for each budget, as files and in memory."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_lowrank import UsageError, sweep
from onnx_lowrank.cli.program import exit_code
from onnx_lowrank.compression.settings import Settings
from onnx_lowrank.compression.trial import Trial
from onnx_lowrank.graph.load import load
from onnx_lowrank.runtime.session import OrtLog
from tests.helpers.budgets import feeds, two_branches
from tests.helpers.commands import call
from tests.helpers.models import parse


@pytest.fixture
def model() -> onnx.ModelProto:
    return two_branches()


def test_a_sweep(model: onnx.ModelProto, tmp_path: Path) -> None:
    path, out = tmp_path / "in.onnx", tmp_path / "out"
    onnx.save(model, path)
    x = np.concatenate([feed["x"] for feed in feeds(40)])
    np.savez(tmp_path / "data.npz", x=x)
    options = ["--data", str(tmp_path / "data.npz"), "--no-simplify", "--rank-multiple", "1"]
    shares = ["--budgets", "0.8,0.5,0.00001", "--no-bench", "--dim", "N=16"]
    arguments = ["sweep", str(path), "--out", str(out), "--models", *options, *shares]
    assert exit_code(arguments) == 0
    found = json.loads((out / "sweep.json").read_text())
    assert [point["keep"] for point in found["points"]] == [1.0, 0.8, 0.5]
    errors = [point["error"] for point in found["points"]]
    assert errors == sorted(errors)
    assert errors[0] < 1e-6
    assert [m for m in found["missed"] if "--keep 1e-05" in m]
    assert len((out / "sweep.csv").read_text().splitlines()) == 4
    assert (out / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    for share, point in zip(("1.00", "0.80", "0.50"), found["points"], strict=True):
        assert (out / f"keep-{share}.onnx").stat().st_size == point["bytes"]
    assert sorted(p.name for p in out.iterdir() if p.name.startswith(".")) == []
    assert exit_code(arguments) == 1  # nothing is overwritten unasked
    assert exit_code([*arguments, "--force"]) == 0


def test_the_json_of_a_sweep_is_strict(model: onnx.ModelProto) -> None:
    curve = sweep(model, shares=[0.5], calibration=feeds(20), simplify=False, bench=False)
    broken = dataclasses.replace(curve.points[1], error=float("inf"), damage=float("nan"))
    text = dataclasses.replace(curve, points=(broken,)).to_json()
    assert "Infinity" not in text
    assert "NaN" not in text
    (point,) = json.loads(text)["points"]
    assert (point["error"], point["damage"]) == (None, None)


def test_a_sweep_in_memory(model: onnx.ModelProto) -> None:
    curve = sweep(model, shares=[0.5], calibration=feeds(20), simplify=False, bench=False)
    assert [point.keep for point in curve.points] == [1.0, 0.5]
    assert curve.points[1].model is None
    with pytest.raises(UsageError, match="shares=…"):
        sweep(model, shares=[1.5])
    with pytest.raises(UsageError, match="shares=…"):
        sweep(model, shares=[])


@pytest.mark.parametrize(
    ("rows", "count", "searched"),
    [
        *[(1, 4, 0), (1, 100, 16), (1, 1000, 32), (16, 100, 8), (8, 1000, 16), (500, 20, 3)],
        *[(16, 8, 2), (4, 12, 3)],
    ],
)
def test_a_search_reads_some_dozen_samples(
    model: onnx.ModelProto, tmp_path: Path, rows: int, count: int, searched: int
) -> None:
    data = [{"x": np.zeros((rows, 32), "f4")} for _ in range(count)]
    settings = Settings(keep=0.5, calibration=data, calibration_samples=count, bench=False)
    trial = Trial(load(model), settings, tmp_path, OrtLog())
    assert len(trial.split.searched) == searched


def test_what_could_not_be_compared_is_not_called_zero(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = """<ir_version: 8, opset_import: ["": 17]>
    g (float[N, 32] x) => (float[M, 32] y)
    <int64[1] far = {99}, int64[1] first = {0}> {
        h = MatMul(x, w)
        y = Slice(h, far, far, first)
    }"""
    weight = np.random.default_rng(0).normal(size=(32, 32)).astype("f4")
    source, out = tmp_path / "in.onnx", tmp_path / "curve"
    onnx.save(parse(text, {"w": weight}), source)
    options = ("--out", out, "--budgets", 0.5, "--no-bench", "--no-simplify", "--samples", 2)
    assert call("sweep", source, *options) == 0
    assert "nan" not in capsys.readouterr().out
    points = json.loads((out / "sweep.json").read_text())["points"]
    assert [point["error"] for point in points] == [None, None]
