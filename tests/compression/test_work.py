"""Runs that were ended go on from the folder of their work."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnx_lowrank import GateError, InputError, sweep
from onnx_lowrank.errors import Terminated
from onnx_lowrank.runtime import pieces
from onnx_lowrank.runtime.opener import Opener
from tests.helpers.commands import call
from tests.helpers.deep import deep, feeds_for
from tests.helpers.models import as_proto, factored
from tests.helpers.places import ROOT

COUNT = 70
# Ends itself, as by SIGKILL, at the so manieth time that a stage goes on.
KILLED = """
import contextlib, os, signal, sys
from onnx_lowrank.compression.result import Destination
from onnx_lowrank.compression.run import execute
from onnx_lowrank.compression.settings import Settings
from onnx_lowrank.runtime import pieces
from onnx_lowrank.runtime.log import OrtLog
from pathlib import Path

pieces.SECONDS = 0.0
folder, stage, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])


class Killing:
    left = count

    def plan(self, names, part=""):
        pass

    def detail(self, text):
        pass

    @contextlib.contextmanager
    def stage(self, name, total):
        def advance(units):
            if name == stage:
                self.left -= 1
                if not self.left:
                    os.kill(os.getpid(), signal.SIGKILL)

        yield advance


options = dict(keep=0.5, data=str(folder / "data.npz"), samples=8, calibration_samples=60)
options |= dict(fisher=True, refit=True, heal=12, threads=1, bench=False, simplify=False)
options |= dict(work=folder / "work")
target = Destination(folder / "out.onnx")
execute(folder / "model.onnx", Settings.of(options), target, Killing(), OrtLog())
"""


def options(rng: np.random.Generator) -> dict[str, Any]:
    feeds = feeds_for(rng, COUNT)
    return {"keep": 0.5, "calibration": feeds, "data": feeds[:6], "check": True, "threads": 1}


def written(model: onnx.ModelProto, **given: Any) -> bytes:
    found: bytes = as_proto(factored(model, **given).model).SerializeToString()
    return found


def notes(model: onnx.ModelProto, **given: Any) -> list[str]:
    found = factored(model, **given).report.notes
    return [note for note in found if note.startswith("work=")]


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
@pytest.mark.slow  # six processes
def test_a_run_that_is_killed_again_and_again(rng: np.random.Generator, tmp_path: Path) -> None:
    """The same bytes as of a run that nobody disturbs."""
    np.savez(
        tmp_path / "data.npz", x=np.stack([feed["x"] for feed in feeds_for(rng, COUNT, 1)])[:, 0]
    )
    onnx.save(deep(rng), tmp_path / "model.onnx")

    def run(stage: str, count: int) -> int:
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(tmp_path), stage, str(count)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert not done.stderr.strip(), done.stderr
        return done.returncode

    for stage, count in (("calibrate", 2), ("measure", 3), ("refit", 3), ("heal", 5)):
        assert run(stage, count) == -9
        assert not (tmp_path / "out.onnx").exists()
        assert list((tmp_path / "work").iterdir())
    assert run("", 1) == 0
    continued = (tmp_path / "out.onnx").read_bytes()
    (tmp_path / "work").rename(tmp_path / "aside")
    (tmp_path / "out.onnx").unlink()
    assert run("", 1) == 0
    assert (tmp_path / "out.onnx").read_bytes() == continued


class Interrupting:
    """Counts the runs of models, and ends the program at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runs, self.end = 0, 0
        plain = Opener.run

        def counted(*arguments: Any) -> Any:
            self.runs += 1
            if self.runs == self.end:
                raise Terminated
            return plain(*arguments)

        monkeypatch.setattr(Opener, "run", counted)


