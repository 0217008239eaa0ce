"""What the tests of targets share: the providers that are here, and models that are special."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import pytest

from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.targets.local import refusal
from tests.helpers.models import (
    known_rank,
    parse,
    uniform,
)

__all__ = ["EMULATED", "PLUGIN_PARAMS", "pair", "require", "save", "two_layers"]

EMULATED = ("qnn", "webgpu")
PLUGIN_PARAMS = [
    pytest.param(name, marks=getattr(pytest.mark, name)) for name in ("openvino", "qnn", "webgpu")
]
_known: dict[str, str | None] = {}


def require(name: str) -> None:
    """Skip the test where no session can be opened on a provider, and say why."""
    if name not in _known:
        _known[name] = refusal(name)
    if _known[name] is not None:
        pytest.skip(str(_known[name]))


def save(model: onnx.ModelProto, path: Path) -> Path:
    """The model as a file."""
    onnx.save(model, path)
    return path


def two_layers(
    rows: int | str = 4, *, kind: str = "float", hidden: int = 48, axes: str = ""
) -> onnx.ModelProto:
    """``y = relu(x @ W1 + b) @ W2`` with ``x[axes rows, 32]``; weights of rank 8."""
    rng = np.random.default_rng(7)
    dtype = {"float": np.float32, "float16": np.float16}[kind]
    shape = f"{axes}{rows}, 32"
    model = parse(
        f"""<ir_version: 8, opset_import: ["": 17]>
        two ({kind}[{shape}] x) => ({kind}[{shape}] y) {{
            product = MatMul(x, W1)
            sum = Add(product, b)
            act = Relu(sum)
            y = MatMul(act, W2)
        }}""",
        {
            "W1": known_rank(32, hidden, 8, rng, dtype, scale=0.125),
            "W2": known_rank(hidden, 32, 8, rng, dtype, scale=0.125),
            "b": uniform((hidden,), rng, dtype),
        },
    )
    for node, name in zip(model.graph.node, ("fc1", "bias", "relu", "fc2"), strict=True):
        node.name = name
    return model


def pair(folder: Path, **options: object) -> tuple[Path, Path]:
    """The model of `two_layers`, and one whose second weight is changed by a thousandth."""
    before = two_layers(**options)  # type: ignore[arg-type]
    after = onnx.ModelProto()
    after.CopyFrom(before)
    for tensor in after.graph.initializer:
        if tensor.name == "W2":
            changed: Array = onnx.numpy_helper.to_array(tensor)
            tensor.CopyFrom(
                onnx.numpy_helper.from_array((changed * 1.001).astype(changed.dtype), "W2")
            )
    return save(before, folder / "a.onnx"), save(after, folder / "b.onnx")
