"""Models and samples for the tests of calibration."""

from __future__ import annotations

import numpy as np
import onnx

from onnx_lowrank.numerics.arrays import Array
from tests.helpers.models import parse, uniform

__all__ = ["HEAD", "Array", "Feed", "attention", "narrow", "single", "texts"]

Feed = dict[str, Array]

HEAD = '<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>'


_ATTENTION = f"""{HEAD} g (float[B, T, 6] x, int64[B, T] attention_mask) => (float[B, T, 6] y) {{
    h = Tanh(x)
    q = MatMul(h, Wq)
    k = MatMul(h, Wk)
    flat_shape = Constant<value = int64[2] {{-1, 6}}>()
    both = Add(q, k)
    flat = Reshape(both, flat_shape)
    g = Gemm<transB=1>(flat, Wg)
    z = Einsum<equation="btd,dhk->bthk">(h, We)
    shape = Shape(x)
    back = Reshape(g, shape)
    zs = Reshape(z, shape)
    y = Add(back, zs)
}}"""


def attention(rng: np.random.Generator) -> onnx.ModelProto:
    """Four maps, three of which read one activation."""
    weights = {"Wq": (6, 6), "Wk": (6, 6), "Wg": (6, 6), "We": (6, 2, 3)}
    return parse(_ATTENTION, {name: uniform(shape, rng) for name, shape in weights.items()})


def texts(rng: np.random.Generator, count: int) -> list[Feed]:
    """Sequences of different lengths, padded."""
    feeds = []
    for _ in range(count):
        length = int(rng.integers(2, 6))
        mask = (np.arange(length) < rng.integers(1, length + 1, (2, 1))).astype(np.int64)
        x = uniform((2, length, 6), rng)
        feeds.append({"x": x, "attention_mask": mask})
    return feeds


def single(rng: np.random.Generator) -> onnx.ModelProto:
    """One map of 32 elements."""
    return parse(
        f"{HEAD} g (float[N, 32] x) => (float[N, 24] y) {{ y = MatMul(x, W) }}",
        {"W": uniform((32, 24), rng)},
    )


def narrow(rng: np.random.Generator, count: int, rows: int = 40) -> list[Feed]:
    """Inputs that lie near a plane of 5 of 32 dimensions."""
    basis = np.random.default_rng(1).standard_normal((5, 32))
    return [
        {
            "x": (rng.standard_normal((rows, 5)) @ basis).astype(np.float32)
            + 0.01 * uniform((rows, 32), rng)
        }
        for _ in range(count)
    ]
