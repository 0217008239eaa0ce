"""The command: how it is called, and the options of the main job."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnxruntime as ort
import pytest

from tests.helpers.commands import M, N, call, error, names, run


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_shows_the_bare_form_and_the_verbs(
    option: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert call(option) == 0
    text = capfd.readouterr().out
    assert "onnx-lowrank IN OUT [OPTIONS]" in text
    assert "\n  inspect " in text
    assert "\n  providers " in text
    assert "\\b" not in text
    for name in (
        *("--energy", "--rank", "--keep", "--include", "--exclude", "--min-gain"),
        *("--rank-multiple", "--input-shape", "--dim", "--data", "--samples", "--seed"),
        *("--max-error", "--no-simplify", "--no-check", "--no-bench", "--threads", "--ep"),
        *("--external-data", "--report", "--dry-run", "--force", "--verbose"),
    ):
        assert f"\n  {name}" in text


def test_without_arguments_it_shows_the_help_and_exits_with_2(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert call() == 2
    shown = capfd.readouterr()
    assert "IN OUT [OPTIONS]" in shown.out
    assert not shown.err


def test_both_entry_points_do_the_same() -> None:
    module = subprocess.run(
        [sys.executable, "-m", "onnx_lowrank", "--help"], capture_output=True, text=True, check=True
    )
    assert module.stdout == run("--help").stdout


def test_version(capfd: pytest.CaptureFixture[str]) -> None:
    assert call("--version") == 0
    assert capfd.readouterr().out.startswith("onnx-lowrank 0.")


def test_inspect_lists_the_linear_maps(two: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert call("inspect", two) == 0
    text = capfd.readouterr().out
    assert "encoder/fc" in text
    assert "head" in text
    assert f"{M}×{N}" in text


def test_providers_lists_the_cpu(capfd: pytest.CaptureFixture[str]) -> None:
    assert call("providers") == 0
    (line,) = [row for row in capfd.readouterr().out.splitlines() if row.startswith("cpu ")]
    assert line.split()[1:3] == ["yes", ort.__version__]


@pytest.mark.parametrize(
    ("args", "code", "needle"),
    [
        (["in.onnx"], 2, "OUT"),
        (["in.onnx", "out.onnx", "more.onnx"], 2, "more.onnx"),
        (["in.onnx", "out.onnx", "--enrgy", "0.9"], 2, "--energy"),
        (["in.onnx", "out.onnx", "--external-data", "maybe"], 2, "always"),
        (["in.onnx", "out.onnx", "--energy", "0.9", "--rank", "4"], 2, "--energy and --rank"),
        (["in.onnx", "out.onnx", "--max-error", "1", "--no-check"], 2, "--no-check"),
        (["in.onnx", "out.onnx", "--max-error", "nan"], 2, "--max-error"),
        (["in.onnx", "out.onnx", "--ops", "nosuch"], 2, "matmul"),
        (["in.onnx", "out.onnx", "--ep", "nosuch"], 1, "cpu"),
        (["in.onnx", "out.onnx", "--input-shape", "x=3"], 2, "name:size"),
        (["in.onnx", "out.onnx", "--dim", "N:3"], 2, "name=size"),
        (["inspcet", "in.onnx"], 1, "'inspect'"),
        (["inspect"], 2, "IN"),
        (["providers", "extra"], 2, "extra"),
    ],
)
def test_wrong_usage_is_one_line(
    args: list[str],
    code: int,
    needle: str,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(source.parent)
    assert call(*args) == code
    assert needle in error(capfd)
    assert names(source.parent) == ["in.onnx"]


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("--energy", ["0", "1.5", "-0.1", "nan", "inf", "abc"]),
        ("--keep", ["0", "1.1", "nan", "x"]),
        ("--rank", ["0", "-3", "1.5", "x"]),
        ("--min-gain", ["1", "-1.01", "nan"]),
        ("--rank-multiple", ["0", "2.5"]),
        ("--samples", ["0", "x"]),
        ("--seed", ["-1"]),
        ("--threads", ["0", "-1"]),
    ],
)
def test_values_out_of_range_are_usage_errors(
    option: str, values: list[str], source: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for value in values:
        assert call(source, source.with_name("out.onnx"), option, value) == 2, value
        text = error(capfd)
        assert option in text
        assert value in text
    assert names(source.parent) == ["in.onnx"]
