"""The gate for pull requests: the workflow in the documentation does what it says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.helpers.commands import call, error, names, weight
from tests.helpers.models import linear_model
from tests.helpers.places import ROOT


def command() -> list[str]:
    """The words of the workflow's step that compresses."""
    text = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    (workflow,) = re.findall(r"```yaml\n(.*?)```", text, re.S)
    (step,) = re.findall(r"run: >\n(.*?)\n      - ", workflow, re.S)
    return shlex.split(step)[1:]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    onnx.save(linear_model(weight()), "model.onnx")
    x = np.random.default_rng(0).standard_normal((24, 96)).astype(np.float32)
    np.savez("data.npz", x=x)
    return tmp_path


def test_within_the_limits_the_model_and_the_comment_are_written(place: Path) -> None:
    assert call(*command(), "--no-simplify", "--no-bench") == 0
    found = ["data.npz", "model.onnx", "report.html", "report.md", "small.onnx"]
    assert names(place) == found
    assert "smaller" in Path("report.md").read_text("utf-8").splitlines()[2]


@pytest.mark.parametrize(("option", "limit"), [("--max-error", "0"), ("--max-size", "1KB")])
def test_a_missed_limit_is_the_comment(
    option: str, limit: str, place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = command()
    words[words.index(option) + 1] = limit
    assert call(*words, "--no-simplify", "--no-bench") == 3
    assert names(place) == ["data.npz", "model.onnx", "report.html", "report.md"]
    said = error(capfd)
    assert option in said
    lines = Path("report.md").read_text("utf-8").splitlines()
    assert lines[2] == "> [!CAUTION]"
    assert lines[3].startswith(f"> **{option} ")
    assert "nothing written" in lines[3]
    page = Path("report.html").read_text("utf-8")
    assert re.search(rf'<h1 class="verdict bad">{option} [^<]*nothing written</h1>', page)
