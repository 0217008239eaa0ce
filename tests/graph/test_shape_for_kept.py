"""``--for``: what a target would like, and the model must not lose."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_lowrank import InputError
from onnx_lowrank.graph.shape_for import shape_for
from onnx_lowrank.graph.wishes import WISHES
from tests.helpers.models import (
    ROUNDING,
    as_proto,
    assert_same,
    distance,
    factored,
    known_rank,
    op_types,
    parse,
    run_ort,
    run_reference,
    uniform,
)
from tests.helpers.random_graphs import RANK, random_graph
from tests.helpers.shaped import linear, shaped


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


FIXED = [target for target, wishes in WISHES.items() if wishes.fixed]


@pytest.mark.parametrize("target", FIXED)
@pytest.mark.parametrize("stored", [np.float16, np.float64])
@pytest.mark.parametrize("line", ["MatMul(x, c)", "Gemm<alpha = 0.5>(x, c)", "MatMul(c, x)"])
def test_a_weight_behind_a_cast_keeps_the_type_that_its_node_reads(
    target: str, stored: type, line: str, rng: np.random.Generator
) -> None:
    text = f"""<ir_version: 8, opset_import: ["": 17]> g (float[20, 20] x) => (float[20, 20] y) {{
        c = Cast<to = 1>(W)
        y = {line}
    }}"""
    proto = parse(text, {"W": known_rank(20, 20, 4, rng, stored, scale=0.125)})
    feeds = {"x": uniform((20, 20), rng)}
    dense = ir.from_proto(proto)
    shape_for(dense, target, {"x": (20, 20)})
    onnx.checker.check_model(as_proto(dense), full_check=True)
    assert_same(proto, dense, feeds, within=1e-5)


@pytest.mark.parametrize("target", FIXED)
def test_a_weight_that_is_an_output_stays(target: str, rng: np.random.Generator) -> None:
    proto = parse(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[2, 3, 20] x) => (float[2, 3, 24] y, float[24, 20] W, float[20, 24] t) {
            t = Transpose(W)
            y = MatMul(x, t)
        }""",
        {"W": known_rank(24, 20, 4, rng, scale=0.125)},
    )
    shaped(proto, target, {"x": uniform((2, 3, 20), rng)}, rank=4)


@pytest.mark.parametrize("target", FIXED)
@pytest.mark.parametrize("opset", [8, 9])
def test_before_ir_version_4_no_initializer_is_added(
    target: str, opset: int, rng: np.random.Generator
) -> None:
    proto = parse(
        f"""<ir_version: 3, opset_import: ["": {opset}]>
        g (float[N, 20] x) => (float[N, 20] y) {{
            p = MatMul(x, W)
            s = Shape(x)
            y = Reshape(p, s)
        }}"""
    )
    weight = onnx.numpy_helper.from_array(known_rank(20, 20, 4, rng, scale=0.125))
    proto.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["W"], value=weight))
    model = shaped(proto, target, {"x": uniform((3, 20), rng)}, rank=4)
    assert model.ir_version == 3
    assert not model.graph.initializers


def test_integers_in_old_graphs_are_left_computed(rng: np.random.Generator) -> None:
    proto = linear(rng)
    proto.ir_version = 3
    for tensor in proto.graph.initializer:
        node = onnx.helper.make_node("Constant", [], [tensor.name], value=tensor)
        proto.graph.node.insert(0, node)
    del proto.graph.initializer[:]
    proto.opset_import[0].version = 8
    result = factored(proto, shape_for="nnapi", rank=8, dims={"N": 2, "T": 3})
    (note,) = [note for note in result.report.notes if "stay as they are" in note]
    assert note.endswith("the model is of opset 8, expected 9 or newer")
    assert_same(proto, result.model, {"x": uniform((2, 3, 32), rng)}, within=1e-5)
    proto.opset_import[0].version = 9
    model = shaped(proto, "nnapi", {"x": uniform((2, 3, 32), rng)})
    assert op_types(model)[:2] == ["Reshape", "MatMul"]
    assert not model.graph.initializers


