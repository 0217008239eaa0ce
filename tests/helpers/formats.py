"""Models and samples for weights in 8 and 4 bits, and how far results are off."""

from __future__ import annotations

import numpy as np
import onnx

from onnx_lowrank import Result
from onnx_lowrank.numerics.arrays import Array, Feed
from tests.helpers.models import parse

__all__ = ["BITS", "HEAD", "LOST", "error", "feeds", "operators", "two", "weight"]

HEAD = '<ir_version: 8, opset_import: ["" : 17]>'
BITS = ["8", "4"]
LOST = {"8": 0.02, "4": 0.15}


def two(rng: np.random.Generator) -> onnx.ModelProto:
    """A MatMul, then a Gemm with a transposed weight."""
    return parse(
        f"""{HEAD} g (float[N,96] x) => (float[N,48] y) {{
            [first] h = MatMul (x, W1)
            a = Tanh (h)
            [second] y = Gemm <transB=1> (a, W2, b)
        }}""",
        {
            "W1": weight(rng, 96, 80),
            "W2": weight(rng, 48, 80),
            "b": rng.standard_normal(48).astype(np.float32),
        },
    )


def weight(rng: np.random.Generator, m: int, n: int) -> Array:
    return np.asarray(rng.standard_normal((m, n)) / 8, np.float32)


def feeds(rng: np.random.Generator, count: int = 32, size: int = 96) -> list[Feed]:
    """Inputs of which a few directions hold most of the energy."""
    basis = rng.standard_normal((size, size)) * np.exp(-np.arange(size) / 16)[:, None]
    return [
        {"x": (rng.standard_normal((8, size)) @ basis).astype(np.float32)} for _ in range(count)
    ]


def error(result: Result) -> float:
    assert result.report.check is not None
    return result.report.check.providers[0].outputs[0].relative_l2


def operators(result: Result) -> list[str]:
    return [node.op_type for node in result.model.graph]
