"""An encoder of integers as one of floats: what each weight stands for stays."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_lowrank.runtime.session import open_session, run
from tests.helpers.models import parse
from tests.helpers.places import ROOT
from tests.helpers.quantized import quantized

sys.path.insert(0, str(ROOT / "models"))

from export_moonshine import Floats

HEAD = '<ir_version: 8, opset_import: ["" : 17]>'
PRODUCTS = f"""{HEAD} g (float[N,128] x) => (float[N,96] y) {{
    h = MatMul (x, a)
    t = Tanh (h)
    y = MatMul (t, b)
}}"""
CONVOLUTION = f"""{HEAD} g (float[N,4,20] x) => (float[N,16,M] y) {{
    c = Conv (x, w)
    y = Relu (c)
}}"""


@pytest.mark.parametrize(
    ("way", "body", "shapes", "near"),
    [
        ("dynamic", PRODUCTS, {"a": (128, 160), "b": (160, 96)}, 0.05),
        ("unsigned", PRODUCTS, {"a": (128, 160), "b": (160, 96)}, 0.05),
        ("shifted", CONVOLUTION, {"w": (16, 4, 5)}, 1e-6),
    ],
)
def test_weights_become_what_they_stand_for(
    way: str,
    body: str,
    shapes: dict[str, tuple[int, ...]],
    near: float,
    rng: np.random.Generator,
    tmp_path: Path,
) -> None:
    """The ways in which Moonshine's file holds products and convolutions."""
    drawn = {name: rng.standard_normal(shape) / 11 for name, shape in shapes.items()}
    plain = parse(body, {name: array.astype(np.float32) for name, array in drawn.items()})
    shape = (4, 4, 20) if way == "shifted" else (4, 128)
    feed = {"x": rng.standard_normal(shape).astype(np.float32)}
    before = onnx.load(quantized(plain, way, [feed], tmp_path))
    model = onnx.ModelProto()
    model.CopyFrom(before)
    assert Floats(model).make() == len(shapes)
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == [
        node.op_type for node in plain.graph.node
    ]
    assert {tensor.data_type for tensor in model.graph.initializer} == {onnx.TensorProto.FLOAT}
    (wanted,) = run(open_session(before.SerializeToString()), feed, "integers").values()
    (got,) = run(open_session(model.SerializeToString()), feed, "floats").values()
    assert np.linalg.norm(got - wanted) / np.linalg.norm(wanted) < near


def test_another_way_is_refused() -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (uint8[4,4] x) => (int32[4,4] y)'
        "{ y = MatMulInteger (x, q, z, z) }"
    )
    with pytest.raises(ValueError, match="expected Cast behind it, got nothing"):
        Floats(model).make()
