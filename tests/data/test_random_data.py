"""Random samples, and the image sizes that are tried."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_lowrank.data.declared import InputSpec, input_specs
from onnx_lowrank.data.runnable import runnable_shapes
from onnx_lowrank.data.samples import Samples, random_samples
from onnx_lowrank.data.shapes import concrete_shapes
from onnx_lowrank.errors import InputError
from onnx_lowrank.numerics.arrays import Feed
from onnx_lowrank.runtime.session import OrtLog, open_session, run


def randoms(text: str, count: int = 2, seed: int = 0) -> Samples:
    model = ir.from_onnx_text(text)
    specs = input_specs(model)
    shapes = concrete_shapes(specs, {}, {})
    return random_samples(model, specs, shapes, count=count, seed=seed)


KINDS = """<ir_version: 8, opset_import: ["" : 18]>
    g (float[500] x, float16[500] h, bfloat16[500] b, double[500] d, uint8[500] image,
       int8[500] q, int64[500] k, bool[500] flag, bool[500] a_mask, bool[500] key_padding_mask,
       int64[500] attention_mask,
       float[500] MASK) => (float[500] y) { y = Identity(x) }"""


def test_random_values() -> None:
    samples = randoms(KINDS)
    feed = samples.feeds[0]
    for name, dtype in (("x", "float32"), ("h", "float16"), ("b", "bfloat16"), ("d", "float64")):
        assert feed[name].dtype.name == dtype
        assert 0.8 < feed[name].astype(float).std() < 1.2
    assert feed["image"].max() > 200
    assert set(feed["k"].tolist()) == {0, 1}
    assert set(feed["flag"].tolist()) == {True, False}
    for name in ("a_mask", "attention_mask", "MASK"):
        assert feed[name].all()
    (note,) = samples.notes
    assert note.startswith("random input (seed 0), not real data: x, h, b and 1 more standard norm")
    assert "image integers from 0 to 255" in note
    assert not feed["key_padding_mask"].any()
    assert "a_mask, attention_mask, MASK all ones" in note
    assert "key_padding_mask all false, no padding" in note
    assert (samples.source, samples.total, samples.expected) == ("random", 2, (None, None))


def test_random_is_seeded() -> None:
    first, again, other = randoms(KINDS), randoms(KINDS), randoms(KINDS, seed=1)
    assert np.array_equal(first.feeds[1]["x"], again.feeds[1]["x"])
    assert not np.array_equal(first.feeds[0]["x"], first.feeds[1]["x"])
    assert not np.array_equal(first.feeds[0]["x"], other.feeds[0]["x"])
    assert np.array_equal(first.feeds[0]["x"], randoms(KINDS, count=9).feeds[0]["x"])


def test_random_cannot_make_everything() -> None:
    with pytest.raises(InputError, match="input 't': expected numbers, the model wants strings"):
        randoms(
            '<ir_version: 8, opset_import: ["" : 18]> g (string[2] t) => (string[2] y) '
            "{ y = Identity(t) }"
        )
    model = ir.from_onnx_text(KINDS)
    specs = (InputSpec("x", np.dtype(np.float32), None),)
    with pytest.raises(
        InputError, match=r"input 'x': .* input_shapes='x:…' or samples with data=…"
    ):
        random_samples(model, specs, concrete_shapes(specs, {}, {}), count=1, seed=0)


def bound_of(body: str, weights: str, kind: str = "int64[1, 400] i") -> int | None:
    """Largest value that comes for i, plus one."""
    text = (
        f'<ir_version: 8, opset_import: ["" : 18, "com.microsoft" : 1]> g ({kind}) => (float y) '
        f"<{weights}> {{ {body} }}"
    )
    return int(randoms(text, count=3).feeds[0]["i"].max()) + 1


TABLE = "float[5, 2] E = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9}"


@pytest.mark.parametrize(
    ("body", "weights", "bound"),
    [
        ("y = Gather(E, i)", TABLE, 5),
        ("y = Gather<axis = 1>(E, i)", TABLE, 2),
        ("a = Cast<to = 6>(i) s = Squeeze(a) u = Identity(s) y = Gather(E, u)", TABLE, 5),
        ("c = Concat<axis = 0>(i, i) y = Gather<axis = 0>(E, c)", TABLE, 5),
        ("f = Cast<to = 11>(E) y = Gather(f, i)", TABLE, 5),
        ("y = GatherElements<axis = 0>(E, i)", TABLE, 5),
        ("a = Add(i, two) y = Gather(E, a)", TABLE + ", int64 two = {2}", 3),
        ("y = OneHot(i, depth, values)", "int64 depth = {7}, float[2] values = {0, 1}", 7),
        ("e = Equal(i, r) y = Cast<to = 1>(e)", "int64[4, 1] r = {0, 1, 2, 3}", 4),
        ("e = Equal(i, pad) y = Cast<to = 1>(e)", "int64 pad = {9}", 2),
        ("y = Cast<to = 1>(i)", TABLE, 2),
        ("p = Gather<axis = 1>(E, i) y = Gather(E, i)", TABLE, 2),
        ("n = Gather(i, two) y = Gather(E, n)", TABLE + ", int64 two = {0}", 5),
    ],
)
def test_integers_stay_inside_what_they_index(body: str, weights: str, bound: int) -> None:
    assert bound_of(body, weights) == bound


def test_bound_through_embedding_layer() -> None:
    tables = ", ".join(
        f"float[{size}, 2] {name} = {{{', '.join(['0'] * size * 2)}}}"
        for name, size in (("w", 6), ("p", 9), ("s", 3))
    )
    body = "y, m = com.microsoft.EmbedLayerNormalization(i, j, w, p, s, g1, b1)"
    weights = tables + ", float[2] g1 = {1, 1}, float[2] b1 = {0, 0}"
    text = (
        '<ir_version: 8, opset_import: ["" : 18, "com.microsoft" : 1]> '
        f"g (int32[1, 400] i, int32[1, 400] j) => (float y) <{weights}> {{ {body} }}"
    )
    feed = randoms(text).feeds[0]
    assert (int(feed["i"].max()), int(feed["j"].max())) == (5, 2)


def test_bound_inside_a_subgraph() -> None:
    text = (
        '<ir_version: 8, opset_import: ["" : 18]> g (int64[400] i, bool c) => (float y) '
        f"<{TABLE}> {{ y = If (c) <then_branch = t () => (float a) {{ a = Gather(E, i) }}, "
        "else_branch = e () => (float b) { b = Cast<to = 1>(i) }> }"
    )
    assert randoms(text).feeds[0]["i"].max() == 4


# --- image sizes


def lines(height: int) -> ir.Model:
    """A model that only runs on images of that height."""
    weight = np.zeros((height, 1), np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Transpose", ["x"], ["t"], perm=[0, 1, 3, 2]),
            helper.make_node("MatMul", ["t", "w"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, "h", "w"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, "w")],
    )
    opsets = [helper.make_opsetid("", 17)]
    return ir.from_proto(helper.make_model(graph, ir_version=8, opset_imports=opsets))


@pytest.mark.parametrize(("height", "size"), [(224, (224, 224)), (48, (48, 320)), (7, (224, 224))])
def test_image_sizes_are_tried(
    height: int, size: tuple[int, int], capfd: pytest.CaptureFixture[str]
) -> None:
    model = lines(height)
    session = open_session(ir.to_proto(model).SerializeToString())
    specs = input_specs(model)

    def runs(feed: Feed) -> bool:
        try:
            return bool(run(session, feed, "m"))
        except InputError:
            return False

    with OrtLog().capture("trying"):
        shapes = runnable_shapes(runs, model, specs, {}, {})
    assert shapes.shapes == {"x": (1, 3, *size)}
    assert ("the model does not run on images" in shapes.notes[-1]) == (height == 48)
    assert capfd.readouterr().err == ""
    if height != 7:
        feed = random_samples(model, specs, shapes, count=1, seed=0).feeds[0]
        assert run(session, feed, "m")["y"].shape == (1, 3, size[1], 1)


def test_given_image_sizes_are_not_tried() -> None:
    model = lines(48)
    given = {"x": (1, 3, 9, 9)}
    shapes = runnable_shapes(lambda _: pytest.fail("tried"), model, input_specs(model), given, {})
    assert shapes.shapes == {"x": (1, 3, 9, 9)}
