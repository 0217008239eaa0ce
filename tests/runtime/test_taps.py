"""Copies of one model that give out values inside it."""

from __future__ import annotations

import functools

import numpy as np
import onnx_ir as ir

from onnx_lowrank.runtime.taps import Runner, look, tapped
from tests.helpers.models import parse, run_ort

TEXT = """<ir_version: 8, opset_import: ["": 17]> g (float[N, 3] x) => (float[N, 3] y) {
    a = Tanh(x) b = Sin(a) flat = Constant<value = int64[1] {-1}>() y = Cos(b) z = Reshape(b, flat)
}"""


def test_values_inside_and_their_shapes() -> None:
    model = ir.from_proto(parse(TEXT))

    def open_model(copy: ir.Model) -> Runner:
        return functools.partial(run_ort, ir.to_proto(copy))

    feed = {"x": np.ones((2, 3), np.float32)}
    found = tapped(model, ["a"], open_model)(feed)
    np.testing.assert_array_equal(found["a"], np.tanh(feed["x"]))
    seen = look(model, ["a", "z"], lambda copy: open_model(copy)(feed))
    assert seen.shapes == {"a": (2, 3), "z": (6,)}
    assert [value.name for value in model.graph.outputs] == ["y"]
