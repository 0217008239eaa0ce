"""Execution providers: the list of them, and a run on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnx_lowrank.runtime.session import run as session_run
from tests.helpers.commands import call, report_of
from tests.helpers.targets import PLUGIN_PARAMS, pair, require, save, two_layers


def test_providers_lists_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("providers") == 0
    printed = capsys.readouterr().out
    for name in ("cpu", "openvino", "qnn", "webgpu"):
        assert f"\n{name} " in printed


@pytest.mark.parametrize("name", PLUGIN_PARAMS)
def test_main_job_on_a_plugin(name: str, tmp_path: Path) -> None:
    require(name)
    from onnx_lowrank.runtime.plugins import PLUGINS

    a, out = pair(tmp_path)[0], tmp_path / "out.onnx"
    args = (a, out, "--ep", name, "--rank", 8, "--no-simplify", "--samples", 2, "--allow-slower")
    report = report_of(*args, folder=tmp_path)
    title = PLUGINS[name].title
    assert f"the original: 3 of 3 nodes on {title}" in report["notes"]
    assert f"the result: 5 of 5 nodes on {title}" in report["notes"]
    assert report["check"]["providers"][0]["provider"] == PLUGINS[name].provider
    assert report["check"]["providers"][0]["outputs"][0]["relative_l2"] < 5e-3
    emulated = PLUGINS[name].emulated
    assert bool(report["latency"]) == (not emulated)
    assert (
        f"not timed: {title} is emulated, its times mean nothing" in report["notes"]
    ) == emulated


def test_main_job_on_a_provider_that_gives_nan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from onnx_lowrank.compression import trial
    from onnx_lowrank.runtime import opener
    from onnx_lowrank.runtime.providers import CPU, Provider

    a, out = save(two_layers(), tmp_path / "a.onnx"), tmp_path / "out.onnx"

    def run(session: Any, feed: Any, what: str) -> Any:
        outputs = session_run(session, feed, what)
        if what == str(a):  # the original's first run on the provider
            outputs["y"][:] = np.nan
        return outputs

    monkeypatch.setattr(opener, "run", run)
    monkeypatch.setattr(trial, "resolve_provider", lambda _: Provider("other", CPU.full, "Other"))
    args = (a, out, "--ep", "other", "--rank", 8, "--no-simplify", "--samples", 2)
    report = report_of(*args, folder=tmp_path)
    why = (
        f"{a}: CPUExecutionProvider runs it and gives NaN or Inf in 128 of 128 values of output "
        "'y', where the CPU gives numbers"
    )
    assert f"neither checked nor timed: {why}" in report["notes"]
    assert report["check"] is None
    capsys.readouterr()
    assert call(*args, "--force", "--max-error", 1) == 1
    assert f"--max-error cannot be judged: {why}" in capsys.readouterr().err


@pytest.mark.qnn
def test_main_job_names_what_falls_back(tmp_path: Path) -> None:
    require("qnn")
    a = save(two_layers("N"), tmp_path / "a.onnx")
    args = (a, tmp_path / "out.onnx", "--ep", "qnn", "--rank", 8, "--no-simplify", "--samples", 2)
    report = report_of(*args, folder=tmp_path)
    (note,) = [n for n in report["notes"] if n.startswith("the result: ")]
    assert note.startswith("the result: 0 of 5 nodes on QNN; left to the CPU: ")
    assert "fc2.lowrank (MatMul)" in note


@pytest.mark.qnn
def test_main_job_refuses_a_latency_of_an_emulator(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    require("qnn")
    a, out = save(two_layers(), tmp_path / "a.onnx"), tmp_path / "out.onnx"
    assert call(a, out, "--ep", "qnn", "--speedup", 1.1, "--samples", 2, "--no-simplify") == 1
    assert "emulated here, its times mean nothing" in capsys.readouterr().err
    assert not out.exists()


def test_main_job_of_float16(tmp_path: Path) -> None:
    from onnx_lowrank.runtime.providers import CPU

    a = save(two_layers(kind="float16"), tmp_path / "a.onnx")
    args = (a, tmp_path / "out.onnx", "--rank", 8, "--no-simplify", "--no-bench", "--samples", 2)
    report = report_of(*args, folder=tmp_path)
    told = any(note.startswith("float16 weights judged on CPU only") for note in report["notes"])
    assert told == (not CPU.half)
