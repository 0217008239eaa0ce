"""The command of a report is the one that was typed, as far as it can be."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import onnx_lowrank
from onnx_lowrank.cli.options import values_of
from onnx_lowrank.cli.program import cli
from onnx_lowrank.compression.origin import command_line
from onnx_lowrank.compression.verbs import BENCH, CHECK, COMPRESS, SWEEP, Verb
from tests.helpers.commands import call, weight
from tests.helpers.models import linear_model, uniform

_LINES = [
    (COMPRESS, "--tolerance 0.05 --metric top1 --objective size --data 'my data.npz'"),
    (COMPRESS, "--keep 0.6 --include 'a*' --include b --exclude c --ops matmul,gemm --refit"),
    (COMPRESS, "--max-size 20MB --no-check --no-simplify --for qnn --external-data always"),
    (COMPRESS, "--input-shape x:1,128 --input-shape y:2 --dim batch=1 --dim n=7 --seed 3"),
    (SWEEP, "--out d --budgets 0.9,0.5 --models --metric cosine --calibrate f.py:feeds"),
    (CHECK, "--target cpu --target ssh://pi --fix-shapes --max-error 0.1 --threads 2"),
    (BENCH, "--threads 1 --threads 4 --iterations 9 --data s.npz"),
]


def parsed(verb: Verb, line: str) -> dict[str, Any]:
    command = cli.commands[verb.name]
    words = shlex.split(line)
    return values_of(verb, command.make_context(verb.name, words).params)


@pytest.mark.parametrize(("verb", "line"), _LINES, ids=lambda value: str(value)[:30])
def test_a_command_is_read_back_as_the_same_values(verb: Verb, line: str) -> None:
    files = ["in.onnx"] if verb is SWEEP else ["in.onnx", "o ut.onnx"]
    values = parsed(verb, f"{shlex.join(files)} {line}")
    made = command_line(verb, values, [Path(file) for file in files])
    assert made is not None
    words = shlex.split(made)
    assert words[0] == "onnx-lowrank"
    rest = words[1:] if verb is COMPRESS else words[2:]
    assert parsed(verb, shlex.join(rest)) == values


def test_what_is_in_memory_has_no_command() -> None:
    assert command_line(COMPRESS, {}, (None, "o.onnx")) is None
    assert command_line(COMPRESS, {"data": {"x": np.zeros(3)}}, ("i.onnx", "o.onnx")) is None
    assert command_line(COMPRESS, {"metric": len}, ("i.onnx", "o.onnx")) is None


def test_a_run_can_be_done_again_by_its_report(tmp_path: Path) -> None:
    source = tmp_path / "in.onnx"
    onnx.save(linear_model(weight()), source)
    options: dict[str, Any] = {"simplify": False, "bench": False, "dims": {"N": 3}}
    result = onnx_lowrank.compress(source, energy=0.99, **options)
    assert result.report.input.digest is not None
    assert len(result.report.input.digest) == 64
    result.save(tmp_path / "first.onnx")
    origin = result.report.origin
    assert origin is not None
    assert origin.versions["onnxruntime"]
    assert origin.command is not None
    words = shlex.split(origin.command)[1:]
    words[words.index("OUT")] = str(tmp_path / "second.onnx")
    assert call(*words) == 0
    assert (tmp_path / "first.onnx").read_bytes() == (tmp_path / "second.onnx").read_bytes()


def test_the_command_of_a_point_makes_its_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    Path("curve").mkdir()
    onnx.save(linear_model(uniform((96, 64), rng)), "in.onnx")
    np.savez("data.npz", x=rng.standard_normal((40, 96)).astype(np.float32))
    curve = onnx_lowrank.sweep(
        "in.onnx", shares=[0.6], data="data.npz", models="curve", bench=False, simplify=False
    )
    dense, point = curve.points
    assert dense.command is None
    assert point.command is not None
    assert point.model is not None
    assert call(*shlex.split(point.command)[1:]) == 0
    kept, made = (onnx.load(path).graph for path in (point.model, "keep-0.60.onnx"))
    assert made.node == kept.node
    assert made.initializer == kept.initializer
