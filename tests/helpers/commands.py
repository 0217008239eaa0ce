"""The command as tests call it, and what they look at afterwards."""

from __future__ import annotations

import json
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from onnx_lowrank.cli.program import exit_code
from tests.helpers.models import known_rank

__all__ = [
    "COMMAND",
    "QUICK",
    "RANK",
    "M",
    "N",
    "call",
    "error",
    "litter",
    "names",
    "one_line",
    "ranks",
    "report_of",
    "run",
    "weight",
]

COMMAND = Path(sysconfig.get_path("scripts")) / "onnx-lowrank"
QUICK = ("--no-simplify", "--no-bench", "--samples", "2")
M, N, RANK = 96, 64, 8


def weight(seed: int = 0, m: int = M, n: int = N, rank: int = RANK) -> npt.NDArray[np.float32]:
    """Of rank 8, unless another is asked for."""
    return known_rank(m, n, rank, np.random.default_rng(seed))


def call(*args: object) -> int:
    """The exit code of the command, run in this process."""
    return exit_code([str(arg) for arg in args])


def run(*args: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(
        [str(COMMAND), *map(str, args)], capture_output=True, text=True, check=False, cwd=cwd
    )


def report_of(*args: object, folder: Path, code: int = 0) -> dict[str, Any]:
    """The report of a run that has to end with this exit code."""
    path = folder / "report.json"
    assert call(*args, "--report", path) == code
    report: dict[str, Any] = json.loads(path.read_text())
    return report


def ranks(report: dict[str, Any]) -> list[int | None]:
    """Of all layers."""
    return [layer["rank"] for layer in report["layers"]]


def error(capfd: pytest.CaptureFixture[str]) -> str:
    """Standard error, which has to be one line in the command's form."""
    return one_line(capfd.readouterr().err)


def one_line(text: str) -> str:
    """A text that has to be one line in the command's form, and no internal error."""
    assert text.startswith("onnx-lowrank: error: ")
    assert text.endswith("\n")
    assert text.count("\n") == 1
    assert "Traceback" not in text
    assert "internal error" not in text
    return text


def names(folder: Path) -> list[str]:
    """What is in a folder."""
    return sorted(item.name for item in folder.iterdir())


def litter(folder: Path) -> list[str]:
    """What a run should have taken away."""
    return [item.name for item in folder.rglob(".onnx-lowrank-*")]
