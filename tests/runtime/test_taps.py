"""Copies of one model that give out values inside it."""

from __future__ import annotations

import functools

import numpy as np
import onnx_ir as ir

from onnx_lowrank.runtime.taps import Runner, look, opened_once, tapped
from tests.helpers.models import parse, run_ort

TEXT = """<ir_version: 8, opset_import: ["": 17]> g (float[N, 3] x) => (float[N, 3] y) {
    a = Tanh(x) b = Sin(a) flat = Constant<value = int64[1] {-1}>() y = Cos(b) z = Reshape(b, flat)
}"""


def test_a_model_that_gives_out_the_same_is_opened_once() -> None:
    model, opened = ir.from_proto(parse(TEXT)), list[list[str]]()

    def open_model(copy: ir.Model) -> Runner:
        made = ir.to_proto(copy)
        opened.append([value.name for value in made.graph.output])
        return functools.partial(run_ort, made)

    once = opened_once(open_model)
    feed = {"x": np.ones((2, 3), np.float32)}
    for _ in range(2):
        np.testing.assert_array_equal(tapped(model, ["a"], once)(feed)["a"], np.tanh(feed["x"]))
        # The values that say shapes have the same names whatever they are of.
        for name, shape in (("a", (2, 3)), ("z", (6,))):
            assert look(model, [name], lambda copy: once(copy)(feed)).shapes == {name: shape}
    assert len(opened) == 3