@pytest.mark.parametrize("method", ["moments", "heal"])
def test_what_was_done_is_not_done_again(
    method: str, rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "SECONDS", 0.0)
    model, given = deep(rng, 3), options(rng)
    given |= {"keep": None, "rank": 5, "effort": "quick", "data": None}
    given |= {"heal": 40} if method == "heal" else {}
    counting = Interrupting(monkeypatch)
    plain = written(model, **given)
    whole, counting.runs = counting.runs, 0
    counting.end = whole - (30 if method == "heal" else 20)
    given["work"] = tmp_path / "work"
    with pytest.raises(Terminated):
        written(model, **given)
    done, counting.end, counting.runs = counting.runs, 0, 0
    assert written(model, **given) == plain
    assert counting.runs < whole - done // 2
    counting.runs = 0
    assert written(model, **given) == plain
    assert counting.runs < 20


def test_the_second_run_says_what_it_took(rng: np.random.Generator, tmp_path: Path) -> None:
    model, given = deep(rng, 3), options(rng)
    plain = written(model, **given)
    given["work"] = tmp_path / "work"
    assert notes(model, **given) == []
    (note,) = notes(model, **given)
    assert "taken from an earlier run: " in note
    assert written(model, **given) == plain
    changed, taken = notes(model, **{**given, "keep": 0.4})
    assert "changed since the last run there: settings (keep); what depends on" in changed
    assert "taken from an earlier run" in taken
    other = deep(rng, 3)
    (changed,) = notes(other, **given)
    assert "changed since the last run there: model, settings (keep);" in changed
    assert written(other, **given) == written(other, **{**given, "work": None})


def test_other_samples_are_noticed(rng: np.random.Generator, tmp_path: Path) -> None:
    model, given = deep(rng, 2), options(rng)
    given["work"] = tmp_path / "work"
    written(model, **given)
    given["calibration"][3]["x"][0, 0] += 1.0
    assert written(model, **given) == written(model, **{**given, "work": None})


def test_damaged_pieces_are_made_again(rng: np.random.Generator, tmp_path: Path) -> None:
    model, given = deep(rng, 2), options(rng)
    given["work"] = tmp_path / "work"
    plain = written(model, **given)
    for number, path in enumerate(sorted(given["work"].glob("*.npz"))):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2] if number % 2 else b"")
    (note,) = notes(model, **given)
    assert "damaged, and made again" in note
    assert written(model, **given) == plain


def test_with_an_executor(rng: np.random.Generator, tmp_path: Path) -> None:
    model, given = deep(rng, 3), options(rng)
    plain = written(model, **given)
    with ThreadPoolExecutor(2) as pool:
        for _ in range(2):
            assert written(model, **given, work=tmp_path / "work", executor=pool) == plain
    assert "taken from an earlier run" in notes(model, **given, work=tmp_path / "work")[0]


def test_a_sweep_keeps_its_work(rng: np.random.Generator, tmp_path: Path) -> None:
    model, feeds = deep(rng, 2), feeds_for(rng, 24)
    given: dict[str, Any] = {"shares": [0.5], "data": feeds, "bench": False, "simplify": False}
    plain = sweep(model, **given)
    for _ in range(2):
        found = sweep(model, **given, work=tmp_path / "work")
        assert found.points == plain.points
    assert any("taken from an earlier run" in note for note in found.notes)


def test_a_gate_that_closes_keeps_the_work(rng: np.random.Generator, tmp_path: Path) -> None:
    model, given = deep(rng, 2), options(rng)
    with pytest.raises(GateError):
        factored(model, **given, max_error=1e-9, work=tmp_path / "work")
    _, note = notes(model, **given, work=tmp_path / "work")
    assert "taken from an earlier run" in note


def test_a_folder_of_its_own(
    rng: np.random.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx.save(deep(rng, 1), tmp_path / "model.onnx")
    (tmp_path / "work").mkdir()
    words = [
        tmp_path / "model.onnx",
        tmp_path / "work" / "out.onnx",
        "--rank",
        "3",
        "--no-simplify",
    ]
    assert call(*words, "--work", tmp_path / "work") == 1
    assert "expected a folder of its own, got the one of " in capsys.readouterr().err
    assert call(*words, "--work", tmp_path) == 1
    assert "got one with model.onnx" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"folder .*no does not exist"):
        factored(deep(rng, 1), rank=3, work=tmp_path / "no" / "work")
