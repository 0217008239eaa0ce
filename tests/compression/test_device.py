"""A device for spectra and factors: the ranks of the processor, or one line that says why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnx_lowrank import InputError, sweep
from onnx_lowrank.fitting import fit, spectra
from onnx_lowrank.numerics.engine import Engine, engine_of
from tests.helpers.commands import call
from tests.helpers.deep import deep, feeds_for
from tests.helpers.models import factored


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The devices that work was done on."""
    pytest.importorskip("torch", reason="torch is not installed")
    found: set[str] = set()

    def watched(device: str) -> Engine:
        found.add(device)
        return engine_of(device)

    for module in (fit, spectra):
        monkeypatch.setattr(module, "engine_of", watched)
    return found


@pytest.mark.parametrize("goal", [{"energy": 0.9}, {"keep": 0.5}, {"rank": 5}])
def test_the_same_ranks(goal: dict[str, Any], asked: set[str], rng: np.random.Generator) -> None:
    model, feeds = deep(rng), feeds_for(rng, 40)
    given: dict[str, Any] = {**goal, "calibration": feeds, "data": feeds[:6], "check": True}
    here = factored(model, **given)
    assert asked == {"cpu"}
    asked.clear()
    there = factored(model, **given, device="torch:cpu")
    assert asked == {"torch:cpu"}
    assert [own.rank for own in there.report.layers] == [own.rank for own in here.report.layers]
    assert here.report.check is not None
    assert there.report.check is not None
    assert there.report.check.damage == pytest.approx(here.report.check.damage, rel=1e-3)


def test_a_sweep_takes_a_device(asked: set[str], rng: np.random.Generator) -> None:
    model, feeds = deep(rng, 3), feeds_for(rng, 24)
    found = sweep(model, shares=[0.5], data=feeds, bench=False, simplify=False, device="torch:cpu")
    assert asked == {"torch:cpu"}
    assert found.settings["device"] == "torch:cpu"


def test_it_is_asked_for_before_the_work(rng: np.random.Generator) -> None:
    with pytest.raises(InputError, match="device='none of these'"):
        factored(deep(rng, 1), rank=3, device="none of these")


def test_the_command_says_it_in_one_line(
    tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(deep(rng, 1), source)
    assert call(str(source), str(target), "--rank", "3", "--device", "cuda:99") == 1
    error = capsys.readouterr().err
    assert error.startswith("onnx-lowrank: error: --device cuda:99: expected ")
    assert error.count("\n") == 1
    assert not target.exists()
    assert list(tmp_path.iterdir()) == [source]
