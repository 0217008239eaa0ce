"""Decoders with a cache, from their first step on; and random samples of which some do not run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest

from tests.helpers.commands import call, weight
from tests.helpers.models import parse

STEP = """<ir_version: 8, opset_import: ["": 17]>
    g (float[batch, seq, 96] inputs_embeds, float[batch, total] attention_mask,
       float[batch, past, 64] past_key_values) => (float[batch, seq, 64] y, float[batch, t, 64] p) {
        key = MatMul(inputs_embeds, W)
        p = Concat<axis = 1>(past_key_values, key)
        turned = Transpose<perm = [0, 2, 1]>(p)
        scores = MatMul(key, turned)
        axes = Constant<value = int64[1] {1}>()
        mask = Unsqueeze(attention_mask, axes)
        masked = Mul(scores, mask)
        y = MatMul(masked, p)
    }"""
# Runs on a count of 1 only.
PICKY = """<ir_version: 8, opset_import: ["": 17]>
    g (float[2, 96] x, int64[1] count) => (float[2, 64] y) {
        a = MatMul(x, W)
        shape = Concat<axis = 0>(count, count)
        b = Reshape<allowzero = 1>(one, shape)
        y = Mul(a, b)
    }"""


def saved(text: str, path: Path, **more: npt.NDArray[Any]) -> Path:
    onnx.save(parse(text, {"W": weight(), **more}), path)
    return path


@pytest.mark.parametrize("more", [(), ("--keep", "0.4"), ("--energy", "0.9", "--refit")])
def test_first_and_later_steps_in_one_folder(tmp_path: Path, more: tuple[str, ...]) -> None:
    model, data = saved(STEP, tmp_path / "step.onnx"), tmp_path / "data"
    data.mkdir()
    rng = np.random.default_rng(0)
    for number, (past, new) in enumerate([(0, 5), (5, 1), (6, 1), (0, 3), (3, 1)]):
        np.savez(
            data / f"{number}.npz",
            inputs_embeds=rng.standard_normal((1, new, 96)).astype(np.float32),
            attention_mask=np.ones((1, past + new), np.float32),
            past_key_values=rng.standard_normal((1, past, 64)).astype(np.float32),
        )
    args = more or ("--rank", "8")
    assert call(model, tmp_path / "o.onnx", "--no-simplify", "--data", data, *args) == 0


def test_a_later_random_sample_that_fails_is_a_note(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = saved(PICKY, tmp_path / "picky.onnx", one=np.ones((1, 1), np.float32))
    for seed in range(3):
        out = tmp_path / f"{seed}.onnx"
        assert call(model, out, "--no-simplify", "--rank", 8, "--seed", seed) == 0
        assert out.exists()
    assert "neither checked nor timed" in capfd.readouterr().out
