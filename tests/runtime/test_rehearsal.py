"""A crash, a hang or a killed process inside ONNX Runtime is one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_lowrank.errors import CrashError
from onnx_lowrank.runtime.rehearsal import attempt, child_id, rehearse
from tests.helpers.commands import N, call, error, litter, names, weight
from tests.helpers.models import parse

posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
FEED = {"x": np.ones((2, 96), np.float32)}
# A frame of no samples: ONNX Runtime divides by it.
DIVIDES = f"""<ir_version: 8, opset_import: ["": 17]>
    g (float[1, 96, 1] x, int64 length) => (float[a, b, c, d] y, float[1, 96, {N}] z) {{
        step = Constant<value = int64 {{1}}> ()
        before = Neg(x)
        flat = Transpose<perm = [0, 2, 1]> (before)
        v = MatMul(flat, W)
        z = Mul(before, v)
        framed = STFT(before, step, , length)
        y = Neg(framed)
    }}"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "two words.onnx"
    text = """<ir_version: 8, opset_import: ["": 17]>
        g (float[2, 96] x) => (float[2, 64] y) { a = Neg(x) y = MatMul(a, W) }"""
    onnx.save(parse(text, {"W": weight()}), path)
    return path


@pytest.fixture
def divides(tmp_path: Path) -> Path:
    path = tmp_path / "divides.onnx"
    onnx.save(parse(DIVIDES, {"W": weight()}), path)
    np.savez(tmp_path / "zero.npz", x=np.ones((1, 96, 1), np.float32), length=np.array([0]))
    np.savez(tmp_path / "eight.npz", x=np.ones((1, 96, 1), np.float32), length=np.array([8]))
    return path


def test_one_child_serves_all_models(model: Path) -> None:
    assert attempt(model, FEED, what="m") is None
    first = child_id()
    assert "does not run it" in str(attempt(model, {"x": FEED["x"][:1]}, what="m"))
    assert "does not load it" in str(attempt(model.with_name("none.onnx"), what="m"))
    rehearse(model.with_name("none.onnx"), what="m")  # to be said by who loads it
    assert attempt(model, FEED, what="m", keep=True) is None
    assert attempt(model, FEED, what="m") is None
    assert child_id() == first


@posix
def test_a_killed_child_is_named_and_replaced(model: Path) -> None:
    attempt(model, FEED, what="m")
    killed = child_id()
    assert killed is not None
    os.kill(killed, signal.SIGKILL)
    with pytest.raises(CrashError, match=r"^two words: .*SIGKILL.*memory"):
        attempt(model, FEED, what="two words")
    assert attempt(model, FEED, what="m") is None
    assert child_id() != killed


@posix
def test_a_hang_ends(model: Path) -> None:
    attempt(model, FEED, what="m")
    stopped = child_id()
    assert stopped is not None
    os.kill(stopped, signal.SIGSTOP)
    with pytest.raises(CrashError, match=r"does not end within 0.2 s"):
        attempt(model, FEED, what="m", seconds=0.2)
    assert attempt(model, FEED, what="m") is None


@posix
def test_a_crash_names_the_model_and_the_node(
    divides: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = names(tmp_path)
    out, data = tmp_path / "out.onnx", tmp_path / "zero.npz"
    assert call(divides, out, "--no-simplify", "--data", data, "--rank", 4) == 1
    message = error(capfd)
    assert f"{divides.name}: ONNX Runtime" in message
    assert "SIGFPE" in message
    assert "node 'framed' (STFT)" in message
    assert "--no-check --no-bench" in message
    assert names(tmp_path) == before
    assert litter(tmp_path) == []


@posix
def test_what_crashes_is_converted_where_it_is_not_run(divides: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    assert call(divides, out, "--no-simplify", "--no-check", "--no-bench", "--rank", 4) == 0
    assert call(divides, out, "--force", "--no-simplify", "--no-bench", "--rank", 4,
                "--data", tmp_path / "eight.npz") == 0  # fmt: skip


@posix
def test_check_and_bench_survive_too(
    divides: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert call("check", divides, divides, "--data", tmp_path / "zero.npz") == 1
    captured = capfd.readouterr()
    assert "SIGFPE" in captured.out + captured.err
    assert "Traceback" not in captured.err


@posix
def test_closed_streams_a_foreign_folder_and_no_safe_path(model: Path, tmp_path: Path) -> None:
    (tmp_path / "onnx.py").write_text("raise SystemExit(9)")
    code = (
        "import os, sys; from onnx_lowrank.cli.program import run; os.close(0); os.close(2); "
        "sys.exit(run(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, model, tmp_path / "out.onnx", "--no-simplify",
         "--no-bench", "--rank", "4"],
        cwd=tmp_path, check=False, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0
    assert (tmp_path / "out.onnx").exists()


@posix
def test_the_child_ends_with_its_parent(model: Path) -> None:
    code = (
        "import os, sys, pathlib; from onnx_lowrank.runtime import rehearsal as r; "
        "r.rehearse(pathlib.Path(sys.argv[1]), what='m'); print(r.child_id(), flush=True); "
        "os.kill(os.getpid(), 9)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, model], capture_output=True, text=True, check=False
    )
    number = int(done.stdout)
    for _ in range(200):
        try:
            os.kill(number, 0)
        except ProcessLookupError:
            return
        state = Path(f"/proc/{number}/stat")
        if state.exists() and state.read_text().split()[2] == "Z":
            return  # nobody here asks for its exit code
        time.sleep(0.05)
    pytest.fail("the child lives on")
