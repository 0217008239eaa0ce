"""One weight with several readers: factored once, or left whole; the model never grows."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.checker
import onnx.numpy_helper
import onnx.shape_inference
import onnx_ir as ir
import pytest

from onnx_lowrank import Result
from onnx_lowrank.numerics.arrays import Array
from tests.helpers.models import (
    all_graph_protos,
    as_proto,
    assert_same,
    assert_valid,
    factored,
    known_rank,
    op_types,
    parameters,
    parse,
    uniform,
)

D, RANK = 16, 4
PAIR = RANK * 2 * D


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def model_of(
    signature: str, body: str, weights: dict[str, Array], *, opset: int = 17, version: int = 8
) -> onnx.ModelProto:
    model = parse(
        f"""<ir_version: {version}, opset_import: ["": {opset}]>
        shared ({signature}) {{
            {body}
        }}""",
        weights,
    )
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def statuses(result: Result) -> list[str]:
    return [layer.status for layer in result.report.layers]


BOOL_AND_X = f"bool c, float[3, {D}] x"

FACTORED_ONCE = {
    "the same role": (
        f"float[3, {D}] x",
        "h = MatMul(x, W)\n a = Relu(h)\n y = MatMul(a, W)",
        ["MatMul", "MatMul", "Relu", "MatMul", "MatMul"],
    ),
    "right and left": (
        f"float[{D}, {D}] x",
        "h = MatMul(x, W)\n y = MatMul(W, h)",
        ["MatMul"] * 4,
    ),
    "straight and transposed": (
        f"float[3, {D}] x",
        "h = MatMul(x, W)\n T = Transpose(W)\n y = MatMul(h, T)",
        ["Transpose", "Transpose", "MatMul", "MatMul", "MatMul", "MatMul"],
    ),
    "transposed first": (
        f"float[3, {D}] x",
        "T = Transpose(W)\n h = MatMul(x, T)\n y = MatMul(h, W)",
        ["Transpose", "Transpose", "MatMul", "MatMul", "MatMul", "MatMul"],
    ),
    "Gemm with and without transB": (
        f"float[3, {D}] x",
        "h = Gemm(x, W)\n y = Gemm <transB = 1> (h, W)",
        None,
    ),
    "MatMul and Gemm with transB": (
        f"float[3, {D}] x",
        "T = Transpose(W)\n h = MatMul(x, T)\n y = Gemm <transB = 1> (h, W)",
        None,
    ),
    "two chains to one reading": (
        f"float[3, {D}] x",
        "A = Transpose(W)\n B = Unsqueeze <axes = [0]> (W)\n"
        "C = Transpose <perm = [2, 1, 0]> (B)\n E = Squeeze(C)\n"
        "h = MatMul(x, A)\n y = MatMul(h, E)",
        ["MatMul"] * 4,
    ),
    "a reshaped reading of the same matrix": (
        f"float[3, {D}] x",
        "U = Unsqueeze <axes = [0]> (W)\n h = MatMul(x, W)\n z = MatMul(h, U)\n y = Squeeze(z)",
        None,
    ),
}


@pytest.mark.parametrize("name", FACTORED_ONCE)
def test_factored_once(name: str, rng: np.random.Generator) -> None:
    inputs, body, ops = FACTORED_ONCE[name]
    rows = D if "left" in name else 3
    model = model_of(
        f"{inputs}) => (float[{rows}, {D}] y", body, {"W": known_rank(D, D, RANK, rng)}, opset=11
    )
    result = factored(model, rank=RANK)
    after = as_proto(result.model)
    assert statuses(result) == ["factored", "factored"]
    assert [layer.shared for layer in result.report.layers] == [1, 1]
    if ops is not None:
        assert op_types(after) == ops
    assert parameters(after) == PAIR
    assert len([t for t in after.graph.initializer if t.data_type == 1]) == 2
    assert result.report.totals.linear_parameters_before == D * D
    assert result.report.totals.linear_parameters_after == PAIR
    assert_valid(after)
    assert_same(model, after, {"x": uniform((rows, D), rng)})


def test_two_types_of_one_stored_weight(rng: np.random.Generator) -> None:
    model = model_of(
        f"float[3, {D}] x, double[3, {D}] z) => (float[3, {D}] y, double[3, {D}] w",
        "A = Cast <to = 1> (W)\n B = Cast <to = 11> (W)\n y = MatMul(x, A)\n w = MatMul(z, B)",
        {"W": known_rank(D, D, RANK, rng, np.float16)},
    )
    result = factored(model, rank=RANK)
    after = as_proto(result.model)
    assert sorted(op_types(after)) == ["Cast"] * 4 + ["MatMul"] * 4
    assert [tensor.data_type for tensor in after.graph.initializer] == [10, 10]
    assert parameters(after) == PAIR
    assert_valid(after)
    feeds = {"x": uniform((3, D), rng), "z": uniform((3, D), rng, np.float64)}
    assert_same(model, after, feeds, within=2e-3)


def test_the_main_graph_and_both_branches_of_an_if(rng: np.random.Generator) -> None:
    model = model_of(
        f"{BOOL_AND_X}) => (float[3, {D}] y",
        f"""h = MatMul(x, W)
        y = If (c) <
            then_branch = then () => (float[3, {D}] a) {{ a = MatMul(h, W) }},
            else_branch = other () => (float[3, {D}] b) {{ T = Transpose(W)
                                                          b = MatMul(h, T) }}
        >""",
        {"W": known_rank(D, D, RANK, rng)},
    )
    result = factored(model, rank=RANK)
    after = as_proto(result.model)
    assert statuses(result) == ["factored"] * 3
    assert parameters(after) == PAIR
    onnx.checker.check_model(after, full_check=True)
    for c in (True, False):
        assert_same(model, after, {"c": np.array(c), "x": uniform((3, D), rng)})


def test_a_weight_that_a_branch_owns_stays_in_the_branch(rng: np.random.Generator) -> None:
    model = model_of(
        f"{BOOL_AND_X}) => (float[3, {D}] y",
        f"""y = If (c) <
            then_branch = then () => (float[3, {D}] a) {{ h = MatMul(x, V)
                                                         a = MatMul(h, V) }},
            else_branch = other () => (float[3, {D}] b) {{ b = Identity(x) }}
        >""",
        {},
    )
    weight = known_rank(D, D, RANK, rng)
    then = model.graph.node[0].attribute[0].g
    then.initializer.append(onnx.numpy_helper.from_array(weight, "V"))
    result = factored(model, rank=RANK)
    after = as_proto(result.model)
    assert statuses(result) == ["factored"] * 2
    assert not after.graph.initializer
    graphs = {graph.name: graph for graph in all_graph_protos(after)}
    assert len(graphs["then"].initializer) == 2
    assert parameters(after) == PAIR
    onnx.checker.check_model(after, full_check=True)
    for c in (True, False):
        assert_same(model, after, {"c": np.array(c), "x": uniform((3, D), rng)})


OTHER_READERS = {
    "a Gather": ("int64[2] i", f"float[2, {D}] g", "g = Gather(W, i)", "lookup"),
    "a graph output": ("", "", "", "the graph's outputs"),
    "an Add behind a Transpose": ("", f"float[{D}, {D}] g", "T = Transpose(W)\n g = Add(T, k)", ""),
    "another reading of its elements": (
        f"float[2, {D // 2}] z",
        f"float[2, {2 * D}] g",
        "R = Reshape(W, s)\n g = MatMul(z, R)",
        "",
    ),
}


def read_elsewhere(name: str, rng: np.random.Generator) -> tuple[onnx.ModelProto, dict[str, Array]]:
    extra_in, extra_out, body, _ = OTHER_READERS[name]
    if name == "a graph output":
        extra_out = f"float[{D}, {D}] W"
    signature = ", ".join(filter(None, [f"float[3, {D}] x", extra_in]))
    outputs = ", ".join(filter(None, [f"float[3, {D}] y", extra_out]))
    weights = {"W": known_rank(D, D, RANK, rng)}
    if "k)" in body:
        weights["k"] = uniform((1,), rng)
    if "s)" in body:
        weights["s"] = np.array([D // 2, 2 * D], np.int64)
    model = model_of(f"{signature}) => ({outputs}", f"y = MatMul(x, W)\n {body}", weights)
    model.graph.node[0].name = "linear"
    model.graph.node[-1].name = "linear" if len(model.graph.node) == 1 else "lookup"
    feeds = {"x": uniform((3, D), rng)}
    if "i)" in body:
        feeds["i"] = np.array([1, 5])
    if "z," in body:
        feeds["z"] = uniform((2, D // 2), rng)
    return model, feeds


@pytest.mark.parametrize("name", OTHER_READERS)
def test_a_weight_that_is_read_otherwise_is_left_whole(name: str, rng: np.random.Generator) -> None:
    model, feeds = read_elsewhere(name, rng)
    result = factored(model, rank=RANK, min_gain=0.0)
    assert set(statuses(result)) == {"dense"}
    reader = OTHER_READERS[name][3] or "lookup"
    assert f"W is also read by {reader}" in result.report.layers[0].reason
    assert parameters(result.model) == parameters(model)
    assert op_types(result.model) == op_types(model)
    assert len(as_proto(result.model).SerializeToString()) <= len(model.SerializeToString()) + 100
    assert_same(model, result.model, feeds)


@pytest.mark.parametrize("name", ["a Gather", "a graph output", "an Add behind a Transpose"])
def test_with_a_negative_gain_the_pair_comes_on_top(name: str, rng: np.random.Generator) -> None:
    model, feeds = read_elsewhere(name, rng)
    result = factored(model, rank=RANK, min_gain=-1.0)
    assert statuses(result)[0] == "factored"
    assert "W" in {tensor.name for tensor in as_proto(result.model).graph.initializer}
    assert parameters(result.model) == parameters(model) + PAIR
    totals = result.report.totals
    assert totals.parameters_after == totals.parameters_before + PAIR
    assert_valid(result.model)
    assert_same(model, result.model, feeds)


def test_a_pair_on_top_keeps_within_the_limit(rng: np.random.Generator) -> None:
    model, _ = read_elsewhere("a Gather", rng)
    # W stays: with W and the pair at most 1.5 · W, the pair may have rank 4 of break-even 8.
    assert statuses(factored(model, rank=4, min_gain=-0.5))[0] == "factored"
    assert statuses(factored(model, rank=5, min_gain=-0.5))[0] == "dense"


def test_excluding_one_reader_keeps_them_all(rng: np.random.Generator) -> None:
    model = model_of(
        f"float[3, {D}] x) => (float[3, {D}] y",
        "h = MatMul(x, W)\n y = MatMul(h, W)",
        {"W": known_rank(D, D, RANK, rng)},
    )
    model.graph.node[0].name, model.graph.node[1].name = "one", "two"
    result = factored(model, rank=RANK, exclude=["two"])
    assert statuses(result) == ["dense", "dense"]
    for layer in result.report.layers:
        assert (
            "left out by exclude='two'; the layers that share its weight stay too" in layer.reason
        )
    assert parameters(result.model) == D * D


def test_a_dead_reader_does_not_hold_the_weight(rng: np.random.Generator) -> None:
    model = model_of(
        f"float[3, {D}] x) => (float[3, {D}] y",
        "unread = Transpose(W)\n y = MatMul(x, W)",
        {"W": known_rank(D, D, RANK, rng)},
    )
    result = factored(model, rank=RANK)
    assert parameters(result.model) == PAIR
    assert op_types(result.model) == ["MatMul", "MatMul"]


def test_a_chain_with_another_reader_stays_and_its_weight_with_it(
    rng: np.random.Generator,
) -> None:
    model = model_of(
        f"float[3, {D}] x) => (float[3, {D}] y, float[{D}, {D}] n",
        "T = Transpose(W)\n y = MatMul(x, T)\n n = Neg(T)",
        {"W": known_rank(D, D, RANK, rng)},
    )
    result = factored(model, rank=RANK, min_gain=-1.0)
    assert op_types(result.model) == ["Transpose", "MatMul", "MatMul", "Neg"]
    assert parameters(result.model) == D * D + PAIR
    assert_same(model, result.model, {"x": uniform((3, D), rng)})


@pytest.mark.parametrize("min_gain", [0.0, 0.1, 0.5, 0.9])
def test_parameters_never_increase(min_gain: float, rng: np.random.Generator) -> None:
    model = model_of(
        f"float[3, {D}] x, int64[2] i) => (float[3, 8] y, float[2, {D}] g",
        """h = MatMul(x, A)
        T = Transpose(A)
        k = MatMul(h, T)
        l = MatMul(k, B)
        y = Gemm <transB = 1> (l, C)
        g = Gather(B, i)""",
        {
            "A": known_rank(D, 40, 3, rng),
            "B": known_rank(D, D, 2, rng),
            "C": known_rank(8, D, 2, rng),
        },
    )
    for energy in (0.3, 0.9, 1.0):
        result = factored(model, energy=energy, min_gain=min_gain, rank_multiple=1)
        assert parameters(result.model) <= parameters(model)
        for layer in result.report.layers:
            if layer.status == "factored":
                assert layer.parameters_after <= (1 - min_gain) * layer.parameters_before
        assert result.report.output.parameters == parameters(result.model, integers=True)
        assert result.report.output.bytes <= result.report.input.bytes + 1000


def test_equal_but_separate_weights_are_factored_separately(rng: np.random.Generator) -> None:
    weight = known_rank(D, D, RANK, rng)
    model = model_of(
        f"float[3, {D}] x) => (float[3, {D}] y",
        "h = MatMul(x, W)\n y = MatMul(h, V)",
        {"W": weight, "V": weight},
    )
    result = factored(model, rank=RANK)
    assert [layer.shared for layer in result.report.layers] == [0, 0]
    assert parameters(result.model) == 2 * PAIR


def test_a_factor_that_two_nodes_read_is_one_value(rng: np.random.Generator) -> None:
    model = model_of(
        f"float[3, {D}] x) => (float[3, {D}] y",
        "h = MatMul(x, W)\n y = MatMul(h, W)",
        {"W": known_rank(D, D, RANK, rng)},
    )
    result = factored(model, rank=RANK)
    assert isinstance(result.model, ir.Model)
    uses = [len(value.uses()) for value in result.model.graph.initializers.values()]
    assert uses == [2, 2]
