"""The real onnxsim in this process: a process of its own for each model takes seconds to start."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from onnx_lowrank.graph import simplify

__all__ = ["onnxsim_here"]


def _run(command: Sequence[str], **_: Any) -> subprocess.CompletedProcess[str]:
    """Does what the worker's command line does."""
    script = next(index for index, part in enumerate(command) if part.endswith(".py"))
    spec = importlib.util.spec_from_file_location("onnxsim_worker", Path(command[script]))
    assert spec is not None
    assert spec.loader is not None
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    without_torch = "torch" not in sys.modules
    try:
        worker.main(*command[script + 1 :])
    except Exception as error:
        return subprocess.CompletedProcess(command, 1, "", f"{type(error).__name__}: {error}")
    finally:
        if without_torch:  # the worker keeps it from being imported; other tests want it
            sys.modules.pop("torch", None)
    return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def onnxsim_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the simplification run onnxsim in this process."""
    stand_in = SimpleNamespace(run=_run, DEVNULL=subprocess.DEVNULL)
    monkeypatch.setattr(simplify, "subprocess", stand_in)
