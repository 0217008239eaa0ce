"""The limit of memory, kept whatever the size of the samples is; each run is a process of its own.

What a process holds is read from the outside: the program and its libraries take a fixed part.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from onnx_lowrank import compress
from onnx_lowrank.compression import original, trial
from onnx_lowrank.errors import InputError
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.runtime import memory, opener
from onnx_lowrank.runtime.memory import Memory, held
from onnx_lowrank.runtime.opener import Opener
from tests.helpers.models import parse, uniform

pytestmark = pytest.mark.skipif(held() is None, reason="this system does not tell what is held")

# Long rows of a small network: 6 MB of activations for each block and sample.
_PROGRAM = """
import sys
import numpy as np
import onnx
import onnx_lowrank

def feeds():
    rng = np.random.default_rng(1)
    for _ in range(20):
        yield {"x": rng.standard_normal((1, 6000, 32)).astype(np.float32)}

limit = sys.argv[2] if len(sys.argv) > 2 else None
result = onnx_lowrank.compress(
    onnx.load(sys.argv[1]), calibration=feeds(), rank=8, refit=True, heal=2, bench=False,
    memory=limit, simplify=False,
)
print(*result.report.notes, sep="\\n")
print("damage", result.report.check.damage)
"""
MB = 10**6


def _model(path: Path) -> Path:
    rng = np.random.default_rng(0)
    text, value = "", "x"
    weights: dict[str, Array] = {}
    for block in range(4):
        up = uniform((32, 8), rng) @ uniform((8, 128), rng)
        weights |= {f"u{block}": up, f"d{block}": uniform((128, 32), rng) / 8}
        text += f"""h{block} = MatMul({value}, u{block})
            t{block} = Tanh(h{block})
            o{block} = MatMul(t{block}, d{block})
            x{block} = Add({value}, o{block})
            """
        value = f"x{block}"
    model = parse(
        f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[N, L, 32] x) => (float[N, L, 32] y) {{ {text} y = Identity({value}) }}""",
        weights,
    )
    path.write_bytes(model.SerializeToString())
    return path


def _peak(*arguments: str) -> tuple[int, str]:
    """The most that a run holds, in bytes, and what it prints."""
    command = [sys.executable, "-c", _PROGRAM, *arguments]
    largest = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
            for line in status.splitlines():
                if line.startswith("RssAnon:"):
                    largest = max(largest, 1024 * int(line.split()[1]))
            time.sleep(0.005)
        assert process.stdout is not None
        text = process.stdout.read()
    assert process.returncode == 0
    return largest, text


@pytest.mark.slow  # two whole runs in processes of their own
def test_a_run_keeps_the_limit(tmp_path: Path) -> None:
    model = str(_model(tmp_path / "model.onnx"))
    free, plainly = _peak(model)
    peak, text = _peak(model, "300MB")
    assert peak < 300 * MB + 60 * MB
    assert free > peak + 50 * MB, "the limit would not matter"
    assert "at a time, not 16: memory" in text
    assert "at a time, not 16: memory" not in plainly


def test_work_on_weights_asks_for_memory_too(tmp_path: Path) -> None:
    model = str(_model(tmp_path / "model.onnx"))
    run = partial(compress, model, rank=2, check=False, bench=False)
    notes = run(memory="1MB").report.notes
    said = "not simplified: onnxsim takes about 160 MB for it, above the 1 MB of memory=…"
    assert said in notes
    (short,) = (note for note in notes if "is not kept" in note)
    assert short.startswith(
        "memory='1MB': is not kept, layers are worked on one by one: the program"
    )
    assert re.search(r"itself, .*, holds [\d.]+ .B of the 1 MB allowed; expected at least", short)
    notes = run(memory="64GB").report.notes
    assert not any("is not kept" in note or "not simplified" in note for note in notes)


def test_a_sample_that_does_not_fit_is_named_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (memory, original):
        monkeypatch.setattr(module, "held", lambda: 300 * MB)
    rng = np.random.default_rng(0)
    feeds = [{"x": uniform((1, rows, 32), rng)} for rows in (10, 10, 40_000, 10)]
    with pytest.raises(InputError) as caught:
        compress(
            str(_model(tmp_path / "model.onnx")), calibration=feeds, data=feeds[:1], memory="310MB"
        )
    said = re.fullmatch(
        r"memory='310MB': one run of the model on sample 2 of a list of feeds takes [\d.]+ MB "
        r"beside the 300 MB that the program holds, of 310 MB allowed; expected at least about "
        r"(\d+) MB",
        str(caught.value),
    )
    assert said is not None, str(caught.value)
    assert int(said[1]) > 1.1 * 320  # one value inside the model takes 20 MB


@pytest.mark.parametrize("simplify", [False, True])
def test_a_limit_that_is_used_up_blames_the_program(tmp_path: Path, simplify: bool) -> None:
    """No sample is named, and what is said to be enough is enough."""
    rng = np.random.default_rng(0)
    feeds = [{"x": uniform((1, 10, 32), rng)} for _ in range(4)]
    run = partial(
        compress, str(_model(tmp_path / "m.onnx")), data=feeds, simplify=simplify, bench=False
    )
    with pytest.raises(InputError) as caught:
        run(memory="2MB", rank=2)
    said = re.fullmatch(
        r"memory='2MB': the program itself, with the model and its runtime, holds [\d.]+ [MG]B of "
        r"the 2 MB allowed; expected at least about ([\d.]+ [MG]B)",
        str(caught.value),
    )
    assert said is not None, str(caught.value)
    notes = run(memory=said[1].replace(" ", ""), rank=2).report.notes
    assert not any("is not kept" in note for note in notes)


def test_sessions_of_large_models_come_and_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The session of the original is closed meanwhile, and the result is the same."""
    opened = list[str]()

    def noted(self: Opener, model: Path | bytes, **more: Any) -> ort.InferenceSession:
        if isinstance(model, Path):
            opened.append("original" if model.name == "m.onnx" else "made")
        return Opener.open(self, model, **more)

    class Noted(Opener):
        open = noted

    monkeypatch.setattr(trial, "Opener", Noted)
    rng = np.random.default_rng(3)
    feeds = [{"x": rng.standard_normal((1, 40, 32)).astype(np.float32)} for _ in range(12)]
    runs = []
    for most in (1 << 28, 0):
        monkeypatch.setattr(original, "LARGE", most)
        monkeypatch.setattr(opener, "UNPACKED", most)
        opened.clear()
        report = compress(
            _model(tmp_path / "m.onnx"), data=feeds, rank=8, refit=True, bench=False, simplify=False
        ).report
        assert report.check is not None
        runs.append((report.check.providers[0].outputs, opened.count("original")))
    assert runs[0][0][0].relative_l2 == pytest.approx(runs[1][0][0].relative_l2, rel=1e-3)
    assert runs[0][1] == 1
    assert runs[1][1] > 1


@pytest.mark.parametrize("limit", ["100GB", "1MB"])
def test_a_limit_that_was_broken_is_told(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Memory, "room", lambda _: 10**9)  # work that guesses too low
    rng = np.random.default_rng(2)
    model = parse(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[N, 32] x) => (float[N, 32] y) <float[32, 32] W> { y = MatMul(x, W) }""",
        {"W": uniform((32, 32), rng)},
    )
    options: dict[str, Any] = {"bench": False, "simplify": False, "effort": "quick"}
    result = compress(model, rank=4, data={"x": uniform((64, 32), rng)}, memory=limit, **options)
    notes = [note for note in result.report.notes if "was not kept" in note]
    assert len(notes) == (limit == "1MB")
    assert all("of 1 MB allowed" in note for note in notes)
