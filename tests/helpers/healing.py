"""A small perceptron and its pairs, to be healed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx_ir as ir

from onnx_lowrank import compress
from onnx_lowrank.fitting.heal import Healed, HealPlan, heal
from onnx_lowrank.fitting.trainable import constant_names, trainable
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.runtime.session import open_session, run
from tests.helpers.models import parse

__all__ = [
    "Runner",
    "calibration",
    "error",
    "factored",
    "healed",
    "opener",
    "parted",
    "perceptron",
    "samples",
]

Runner = Callable[[Mapping[str, Array]], dict[str, Array]]


def opener(model: ir.Model) -> Runner:
    session = open_session(ir.to_proto(model).SerializeToString(), threads=1)
    known = {item.name for item in session.get_inputs()}
    return lambda feed: run(session, {k: v for k, v in feed.items() if k in known}, "a model")


def perceptron(dtype: str = "float", batch: str = "N", seed: int = 0) -> onnx.ModelProto:
    """Two layers with biases; the first one's outputs are far from all being used."""
    rng = np.random.default_rng(seed)
    kind = {"float": np.float32, "float16": np.float16}[dtype]
    return parse(
        f"""
        <ir_version: 8, opset_import: ["" : 17]>
        agraph ({dtype}[{batch},24] x) => ({dtype}[{batch},6] y) {{
            [first] h0 = MatMul (x, W1)
            h = Add (h0, b1)
            a = Tanh (h)
            [second] y0 = MatMul (a, W2)
            y = Add (b2, y0)
        }}
        """,
        {
            "W1": (rng.normal(size=(24, 32)) / 5).astype(kind),
            "b1": rng.normal(size=32).astype(kind),
            "W2": (rng.normal(size=(32, 6)) / 5).astype(kind),
            "b2": rng.normal(size=6).astype(kind),
        },
    )


def samples(count: int, rows: int = 8, dtype: type = np.float32) -> list[dict[str, Array]]:
    rng = np.random.default_rng(5)
    return [{"x": rng.normal(size=(rows, 24)).astype(dtype)} for _ in range(count)]


def parted(feeds: list[dict[str, Array]]) -> tuple[list[dict[str, Array]], list[dict[str, Array]]]:
    """Samples to descend on, and a tenth that judges."""
    count = max(1, len(feeds) // 10)
    return feeds[count:], feeds[:count]


def error(model: ir.Model, original: ir.Model, feeds: list[dict[str, Array]]) -> float:
    one, other = opener(model), opener(original)
    apart = [one(feed)["y"].astype(np.float64) - other(feed)["y"] for feed in feeds]
    whole = [other(feed)["y"].astype(np.float64) for feed in feeds]
    return float(np.linalg.norm(apart) / np.linalg.norm(whole))


def calibration(folder: Path, count: int = 400) -> Path:
    rng = np.random.default_rng(8)
    path = folder / "samples.npz"
    np.savez(path, x=rng.normal(size=(count, 24)).astype(np.float32))
    return path


def factored(proto: onnx.ModelProto) -> tuple[ir.Model, ir.Model, tuple[str, ...]]:
    """The original, its factored copy, and what can be trained."""
    original = ir.from_proto(proto)
    result = compress(
        proto, rank=8, include=["first"], min_gain=0.0, simplify=False, check=False, bench=False
    )
    return original, result.model, trainable(result.model, constant_names(original))


def healed(
    proto: onnx.ModelProto, feeds: list[dict[str, Array]], plan: HealPlan, **options: Any
) -> Healed:
    original, model, trained = factored(proto)
    return heal(
        model, original, trained, *parted(feeds), None, opener, plan, lambda _: None, **options
    )
