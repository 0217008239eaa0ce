"""The verb check: two models compared on several targets, and its gates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnx_lowrank.evaluation import check as comparison
from onnx_lowrank.numerics.arrays import Feed
from onnx_lowrank.targets import open_target
from onnx_lowrank.targets.base import Job, Outcome, Target
from tests.helpers.commands import call, report_of
from tests.helpers.models import parse
from tests.helpers.targets import PLUGIN_PARAMS, pair, require, save, two_layers


class Pretender(Target):
    """A target that answers what the test wants."""

    def __init__(self, outcomes: Sequence[Outcome], name: str = "pretender") -> None:
        super().__init__(name)
        self.outcomes = tuple(outcomes)

    def run(self, models: Any, feeds: Sequence[Feed], job: Job, advance: Any) -> Any:
        return self.outcomes


def pretend(monkeypatch: pytest.MonkeyPatch, *outcomes: Outcome) -> None:
    real = open_target
    target = Pretender(outcomes)
    monkeypatch.setattr(
        comparison, "open_target", lambda name: target if name == "pretender" else real(name)
    )


def test_check_says_how_the_faces_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An input with a default value need not be fed, so the outputs alone do not show it."""
    text = """<ir_version: 8, opset_import: ["": 17]>
        g (float[2, 4] x{}) => (float[2, 4] y) {{ y = Mul(x, w) }}"""
    files = []
    for name, inputs in (("a", ", float[4] w"), ("b", "")):
        model = parse(text.format(inputs), {"w": np.arange(4, dtype=np.float32)})
        files.append(tmp_path / f"{name}.onnx")
        onnx.save(model, files[-1])
    report = report_of("check", *files, "--samples", 1, folder=tmp_path)
    wanted = f"{files[1]} beside {files[0]}: input 'w' is gone"
    assert wanted in report["notes"]
    assert "input 'w' is gone" in " ".join(capsys.readouterr().out.split())


def test_check_compares_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = pair(tmp_path)
    report = report_of("check", a, b, "--samples", 3, "--threads", 1, folder=tmp_path)
    assert report["models"] == [str(a), str(b)]
    assert (report["data"], report["samples"]) == ("random", 3)
    (target,) = report["targets"]
    (output,) = target["outputs"]
    assert (target["target"], target["emulated"], output["name"]) == ("cpu", False, "y")
    assert output["relative_l2"] == pytest.approx(0.001, rel=1e-2)
    assert [model["against_cpu"] for model in target["models"]] == [[], []]
    assert target["models"][0]["assignment"] == "3 of 3 nodes on CPU"
    printed = capsys.readouterr().out
    assert "B with A" in printed
    assert "note: random input (seed 0), not real data" in printed