@pytest.mark.parametrize("target", FIXED)
def test_sequences_keep_their_type(target: str, rng: np.random.Generator) -> None:
    proto = parse(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[N, 3, 20] x) => (float[A, B, C] y, seq(float[D, E, F]) both) {
            first = SequenceConstruct(x, x)
            i = Constant<value = int64 {1}>()
            one = SequenceAt(first, i)
            y = MatMul(one, W)
            both = SequenceInsert(first, x)
        }""",
        {"W": known_rank(20, 24, 4, rng, scale=0.125)},
    )
    feeds = {"x": uniform((2, 3, 20), rng)}
    model = factored(proto, shape_for=target, rank=4, input_shapes={"x": (2, 3, 20)}).model
    onnx.checker.check_model(as_proto(model), full_check=True)
    before, after = run_ort(proto, feeds), run_ort(model, feeds)
    assert distance(after["y"], before["y"]) < 1e-5


@pytest.mark.parametrize("target", ["nnapi", "coreml", "xnnpack"])
@pytest.mark.parametrize("order", [("W, x", "l, V"), ("x, V", "r, W")])
@pytest.mark.parametrize("shape", [(20, 20), (2, 20, 20)])
def test_constants_on_both_sides(
    target: str, order: tuple[str, str], shape: tuple[int, ...], rng: np.random.Generator
) -> None:
    sizes = ", ".join(map(str, shape))
    first = order[1][0]
    proto = parse(
        f"""<ir_version: 8, opset_import: ["": 17]> g (float[{sizes}] x) => (float[{sizes}] y) {{
            {first} = MatMul({order[0]})
            y = MatMul({order[1].replace("r, W", "W, r")})
        }}""",
        {name: known_rank(20, 20, 4, rng, scale=0.125) for name in "WV"},
    )
    shaped(proto, target, {"x": uniform(shape, rng)}, rank=4)


@pytest.mark.parametrize("target", ["nnapi", "coreml", "xnnpack"])
def test_doubles_on_the_left_stay_products(target: str, rng: np.random.Generator) -> None:
    proto = parse(
        """<ir_version: 8, opset_import: ["": 17]>
        g (double[20, 5] x) => (double[24, 5] y) { y = MatMul(W, x) }""",
        {"W": known_rank(24, 20, 4, rng, np.float64, scale=0.125)},
    )
    sizes = {"x": (20, 5)}
    result = factored(proto, shape_for=target, rank=4, input_shapes=sizes)
    assert op_types(result.model) == ["MatMul", "MatMul"]
    assert any("is double: no Conv takes it" in note for note in result.report.notes)
    assert_same(proto, result.model, {"x": uniform((20, 5), rng, np.float64)})


@pytest.mark.parametrize(
    ("bias", "line"),
    [((40, 1), "Gemm(x, W, C)"), ((40,), "Gemm<beta = 2.0>(x, W, r)"), ((40, 1), "Gemm(x, W, r)")],
)
def test_what_is_no_row_of_a_constant_is_not_made_one(
    bias: tuple[int, ...], line: str, rng: np.random.Generator
) -> None:
    proto = parse(
        f"""<ir_version: 8, opset_import: ["": 17]> g (float[40, 32] x) => (float[40, 40] y) {{
            r = Tanh(C)
            y = {line} }}""",
        {"W": known_rank(32, 40, 8, rng, scale=0.125), "C": uniform(bias, rng)},
    )
    shaped(proto, "nnapi", {"x": uniform((40, 32), rng)})


def test_a_scale_that_the_element_type_cannot_hold_is_left(rng: np.random.Generator) -> None:
    weight = known_rank(20, 24, 4, rng, np.float16) * np.float16(512)
    proto = parse(
        """<ir_version: 8, opset_import: ["": 17]> g (float16[4, 20] x) => (float16[4, 24] y) {
            y = Gemm<alpha = 1000.0>(x, W) }""",
        {"W": weight},
    )
    model = ir.from_proto(proto)
    notes = shape_for(model, "qnn", {"x": (4, 20)})
    assert any("beyond its element type" in note for note in notes)
    assert model.graph[0].attributes["alpha"].as_float() == 1000.0


def test_a_shared_weight_is_stored_once(rng: np.random.Generator) -> None:
    proto = parse(
        """<ir_version: 8, opset_import: ["": 17]> g (float[20, 20] x) => (float[20, 20] y) {
            t = Transpose(W)
            a = MatMul(x, t)
            b = MatMul(a, t)
            c = MatMul(W, b)
            y = MatMul(W, c)
        }""",
        {"W": known_rank(20, 20, 4, rng, scale=0.125)},
    )
    model = ir.from_proto(proto)
    shape_for(model, "nnapi", {"x": (20, 20)})
    large = [v for v in model.graph.initializers.values() if v.const_value.size == 400]  # type: ignore[union-attr]
    assert len(large) == 2
    assert_same(proto, model, {"x": uniform((20, 20), rng)}, within=1e-5)


@pytest.mark.parametrize("options", [{}, {"check": True}, {"dims": {"N": 1, "T": 7}}])
def test_sizes_that_do_not_fit_ask_for_others(
    options: dict[str, Any], rng: np.random.Generator
) -> None:
    """Not "the result is not valid", and before any work."""
    proto = parse(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[N, T, 32] x) => (float[N, T, 40] y) { s = Add(x, p) y = MatMul(s, W) }""",
        {"W": known_rank(32, 40, 4, rng, scale=0.125), "p": uniform((10, 32), rng)},
    )
    with pytest.raises(
        InputError,
        match=r"shape_for='qnn' fixes the inputs to x \[1, .*expected its sizes from dims",
    ):
        factored(proto, shape_for="qnn", rank=4, **options)
    factored(proto, shape_for="qnn", rank=4, **{**options, "dims": {"N": 1, "T": 10}})


