"""The switches of a probe: products of a group multiply what 8 bits make of their input."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.maps.find import find
from onnx_lowrank.maps.forms import all_forms
from onnx_lowrank.numerics.arrays import Array, Feed
from onnx_lowrank.ranks.probe import Probe
from onnx_lowrank.runtime.taps import Runner
from tests.helpers.models import parse, run_ort


def open_model(model: ir.Model | onnx.ModelProto) -> Runner:
    proto = ir.to_proto(model) if isinstance(model, ir.Model) else model
    return lambda feed: run_ort(proto, dict(feed))


def rounded(x: Array) -> Array:
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale = np.float32((high - low) / 255.0)
    zero = np.rint(-low / scale)
    return np.asarray((np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale, np.float32)


@pytest.mark.parametrize("constant", [False, True])
def test_a_switch_rounds_the_inputs_of_one_group(constant: bool, rng: np.random.Generator) -> None:
    """The other reader of the same value is as it was, and so is a weight in a Constant node."""
    weights = {name: rng.standard_normal((8, 8)).astype(np.float32) for name in "VW"}
    proto = parse(
        """<ir_version: 8, opset_import: ["" : 11]> g (float[N,8] x) => (float[N,8] y, float[N,8] z)
        { y = MatMul (x, V)
          z = MatMul (x, W) }""",
        {name: own for name, own in weights.items() if name != "V" or not constant},
    )
    if constant:
        tensor = onnx.numpy_helper.from_array(weights["V"], "V")
        proto.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["V"], value=tensor))
    model = ir.from_proto(proto)
    groups = find(model, Constants(model), all_forms()).groups
    feeds: list[Feed] = [{"x": rng.standard_normal((4, 8)).astype(np.float32)} for _ in range(3)]
    probe = Probe(model, groups, feeds, open_model, rounding=groups)
    first = next(group for group in groups if group.matrix.name == "V")
    for feed, off, on in zip(
        feeds, probe.outputs({}), probe.outputs(probe.rounds(first)), strict=True
    ):
        x = feed["x"]
        np.testing.assert_allclose(off["y"], x @ weights["V"], atol=1e-5)
        np.testing.assert_allclose(on["y"], rounded(x) @ weights["V"], atol=1e-4)
        np.testing.assert_array_equal(on["z"], off["z"])
    assert probe.damage(probe.rounds(first))
    assert probe.damage({}) == 0.0
