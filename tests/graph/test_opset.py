"""Raising the opset: the outputs stay, and what would change them is an error."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.helper
import onnx_ir as ir
import pytest

from onnx_lowrank.errors import InputError
from onnx_lowrank.graph.opset import raise_opset
from onnx_lowrank.numerics.arrays import Feed
from onnx_lowrank.runtime.session import open_session, run
from tests.helpers.models import parse


def outputs(model: ir.Model, feed: Feed) -> Feed:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return run(open_session(proto.SerializeToString()), feed, "a model")


BODIES = {
    "axes": "a = ReduceMax <axes=[1], keepdims=0> (x)\n y = Identity (a)",
    "all axes": "a = ReduceMean <keepdims=1> (x)\n y = Add (x, a)",
    "split": "a, b = Split <axis=1> (x)\n y = Sub (a, b)",
    "reshape": "s = Constant <value_ints=[-1, 2]> ()\n y = Reshape (x, s)",
    "pad": "p = Constant <value_ints=[0, 1, 0, 1]> ()\n y = Pad (x, p)",
    "softmax": "y = Softmax (x)",
}


@pytest.mark.parametrize("opset", [13, 17])
@pytest.mark.parametrize("body", BODIES)
def test_outputs_stay(body: str, opset: int, rng: np.random.Generator) -> None:
    model = parse(
        f'<ir_version: 8, opset_import: ["" : {opset}]> g (float[4,6] x) => (float y) {{ '
        f"{BODIES[body]} }}",
        {},
    )
    model.graph.output[0].type.tensor_type.ClearField("shape")
    plain = ir.from_proto(onnx.shape_inference.infer_shapes(model))
    feed = {"x": rng.standard_normal((4, 6)).astype(np.float32)}
    before = run(open_session(ir.to_proto(plain).SerializeToString()), feed, "a model")
    raised = plain.clone()
    said = raise_opset(raised, 21)
    assert said == f"opset {opset} was raised to 21"
    assert raised.opset_imports[""] == 21
    assert raised.ir_version >= 10
    after = run(open_session(ir.to_proto(raised).SerializeToString()), feed, "a model")
    np.testing.assert_array_equal(after["y"], before["y"])


def test_new_enough_is_left() -> None:
    model = ir.from_proto(
        parse('<ir_version: 10, opset_import: ["" : 22]> g (float[2] x) => (float[2] y) '
              "{ y = Relu (x) }", {})
    )  # fmt: skip
    assert raise_opset(model, 21) is None
    assert model.opset_imports[""] == 22


@pytest.mark.parametrize(
    ("opset", "body", "word"),
    [
        (11, "y = Relu (x)", "older than opset 13"),
        (18, "y = GroupNormalization <num_groups=2> (x, s, s)", "means something else"),
        (16, 'y = GridSample <mode="bilinear"> (x, f)', "GridSample"),
    ],
)
def test_a_change_of_meaning_is_an_error(opset: int, body: str, word: str) -> None:
    model = parse(
        f'<ir_version: 8, opset_import: ["" : {opset}]> '
        f"g (float[1,4,2,2] x, float[2] s, float[1,2,2,2] f) => (float[1,4,2,2] y) "
        f"{{ [the_node] {body} }}",
        {},
    )
    plain = ir.from_proto(model)
    with pytest.raises(InputError, match=f"'the_node'.*{word}.*opset 21"):
        raise_opset(plain, 21)
    assert plain.opset_imports[""] == opset
