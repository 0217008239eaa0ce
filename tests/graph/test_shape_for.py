"""``--for``: the result keeps what it computes and gets the shape that the target likes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_lowrank import InputError, UsageError
from onnx_lowrank.graph.fixed import infer_shapes
from onnx_lowrank.graph.shape_for import shape_for
from onnx_lowrank.graph.wishes import WISHES
from onnx_lowrank.targets.rules import Graph, all_rules
from tests.helpers.models import (
    as_proto,
    assert_same,
    factored,
    known_rank,
    linear_model,
    op_types,
    parse,
    uniform,
)
from tests.helpers.shaped import linear, shaped

RULES = {rules.name: rules for rules in all_rules()}
PROVIDERS = {
    "qnn": "qnn",
    "nnapi": "nnapi",
    "coreml": "coreml (NeuralNetwork)",
    "webgpu": "webgpu",
    "xnnpack": "xnnpack",
}
PRODUCTS = ("MatMul", "Gemm", "Conv")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def refusals(model: ir.Model, target: str) -> dict[str, str]:
    """The products that the target's provider leaves to the CPU, and why."""
    model = model.clone()
    infer_shapes(model)
    graph = Graph(model)
    found = {
        node.name or "": RULES[PROVIDERS[target]].refusal(graph, node)
        for node in graph.nodes
        if node.op_type in PRODUCTS
    }
    return {name: why for name, why in found.items() if why is not None}


@pytest.mark.parametrize("target", PROVIDERS)
@pytest.mark.parametrize("rows", ["N, T", "N", "2, 3", "B, N, T"])
def test_products_are_taken_afterwards(target: str, rows: str, rng: np.random.Generator) -> None:
    proto = linear(rng, rows)
    sizes = [2, 3, 4][: rows.count(",") + 1]
    model = shaped(proto, target, {"x": uniform((*sizes, 32), rng)})
    assert refusals(model, target) == {}


def test_two_dimensional_pairs_share_one_reshape(rng: np.random.Generator) -> None:
    model = shaped(linear(rng), "nnapi", {"x": uniform((2, 3, 32), rng)})
    assert op_types(model) == [
        *("Reshape", "MatMul", "Gemm", "Reshape", "Relu"),
        *("Reshape", "MatMul", "Gemm", "Reshape"),
    ]
    assert [list(v.shape or ()) for v in model.graph.inputs] == [[2, 3, 32]]
    assert [list(v.shape or ()) for v in model.graph.outputs] == [[2, 3, 40]]
    assert [v.name for v in model.graph.outputs] == ["y"]


def test_notes_say_what_was_done(rng: np.random.Generator) -> None:
    result = factored(linear(rng), shape_for="nnapi", rank=8, dims={"N": 2, "T": 5})
    assert "shaped for nnapi: inputs fixed to x [2, 5, 32]" in result.report.notes
    assert (
        "shaped for nnapi: products made 2-D (2), products kept 2-D behind another (2), "
        "biases merged into Gemm (2)" in result.report.notes
    )
    assert result.report.settings["shape_for"] == "nnapi"


def test_what_stays_is_named(rng: np.random.Generator) -> None:
    proto = compressed(rng, "b = Compress<axis = 1>(a, c)")
    result = factored(proto, shape_for="coreml", rank=8, input_shapes={"x": (4, 5, 32), "c": (3,)})
    left = [note for note in result.report.notes if "left as it stands" in note]
    assert len(left) == 1  # for both products of the pair
    assert left[0].endswith("more than one of its sizes is not known, or one is 0")
    feeds = {"x": uniform((4, 5, 32), rng), "c": np.array([True, False, True])}
    assert_same(proto, result.model, feeds, within=1e-5)


def test_one_unknown_size_is_enough_for_two_axes(rng: np.random.Generator) -> None:
    proto = compressed(rng, "b = Identity(a)")
    sizes = {"x": (4, 5, 32), "c": (3,)}
    model = factored(proto, shape_for="coreml", rank=8, input_shapes=sizes).model
    assert op_types(model)[2:] == ["Reshape", "MatMul", "MatMul", "Reshape"]
    for chosen in ([True, False, True], [True, True, True]):
        feeds = {"x": uniform((4, 5, 32), rng), "c": np.array(chosen)}
        assert_same(proto, model, feeds, within=1e-5)


