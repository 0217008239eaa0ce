"""check and bench of models in ONNX Runtime's own format, as its converter writes them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from onnx_lowrank import bench, check
from onnx_lowrank.errors import InputError
from tests.helpers.commands import call
from tests.helpers.targets import pair


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Two models, and the second one in ONNX Runtime's format."""
    folder = tmp_path_factory.mktemp("ort")
    a, b = pair(folder)
    command = [sys.executable, "-m", "onnxruntime.tools.convert_onnx_models_to_ort", str(b)]
    subprocess.run(
        [*command, "--optimization_style", "Fixed"], check=True, capture_output=True, timeout=300
    )
    return a, b, b.with_suffix(".ort")


def test_check_compares_it(converted: tuple[Path, Path, Path], tmp_path: Path) -> None:
    a, b, ort = converted
    plain, other = (check(a, model).targets[0] for model in (b, ort))
    assert other.outputs[0].relative_l2 == pytest.approx(plain.outputs[0].relative_l2, rel=1e-3)
    assert check(ort, b).targets[0].outputs[0].relative_l2 < 1e-6
    report = tmp_path / "r.json"
    assert call("check", a, ort, "--max-error", 1, "--report", report) == 0
    found = json.loads(report.read_text())
    assert found["files"][1]["parameters"] is None  # not 0: it cannot be read
    assert not [note for note in found["notes"] if "opset" in note or "IR version" in note]


def test_bench_times_it(converted: tuple[Path, Path, Path]) -> None:
    a, _, ort = converted
    report = bench(a, ort, iterations=3, warmup=1)
    assert not report.errors
    assert len(report.targets[0].models) == 2


def test_what_would_change_it_is_refused(converted: tuple[Path, Path, Path]) -> None:
    a, _, ort = converted
    with pytest.raises(InputError, match=r"judge_at=…: expected .onnx models, .* own format"):
        check(a, ort, judge_at=["act"])
    with pytest.raises(InputError, match=r"fix_shapes=…: expected .onnx models"):
        check(a, ort, fix_shapes=True)


def test_main_job_refuses_it(
    converted: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(converted[2], tmp_path / "out.onnx") == 1
    assert "give the .onnx file that it was made from" in capsys.readouterr().err


def test_damaged_or_misnamed(converted: tuple[Path, Path, Path], tmp_path: Path) -> None:
    a, _, ort = converted
    other = tmp_path / "model.bin"
    shutil.copyfile(ort, other)
    with pytest.raises(InputError, match=r"expected that ending"):
        check(a, other)
    cut = tmp_path / "cut.ort"
    cut.write_bytes(ort.read_bytes()[:300])
    with pytest.raises(InputError, match=r"cut\.ort"):
        check(a, cut)
