"""Two residual blocks: a model in which later layers can make up for what earlier ones lose."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from onnx_lowrank.numerics.arrays import Array
from tests.helpers.models import parse, run_ort

# Two residual blocks: what the first layer loses, the ones after it can make up for.
TEXT = """<ir_version: 8, opset_import: ["": 17]>
agraph (float[N, 24] x) => (float[N, 24] y)
<float[24, 48] w1, float[48] b1, float[48, 24] w2, float[24, 48] w3, float[24] b4, float[48, 24] w4>
{
  h1 = MatMul(x, w1)
  a1 = Add(h1, b1)
  r1 = Tanh(a1)
  o1 = MatMul(r1, w2)
  s1 = Add(x, o1)
  r3 = MatMul(s1, w3)
  r4 = Relu(r3)
  o2 = Gemm<alpha = 0.5>(r4, w4, b4)
  y = Add(o2, s1)
}"""


def two_blocks(rng: np.random.Generator) -> onnx.ModelProto:
    """The model of `TEXT` with random weights."""
    shapes = {"w1": (24, 48), "b1": (48,), "w2": (48, 24), "w3": (24, 48), "b4": (24,)}
    shapes["w4"] = (48, 24)
    return parse(TEXT, {name: rng.normal(size=s).astype("f4") * 0.3 for name, s in shapes.items()})


def feeds_of(rng: np.random.Generator, count: int) -> list[dict[str, Array]]:
    base = np.random.default_rng(3).normal(size=(12, 24))
    return [{"x": (rng.normal(size=(16, 12)) @ base).astype("f4")} for _ in range(count)]


def error(model: Any, other: Any, feeds: list[dict[str, Array]]) -> float:
    total = [
        np.linalg.norm(run_ort(other, f)["y"] - run_ort(model, f)["y"])
        / np.linalg.norm(run_ort(model, f)["y"])
        for f in feeds
    ]
    return float(np.mean(total))