def compressed(rng: np.random.Generator, line: str) -> onnx.ModelProto:
    """A product behind a choice of rows, the number of which depends on the data."""
    return parse(
        f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[N, M, 32] x, bool[C] c) => (float[P, Q, 40] y) {{
            a = Compress<axis = 0>(x, c)
            {line}
            y = MatMul(b, W)
        }}""",
        {"W": known_rank(32, 40, 8, rng, scale=0.125)},
    )


@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("bias", [(40,), (1, 40), (1,), (), (6, 40), None])
@pytest.mark.parametrize("target", ["qnn", "nnapi", "xnnpack"])
def test_gemm_of_any_kind(
    target: str,
    bias: tuple[int, ...] | None,
    trans_a: int,
    trans_b: int,
    rng: np.random.Generator,
) -> None:
    weight = known_rank(32, 40, 8, rng, scale=0.125)
    weights = {"W": weight.T.copy() if trans_b else weight}
    if bias is not None:
        weights["C"] = uniform(bias, rng)
    rows = "32, 6" if trans_a else "6, 32"
    proto = parse(
        f"""<ir_version: 8, opset_import: ["": 17]> g (float[{rows}] x) => (float[6, 40] y) {{
            y = Gemm<alpha = 0.5, beta = 2.0, transA = {trans_a}, transB = {trans_b}>
                (x, W{"" if bias is None else ", C"}) }}""",
        weights,
    )
    feeds = {"x": uniform((32, 6) if trans_a else (6, 32), rng)}
    dense = ir.from_proto(proto)
    shape_for(dense, target, {"x": feeds["x"].shape})
    onnx.checker.check_model(as_proto(dense), full_check=True)
    assert_same(proto, dense, feeds, within=1e-5)
    for model in (dense, shaped(proto, target, feeds)):
        left = refusals(model, target)
        if bias == (6, 40):  # one bias for each row: no provider has that
            assert all("C must be" in why for why in left.values())
        else:
            assert left == {}
        for node in model.graph:
            assert not {"alpha", "beta", "transA"} & set(node.attributes)


@pytest.mark.parametrize("shape", [(32, 5), (2, 32, 5), (3, 2, 32, 5)])
@pytest.mark.parametrize("target", ["nnapi", "coreml", "xnnpack"])
def test_constant_on_the_left_becomes_a_convolution(
    target: str, shape: tuple[int, ...], rng: np.random.Generator
) -> None:
    sizes = ", ".join(map(str, shape))
    out = ", ".join(map(str, (*shape[:-2], 48, 5)))
    proto = parse(
        f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[{sizes}] x) => (float[{out}] y) {{ y = MatMul(W, x) }}""",
        {"W": known_rank(48, 32, 8, rng, scale=0.125)},
    )
    model = shaped(proto, target, {"x": uniform(shape, rng)})
    assert op_types(model) == ["Reshape", "Conv", "Conv", "Reshape"]
    assert refusals(model, target) == {}


def test_shared_weights_stay_shared(rng: np.random.Generator) -> None:
    proto = parse(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[2, 3, 32] x) => (float[2, 3, 32] y, float[6, 32] z) {
            y = MatMul(x, W)
            f = Reshape(x, s)
            t = Transpose<perm = [1, 0]>(W)
            u = MatMul(f, t)
            z = Add(u, u)
        }""",
        {"W": known_rank(32, 32, 8, rng, scale=0.125), "s": np.array([6, 32], np.int64)},
    )
    portable = factored(proto, rank=8)
    model = shaped(proto, "webgpu", {"x": uniform((2, 3, 32), rng)})
    assert op_types(model) == op_types(portable.model)
    nnapi = shaped(proto, "nnapi", {"x": uniform((2, 3, 32), rng)})
    assert refusals(nnapi, "nnapi") == {}
    assert "Transpose" not in op_types(nnapi)  # stored as it is read: NNAPI wants initializers


@pytest.mark.parametrize(
    ("target", "rank"),
    [(None, 24), ("cpu", 32), ("arm", 32), ("qnn", 32), ("webgpu", 20), ("xnnpack", 32)],
)
def test_rank_multiples(target: str | None, rank: int, rng: np.random.Generator) -> None:
    weight = known_rank(128, 128, 17, rng)
    result = factored(linear_model(weight, rows=2), energy=1.0 - 1e-9, shape_for=target)
    (layer,) = result.report.layers
    assert layer.rank == rank
    own = factored(
        linear_model(weight, rows=2), energy=1.0 - 1e-9, shape_for=target, rank_multiple=1
    )
    assert own.report.layers[0].rank == 17


def test_portable_is_the_default_and_untouched(rng: np.random.Generator) -> None:
    proto = linear(rng)
    result = factored(proto, rank=8)
    assert op_types(result.model) == ["MatMul", "MatMul", "Add", "Relu", "MatMul", "MatMul", "Add"]
    assert not any("shaped" in note for note in result.report.notes)
    assert result.report.settings["shape_for"] is None


def test_sizes_are_those_of_the_data(tmp_path: Path, rng: np.random.Generator) -> None:
    np.savez(tmp_path / "d.npz", x=uniform((4, 7, 32), rng))
    result = factored(
        linear(rng), shape_for="qnn", rank=8, check=True, data=tmp_path / "d.npz", calibrate=False
    )
    assert [list(v.shape or ()) for v in result.model.graph.inputs] == [[1, 7, 32]]
    assert result.report.check is not None
    assert result.report.check.providers[0].outputs[0].relative_l2 < 1e-5


def test_wrong_names_and_sizes(rng: np.random.Generator) -> None:
    with pytest.raises(
        UsageError, match=r"shape_for=…: expected one of cpu, arm, qnn, .* got 'warp9'"
    ):
        factored(linear(rng), shape_for="warp9")
    with pytest.raises(InputError, match="dims='Q=3'"):
        factored(linear(rng), shape_for="qnn", dims={"Q": 3})
    assert set(WISHES) == {"cpu", "arm", "qnn", "nnapi", "coreml", "webgpu", "xnnpack"}
