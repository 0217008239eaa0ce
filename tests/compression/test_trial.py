"""Samples that run together, without their padding, in a whole run."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnx_lowrank import Result, compress
from onnx_lowrank.compression import original, trial
from onnx_lowrank.compression.settings import Settings
from onnx_lowrank.data.joining import APART, Joining
from onnx_lowrank.evaluation.joinable import joinable
from onnx_lowrank.graph.load import load
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.runtime.log import OrtLog
from onnx_lowrank.runtime.opener import Opener
from onnx_lowrank.runtime.providers import CPU
from tests.helpers.models import parse

TEXT = """<ir_version: 8, opset_import: ["": 17]>
g (float[B, T, 32] x, int64[B, T] attention_mask) => (float[B, 24] y) {
    h = MatMul(x, V) t = Tanh(h) k = MatMul(t, W) r = Relu(k)
    whole = Cast<to = 1>(attention_mask) c = Unsqueeze(whole, two)
    counted = Mul(r, c) sum = ReduceSum<keepdims = 0>(counted, one)
    count = ReduceSum<keepdims = 1>(whole, one) y = Div(sum, count)
}"""


@pytest.fixture
def text(rng: np.random.Generator) -> onnx.ModelProto:
    falling = 0.8 ** np.arange(32)
    weights = {
        "V": (rng.standard_normal((32, 32)) * falling @ rng.standard_normal((32, 48))).astype("f4"),
        "W": rng.standard_normal((48, 24)).astype("f4"),
    }
    return parse(TEXT, {**weights, "one": np.array([1]), "two": np.array([2])})


def padded(rng: np.random.Generator, count: int, length: int = 20) -> list[dict[str, Array]]:
    return [
        {
            "x": rng.standard_normal((1, length, 32)).astype("f4"),
            "attention_mask": (np.arange(length) < rng.integers(2, 12))[None].astype(np.int64),
        }
        for _ in range(count)
    ]


def test_what_is_chosen_is_what_single_samples_choose(
    text: onnx.ModelProto, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    feeds, found = padded(rng, 80), list[Joining]()
    options: dict[str, Any] = {"keep": 0.5, "bench": False, "simplify": False, "rank_multiple": 1}

    def seen(*arguments: Any) -> Joining:
        found.append(joinable(*arguments))
        return found[-1]

    def run(how: Any) -> Result:
        monkeypatch.setattr(trial, "joinable", how)
        return compress(text, calibration=feeds, **options)

    together, alone = run(seen), run(lambda *_: APART)
    (own,) = found
    assert own.size > 1
    assert own.axes == {"x": 1, "attention_mask": 1}
    damages = []
    for result in (together, alone):
        goal = result.report.goal
        assert goal is not None
        assert goal.predicted_damage is not None
        assert goal.achieved_damage is not None
        damages.append((goal.predicted_damage, goal.achieved_damage))
    # Fisher information of other batches has other random directions.
    np.testing.assert_allclose(damages[0], damages[1], rtol=0.3)
    ranks = [[layer.rank or 0 for layer in result.report.layers] for result in (together, alone)]
    assert np.abs(np.array(ranks[0]) - ranks[1]).max() <= 3


def test_a_session_that_rests_is_gone(
    text: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after it was asked for on the processor by name; then it is opened again."""
    monkeypatch.setattr(original, "LARGE", 0)
    source, log, notes = load(text), OrtLog(), dict[str, None]()
    opener = Opener(tmp_path, 1, log, notes)
    found = original.Original(source, Settings(), tmp_path, opener, CPU, lambda _: None)
    held = weakref.ref(found.on_cpu)
    assert found.session is held()
    found.rest()
    assert held() is None
    assert found.on_cpu is found.session


@pytest.mark.parametrize(("limit", "stays"), [("100KB", False), ("1GB", True), (None, True)])
def test_a_session_rests_where_a_limit_is_near(
    limit: str | None, stays: bool, text: onnx.ModelProto, tmp_path: Path
) -> None:
    opener = Opener(tmp_path, 1, OrtLog(), {})
    settings = Settings(memory=limit)
    found = original.Original(load(text), settings, tmp_path, opener, CPU, lambda _: None)
    held = weakref.ref(found.session)
    found.rest()
    assert (held() is not None) is stays
