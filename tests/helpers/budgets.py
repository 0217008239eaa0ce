"""A model with a layer that counts and one that hardly does, under a budget."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from onnx_lowrank import Result, compress
from onnx_lowrank.numerics.arrays import Array
from tests.helpers.models import parse

__all__ = ["TEXT", "budgeted", "feeds", "two_branches"]

# The output hangs on the first layer, hardly on the second, which is as large.
TEXT = """<ir_version: 8, opset_import: ["": 17]>
agraph (float[N, 32] x) => (float[N, 32] y)
<float[32, 64] w1, float[64, 32] w2, float[32, 64] v1, float[64, 32] v2, float[1] small>
{
  a1 = MatMul(x, w1)
  a2 = Tanh(a1)
  a3 = MatMul(a2, w2)
  b1 = MatMul(x, v1)
  b2 = Tanh(b1)
  b3 = MatMul(b2, v2)
  b4 = Mul(b3, small)
  y = Add(a3, b4)
}"""


def two_branches() -> onnx.ModelProto:
    rng = np.random.default_rng(7)
    shapes = {"w1": (32, 64), "w2": (64, 32), "v1": (32, 64), "v2": (64, 32)}
    weights = {name: rng.normal(size=s).astype("f4") * 0.2 for name, s in shapes.items()}
    return parse(TEXT, {**weights, "small": np.array([0.05], "f4")})


def feeds(count: int, seed: int = 1) -> list[dict[str, Array]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.normal(size=(16, 32)).astype("f4")} for _ in range(count)]


def budgeted(model: Any, **options: Any) -> Result:
    plain: dict[str, Any] = {"simplify": False, "bench": False, "calibration": feeds(40)}
    return compress(model, **{**plain, "rank_multiple": 1, **options})
