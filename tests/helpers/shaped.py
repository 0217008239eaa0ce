"""Models as a target wants them, and what it still leaves to the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from onnx_lowrank.numerics.arrays import Array
from tests.helpers.models import as_proto, assert_same, factored, known_rank, parse, uniform

__all__ = ["linear", "shaped"]


def shaped(
    proto: onnx.ModelProto, target: str, feeds: dict[str, Array], **options: Any
) -> ir.Model:
    """The model factored at its rank and shaped; it must compute the same."""
    sizes = {name: array.shape for name, array in feeds.items()}
    options = {"rank": 8, "input_shapes": sizes, **options}
    model = factored(proto, shape_for=target, **options).model
    onnx.checker.check_model(as_proto(model), full_check=True)
    assert_same(proto, model, feeds, within=1e-5)
    return model


def linear(rng: np.random.Generator, rows: str = "N, T") -> onnx.ModelProto:
    """``y[rows, 40] = gelu-ish(x[rows, 32] @ W1 + b1) @ W2 + b2``."""
    return parse(
        f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[{rows}, 32] x) => (float[{rows}, 40] y) {{
            p = MatMul(x, W1)
            s = Add(p, b1)
            r = Relu(s)
            q = MatMul(r, W2)
            y = Add(b2, q)
        }}""",
        {
            "W1": known_rank(32, 64, 8, rng, scale=0.125),
            "W2": known_rank(64, 40, 8, rng, scale=0.125),
            "b1": uniform((64,), rng),
            "b2": uniform((40,), rng),
        },
    )