def test_random_graphs_compute_the_same_for_every_target() -> None:
    targets = list(WISHES)
    for seed in range(70):
        case, target = random_graph(seed), targets[seed % len(targets)]
        sizes = {name: array.shape for name, array in case.feeds.items()}
        made = factored(
            case.model, shape_for=target, rank=RANK, min_gain=-0.9, input_shapes=sizes
        ).model
        proto = as_proto(made)
        onnx.checker.check_model(proto, full_check=True)
        # ONNX Runtime 1.32 crashes on a float16 Transpose before a MatMul, has no bfloat16 here.
        run = run_ort if case.kind in (np.float32, np.float64) else run_reference
        before, after = run(case.model, case.feeds), run(proto, case.feeds)
        assert list(after) == list(before)
        for name, array in before.items():
            if not np.isfinite(array.astype(np.float64)).all() or not array.any():
                continue
            off, limit = distance(after[name], array), 30 * ROUNDING[case.coarsest]
            assert off <= limit, f"seed {seed}, {target}: {name} is off by {off:.2g}"


@pytest.mark.parametrize("target", ["nnapi", "coreml", "xnnpack"])
def test_a_last_axis_that_only_the_weight_tells(target: str, rng: np.random.Generator) -> None:
    proto = parse(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[1, 4, 40] x, int64[1] e) => (float[1, 4, 24] y) {
            v = Slice(x, s, e, a)
            y = MatMul(v, W)
        }""",
        {
            "W": known_rank(32, 24, 8, rng, scale=0.125),
            "s": np.array([0]),
            "a": np.array([2]),
        },
    )
    shaped(proto, target, {"x": uniform((1, 4, 40), rng), "e": np.array([32])})


def test_an_alpha_that_a_weight_cannot_take_stays(rng: np.random.Generator) -> None:
    """In float16 a hundred-thousandth of a small weight is 0."""
    proto = parse(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float16[4, 32] x) => (float16[4, 16] y) {
            y = Gemm<alpha = 0.00001>(x, W) }""",
        {"W": uniform((32, 16), rng, np.float16) * np.float16(1e-3)},
    )
    model = ir.from_proto(proto)
    shape_for(model, "qnn", {"x": (4, 32)})
    assert model.graph[0].attributes["alpha"].as_float() == pytest.approx(1e-5)