@pytest.mark.parametrize(("limit", "code"), [("0.01", 0), ("0.0001", 3), ("0", 3)])
def test_check_limit(
    limit: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = pair(tmp_path)
    report = report_of("check", a, b, "--max-error", limit, folder=tmp_path, code=code)
    assert (report["missed"] is not None) == (code == 3)
    error = capsys.readouterr().err
    assert ("cpu: output 'y' differs by 0.001 (mean relative L2)" in error) == (code == 3)
    assert error.count("\n") == (code == 3)


@pytest.mark.parametrize("name", PLUGIN_PARAMS)
def test_check_on_a_plugin(name: str, tmp_path: Path) -> None:
    require(name)
    a, b = pair(tmp_path)
    args = ("check", a, b, "--ep", "cpu", "--target", name, "--strict", "--samples", 2)
    report = report_of(*args, folder=tmp_path)
    assert [entry["target"] for entry in report["targets"]] == ["cpu", name]
    entry = report["targets"][1]
    assert 1e-4 < entry["outputs"][0]["relative_l2"] < 5e-3
    for model in entry["models"]:
        assert model["against_cpu"][0]["relative_l2"] < 2e-3
        assert model["assignment"].startswith("3 of 3 nodes on ")


def test_check_judges_by_a_metric(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = pair(tmp_path)
    x = np.random.default_rng(0).standard_normal((80, 32)).astype(np.float32)
    np.savez(tmp_path / "d.npz", x=x)
    np.save(tmp_path / "labels.npy", np.zeros(80, np.int64))
    given = ("check", before, after, "--data", tmp_path / "d.npz", "--metric", "top1")
    entry = report_of(*given, folder=tmp_path)["targets"][0]["judged"]
    assert entry["metric"] == "top1"
    assert (entry["before"], entry["samples"]) == (1.0, 16)
    assert "B by A: top1 1 →" in capsys.readouterr().out
    labelled = report_of(*given, "--labels", tmp_path / "labels.npy", folder=tmp_path)
    assert labelled["targets"][0]["judged"]["before"] < 1.0
    assert call(*given[:-2], "--labels", tmp_path / "labels.npy") == 2
    assert "--labels needs --metric" in capsys.readouterr().err


@pytest.mark.qnn
def test_check_fixes_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    require("qnn")
    a, b = pair(tmp_path, rows="N")
    args = ("check", a, b, "--ep", "qnn", "--strict", "--dim", "N=4", "--samples", 1)
    assert call(*args) == 1
    error = capsys.readouterr().err
    assert "--strict wants every node there: 0 of 3 nodes on QNN; left to the CPU:" in error
    report = report_of(*args, "--fix-shapes", folder=tmp_path)
    assert report["targets"][0]["models"][0]["assignment"] == "3 of 3 nodes on QNN"
    assert "copies with fixed inputs are run: x [4, 32]" in report["notes"]


def test_check_takes_data(tmp_path: Path) -> None:
    a, b = pair(tmp_path)
    np.savez(tmp_path / "d.npz", x=np.ones((8, 32), np.float32))
    report = report_of("check", a, b, "--data", tmp_path / "d.npz", folder=tmp_path)
    assert (report["data"], report["samples"]) == (str(tmp_path / "d.npz"), 2)


def test_two_models_with_different_inputs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = pair(tmp_path)[0]
    c = save(two_layers(5), tmp_path / "c.onnx")
    text = '<ir_version: 8, opset_import: ["": 17]> g (float[4] z) => (float[4] y) { y = Abs(z) }'
    d = save(parse(text), tmp_path / "d.onnx")
    for verb in ("check", "bench"):
        assert call(verb, a, c) == 1
        assert capsys.readouterr().err == (
            f"onnx-lowrank: error: {a} and {c} have different inputs: x float32[4, 32] and "
            "x float32[5, 32]\n"
        )
        assert call(verb, a, d) == 1
        assert "have different inputs: x float32[4, 32] and z float32[4]" in capsys.readouterr().err


def test_one_model_may_fix_what_the_other_leaves_free(tmp_path: Path) -> None:
    fixed = save(two_layers(3), tmp_path / "fixed.onnx")
    free = save(two_layers("N"), tmp_path / "free.onnx")
    report = report_of("check", free, fixed, "--dim", "N=3", folder=tmp_path)
    assert report["targets"][0]["outputs"][0]["relative_l2"] < 1e-6


def test_check_reports_what_did_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = pair(tmp_path)
    outcome = Outcome(error="b.onnx: it gives NaN", nodes={"P": ("n",)}, notes=("slow today",))
    pretend(monkeypatch, Outcome(outputs=({"y": np.ones((4, 32))},)), outcome)
    args = ("check", a, b, "--ep", "pretender", "--samples", 1, "--max-error", 1)
    report = report_of(*args, folder=tmp_path, code=1)
    captured = capsys.readouterr()
    assert captured.err == "onnx-lowrank: error: pretender: b.onnx: it gives NaN\n"
    assert "B does not run: b.onnx: it gives NaN" in captured.out
    (entry,) = report["targets"]
    assert entry["outputs"] == []
    assert entry["models"][0]["against_cpu"][0]["name"] == "y"
    assert entry["models"][1]["assignment"] == "1 node on P"
    assert "pretender: slow today" in report["notes"]


def test_check_of_float16_says_where_it_was_judged(tmp_path: Path) -> None:
    a, b = pair(tmp_path, kind="float16")
    report = report_of("check", a, b, "--samples", 1, folder=tmp_path)
    note = "float16 weights judged on cpu only, which computes them in float32"
    from onnx_lowrank.runtime.providers import CPU

    assert any(text.startswith(note) for text in report["notes"]) == (not CPU.half)


@pytest.mark.qnn
def test_check_of_float16_where_it_is_computed(tmp_path: Path) -> None:
    require("qnn")
    a, b = pair(tmp_path, kind="float16")
    report = report_of("check", a, b, "--samples", 1, "--ep", "qnn", folder=tmp_path)
    assert not any("float16" in text for text in report["notes"])


def test_a_model_that_is_too_large_misses_the_gate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = pair(tmp_path)
    size = after.stat().st_size
    report = tmp_path / "r.json"
    args = ("check", before, after, "--samples", 2, "--report", report)
    assert call(*args, "--max-size", size) == 0
    assert json.loads(report.read_text())["missed"] is None
    assert call(*args, "--max-size", size - 1) == 3
    assert f"has {size:,} bytes, more than --max-size {size - 1}" in capsys.readouterr().err
    assert "more than" in json.loads(report.read_text())["missed"]


def test_a_limit_is_missed_where_nothing_can_be_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = """<ir_version: 8, opset_import: ["": 17]>
    g (float[N, 32] x) => (float[M, 32] y)
    <int64[1] far = {9}, int64[1] first = {0}> {
        h = MatMul(x, w)
        y = Slice(h, far, far, first)
    }"""
    weight = np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32)
    path, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(parse(text, {"w": weight}), path)
    assert call("check", path, path, "--max-error", 0.1) == 3
    assert "no output holds anything" in capsys.readouterr().err
    assert call(path, out, "--rank", 4, "--max-error", 0.1, "--no-bench") == 3
    assert "no output holds anything" in capsys.readouterr().err
    assert not out.exists()
