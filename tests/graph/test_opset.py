"""Raising the opset: the outputs stay, and what would change them is an error."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.helper
import onnx_ir as ir
import pytest

from onnx_lowrank.errors import InputError
from onnx_lowrank.graph.opset import raise_opset
from onnx_lowrank.numerics.arrays import Array, Feed
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


# What the way of writing of an operator was, up to the opset that is named.
OLD = {
    ("squeeze", 12): "a = Unsqueeze <axes=[0]> (x)\n b = Relu (a)\n y = Squeeze <axes=[0]> (b)",
    ("sum", 12): "y = ReduceSum <axes=[1], keepdims=0> (x)",
    ("sum of all", 12): "y = ReduceSum (x)",
    ("mean", 12): "y = ReduceMean <axes=[1]> (x)",
    ("split", 12): "a, b = Split <axis=1, split=[2,4]> (x)\n y = Concat <axis=1> (b, a)",
    ("halves", 12): "a, b = Split <axis=1> (x)\n y = Sub (a, b)",
    ("softmax", 12): "y = Softmax (x)",
    ("softmax of all", 12): "y = Softmax <axis=0> (x)",
    ("logsoftmax", 12): "y = LogSoftmax <axis=1> (x)",
    ("hardmax", 12): "y = Hardmax <axis=0> (x)",
    ("dropout", 11): "y = Dropout <ratio=0.3> (x)",
    ("normalized", 8): "y = BatchNormalization <spatial=1> (x, s, s, s, s)",
    ("normalization", 12): "y = BatchNormalization <epsilon=0.01> (x, s, s, s, s)",
    ("clip", 10): "y = Clip <min=-0.5, max=0.25> (x)",
    ("clip above", 10): "y = Clip <max=0.25> (x)",
    ("clip nothing", 10): "y = Clip (x)",
    ("pad", 10): "y = Pad <pads=[0,1,0,2], value=0.5> (x)",
    ("reflect", 10): 'y = Pad <pads=[0,1,0,2], mode="reflect"> (x)',
    ("top", 9): "y, i = TopK <k=2> (x)",
    ("slice", 9): "y = Slice <starts=[1,0], ends=[3,-1]> (x)",
    ("slice of an axis", 9): "y = Slice <starts=[2], ends=[6], axes=[1]> (x)",
    ("upsample", 8): 'y = Upsample <mode="nearest", scales=[2.0, 1.5]> (x)',
    ("gemm", 10): "a = Transpose (x)\n y = Gemm (x, a, r)",
    ("argmax", 11): "i = ArgMax <axis=1> (x)\n y = Cast <to=1> (i)",
}


@pytest.mark.parametrize(("body", "newest"), OLD)
@pytest.mark.parametrize("opset", [7, 8, 9, 10, 11, 12])
def test_outputs_of_old_operators_stay(
    body: str, newest: int, opset: int, rng: np.random.Generator
) -> None:
    model = parse(
        f'<ir_version: 4, opset_import: ["" : {min(opset, newest)}]> '
        f"g (float[4,6] x) => (float y) {{ {OLD[body, newest]} }}",
        {"s": np.linspace(0.5, 2.0, 6, dtype=np.float32), "r": np.ones((1, 4), np.float32)},
    )
    model.graph.output[0].type.tensor_type.ClearField("shape")
    unread = {name for node in model.graph.node for name in node.input}
    for tensor in [t for t in model.graph.initializer if t.name not in unread]:
        model.graph.initializer.remove(tensor)
    assert_raised(model, {"x": rng.standard_normal((4, 6)).astype(np.float32)})


def assert_raised(model: onnx.ModelProto, feed: Feed, *, inferred: bool = True) -> ir.Model:
    """A model gives what it gave, in opset 21; with and without known shapes."""
    before = run(open_session(model.SerializeToString()), feed, "a model")
    for proto in (model, onnx.shape_inference.infer_shapes(model))[: 1 + inferred]:
        raised = ir.from_proto(proto)
        names = [node.name for node in raised.graph]
        raise_opset(raised, 21)
        assert raised.opset_imports[""] == 21
        assert [name for node in raised.graph if (name := node.name) in names] == names
        after = run(open_session(ir.to_proto(raised).SerializeToString()), feed, "a model")
        assert after.keys() == before.keys()
        for name, array in before.items():
            np.testing.assert_allclose(after[name], array, rtol=1e-5, atol=1e-6)
    return raised


IMAGES = {
    ("resize", 10): 'y = Resize <mode="nearest"> (x, u)',
    ("resize in lines", 10): 'y = Resize <mode="linear"> (x, d)',
    ("upsample", 9): 'y = Upsample <mode="linear"> (x, u)',
    ("resize by halves", 12): (
        'y = Resize <mode="linear", coordinate_transformation_mode="half_pixel"> (x, e, u)'
    ),
    ("softmax from a middle axis", 12): "y = Softmax <axis=1> (x)",
    ("softmax from the second last axis", 12): "y = Softmax <axis=-2> (x)",
    ("transposed convolution", 10): "y = ConvTranspose <strides=[2,2]> (x, w)",
    ("pooled", 9): "y = AveragePool <kernel_shape=[2,2], pads=[0,0,1,1]> (x)",
    ("regions", 12): "y = RoiAlign <output_height=2, output_width=2> (x, b, i)",
}


@pytest.mark.parametrize(("body", "opset"), IMAGES)
def test_outputs_of_old_operators_on_images_stay(
    body: str, opset: int, rng: np.random.Generator
) -> None:
    known: dict[str, Array] = {
        "u": np.array([1, 1, 2, 1.5], np.float32),
        "d": np.array([1, 1, 0.5, 1.5], np.float32),
        "e": np.zeros(0, np.float32),
        "w": rng.standard_normal((3, 2, 3, 3)).astype(np.float32),
        "b": np.array([[0.2, 0.4, 3.1, 3.9]], np.float32),
        "i": np.zeros(1, np.int64),
    }
    read = {n.strip() for n in IMAGES[body, opset].rpartition("(")[2].strip(") ").split(",")}
    model = parse(
        f'<ir_version: 4, opset_import: ["" : {opset}]> g (float[2,3,4,5] x) => (float y) '
        f"{{ {IMAGES[body, opset]} }}",
        {name: array for name, array in known.items() if name in read},
    )
    model.graph.output[0].type.tensor_type.ClearField("shape")
    assert_raised(model, {"x": rng.standard_normal((2, 3, 4, 5)).astype(np.float32)})


def test_an_output_may_declare_another_shape(rng: np.random.Generator) -> None:
    """As Paddle's exporter writes it: an output without axes, behind values of unknown ones."""
    model = parse(
        '<ir_version: 7, opset_import: ["" : 11]> g (float[N,3,4] x) => (float y) '
        "{ a = Transpose <perm=[0,2,1]> (x)\n b = Mul (a, a)\n y = Softmax <axis=2> (b) }",
        {},
    )
    x = rng.standard_normal((2, 3, 4)).astype(np.float32)
    raised = assert_raised(model, {"x": x}, inferred=False)
    assert [node.op_type for node in raised.graph] == ["Transpose", "Mul", "Softmax"]
    assert raised.graph.outputs[0].shape == ir.Shape([None, None, None])
    onnx.checker.check_model(ir.to_proto(raised), full_check=True)
    said = raise_opset(ir.from_proto(model), 21)
    assert said is not None
    assert "output 'y' declares 0 axes and has 3" in said


