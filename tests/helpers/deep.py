"""A model of several layers, with samples: enough work to stop in the middle of it."""

from __future__ import annotations

import numpy as np
import onnx

from tests.helpers.calibrated import HEAD, Feed
from tests.helpers.models import parse

__all__ = ["deep", "feeds_for"]

_SIZE = 40


def deep(rng: np.random.Generator, layers: int = 6) -> onnx.ModelProto:
    """Layers of 40×40 with falling spectra behind each other, each with a bias and a Tanh."""
    text, weights, value = "", {}, "x"
    falling = np.exp(-np.arange(_SIZE) / 6)
    for layer in range(layers):
        left, right = (np.linalg.qr(rng.standard_normal((_SIZE, _SIZE)))[0] for _ in range(2))
        weights[f"W{layer}"] = (3.0 * (left * falling) @ right).astype(np.float32)
        weights[f"b{layer}"] = (0.1 * rng.standard_normal(_SIZE)).astype(np.float32)
        text += f"p{layer} = MatMul({value}, W{layer})\ns{layer} = Add(p{layer}, b{layer})\n"
        value = f"h{layer}" if layer + 1 < layers else "y"
        text += f"{value} = Tanh(s{layer})\n"
    model = parse(f"{HEAD} g (float[N, {_SIZE}] x) => (float[N, {_SIZE}] y) {{ {text} }}", weights)
    for number, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}-{number}"
    return model


def feeds_for(rng: np.random.Generator, count: int, rows: int = 8) -> list[Feed]:
    """Samples for it."""
    return [{"x": rng.standard_normal((rows, _SIZE)).astype(np.float32)} for _ in range(count)]
