"""Embeddings and heads tied to them: the nodes that they become, and the same outputs."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.helper
import pytest

from onnx_lowrank import Result
from onnx_lowrank.numerics.arrays import Array
from tests.helpers.cases import (
    RANK,
    Shape,
    declared,
    node_protos,
)
from tests.helpers.form_cases import GATHER, D, V
from tests.helpers.models import (
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


@pytest.mark.parametrize("name", GATHER)
def test_gather(name: str, rng: np.random.Generator) -> None:
    case = GATHER[name]
    model = case.model(rng)
    result = factored(model, rank=RANK, ops=("gather",), check=True, samples=1)
    (layer,) = result.report.layers
    after = as_proto(result.model)
    assert (layer.status, layer.form, layer.shape) == ("factored", "gather", (V, D))
    assert tuple(op_types(after)) == case.ops
    assert parameters(after) == RANK * (V + D)
    assert_valid(after)
    assert_same(model, after, case.fed(rng))
    rows = max(case.feeds["i"].size, 1)
    assert layer.macs_before == 0
    assert layer.macs_after == rows * RANK * D
    assert result.report.totals.macs_after == rows * RANK * D


@pytest.mark.parametrize(
    ("nodes", "shape", "y"),
    [
        ("y = Gather <axis = 1> (W, i)", (V, D), (V, 5)),
        ("y = Gather(W, i)", (V, 4, D), (5, 4, D)),
        ("y = Gather(W, i)", (V,), (5,)),
    ],
)
def test_what_is_no_embedding(
    nodes: str, shape: tuple[int, ...], y: Shape, rng: np.random.Generator
) -> None:
    model = parse(
        f"""<ir_version: 8, opset_import: ["": 17]>
        one (int64[5] i) => ({declared({"y": y})}) {{ {nodes} }}""",
        {"W": uniform(shape, rng)},
    )
    result = factored(model, rank=1, ops=("all",))
    assert result.report.layers == ()
    assert node_protos(result.model) == node_protos(model)


HEADS = {
    "Transpose": ("T = Transpose(W)\n y = MatMul(h, T)", {}),
    "Gemm transB": ("y = Gemm <transB = 1> (h, W, b)", {"b": (V,)}),
    "Gemm of a Transpose": ("T = Transpose(W)\n y = Gemm(h, T)", {}),
}


def language_model(
    head: str, rng: np.random.Generator, *, copy: bool = False
) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """Embedding, one nonlinearity, and a head that reads the same table, or its own copy."""
    nodes, more = HEADS.get(head, ("y = MatMul(h, copy)", {}))
    table = known_rank(V, D, RANK, rng)
    weights = {"W": table, **{name: uniform(shape, rng) for name, shape in more.items()}}
    if copy:
        weights["copy"] = np.ascontiguousarray(table.T)
    model = parse(
        f"""<ir_version: 8, opset_import: ["": 17]>
        lm (int64[N] i) => (float[N, {V}] y) {{
            e = Gather(W, i)
            h = Tanh(e)
            {nodes}
        }}""",
        weights,
    )
    model = onnx.shape_inference.infer_shapes(model)
    return model, {"i": rng.integers(0, V, 6)}


def statuses(result: Result) -> list[tuple[str, str]]:
    return [(layer.form, layer.status) for layer in result.report.layers]


@pytest.mark.parametrize("head", HEADS)
def test_a_tied_head_shares_the_tables_factors(head: str, rng: np.random.Generator) -> None:
    model, feeds = language_model(head, rng)
    result = factored(model, rank=RANK, ops=("default", "gather"))
    after = as_proto(result.model)
    assert [status for _, status in statuses(result)] == ["factored", "factored"]
    assert [layer.shared for layer in result.report.layers] == [1, 1]
    biases = sum(tensor.dims[0] for tensor in model.graph.initializer if tensor.name == "b")
    assert parameters(after) == RANK * (V + D) + biases
    assert "W" not in {tensor.name for tensor in after.graph.initializer}
    assert after.ByteSize() < model.ByteSize()
    totals = result.report.totals
    assert (totals.linear_parameters_before, totals.linear_parameters_after) == (
        V * D,
        RANK * (V + D),
    )
    assert_valid(after)
    assert_same(model, after, feeds)


@pytest.mark.parametrize("head", HEADS)
def test_a_tied_head_alone_is_left_dense(head: str, rng: np.random.Generator) -> None:
    model, _ = language_model(head, rng)
    result = factored(model, rank=RANK)
    embedding_layer, head_layer = result.report.layers
    assert embedding_layer.off
    assert head_layer.status == "dense"
    assert "W is also read by e" in head_layer.reason
    assert "would stay" in head_layer.reason
    assert node_protos(result.model) == node_protos(model)


@pytest.mark.parametrize("ops", [None, ("gather",), ("all",)])
def test_a_head_with_a_copy_of_its_own(
    ops: tuple[str, ...] | None, rng: np.random.Generator
) -> None:
    model, feeds = language_model("copy", rng, copy=True)
    result = factored(model, rank=RANK, ops=ops)
    by_ops: dict[tuple[str, ...] | None, list[str]] = {
        None: ["dense", "factored"],
        ("gather",): ["factored", "dense"],
        ("all",): ["factored", "factored"],
    }
    expected = by_ops[ops]
    assert [status for form, status in statuses(result)] == expected
    pairs = expected.count("factored")
    assert parameters(result.model) == pairs * RANK * (V + D) + (2 - pairs) * V * D
    assert_valid(result.model)
    assert_same(model, result.model, feeds)