def test_bodies_and_functions_are_raised(rng: np.random.Generator) -> None:
    text = """
        <ir_version: 8, opset_import: ["" : 11, "own" : 1]>
        g (float[2,3,4] x, bool c) => (float[2,3,4] y) {
            a = If (c) <then_branch = t () => (float[2,3,4] p) { p = Softmax <axis=1> (x) },
                        else_branch = e () => (float[2,3,4] q) { q = Neg (x) }>
            y = own.last (a)
        }
        <domain: "own", opset_import: ["" : 11]>
        last (v) => (w) { u = Unsqueeze <axes=[0]> (v)\n s = Squeeze <axes=[0]> (u)
                          w = Softmax <axis=2> (s) }
    """
    x = rng.standard_normal((2, 3, 4)).astype(np.float32)
    for taken in (True, False):
        raised = assert_raised(parse(text, {}), {"x": x, "c": np.array(taken)}, inferred=False)
    (function,) = raised.functions.values()
    assert function.opset_imports[""] == 21
    assert "axes" not in function[1].attributes


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


def test_an_attribute_of_a_call_is_an_error() -> None:
    model = parse(
        """
        <ir_version: 8, opset_import: ["" : 12, "own" : 1]>
        g (float[1,3] x) => (float[3] y) { y = own.flat <of=[0]> (x) }
        <domain: "own", opset_import: ["" : 12]>
        flat <of> (v) => (w) { w = Squeeze <axes: ints = @of> (v) }
        """,
        {},
    )
    with pytest.raises(InputError, match="Squeeze of opset 12 has axes from the call"):
        raise_opset(ir.from_proto(model), 21)


@pytest.mark.parametrize(
    ("opset", "body", "word"),
    [
        (8, "y = BatchNormalization <spatial=0> (x, s, s, s, s)", "statistics of each element"),
        (10, 'y = Resize <mode="nearest"> (x, s)', "may shrink"),
        (9, "y, z = Dropout (x)\n o = Neg (z)", "more than its first output"),
        (
            12,
            'y = Resize <coordinate_transformation_mode="tf_half_pixel_for_nn"> (x, s, s)',
            "tf_half_pixel_for_nn",
        ),
        (18, "y = GroupNormalization <num_groups=2> (x, s, s)", "means something else"),
        (16, 'y = GridSample <mode="bilinear"> (x, f)', "GridSample"),
        (17, "y = DFT (x)", "an attribute 'axis'"),
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


def test_a_model_that_is_too_old_is_told_what_is_enough() -> None:
    text = '<ir_version: 8, opset_import: ["" : 6]> g (float[1] x) => (float[1] y) { y = Relu (x) }'
    with pytest.raises(InputError, match=r"Relu of opset 6.*a model of opset 7 or later"):
        raise_opset(ir.from_proto(parse(text, {})), 21)
