"""Weights that a function's call gives are found; calls that gained nothing come back."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_lowrank import inspect
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.graph.inline import call_of, given_weights, inline, put_back
from tests.helpers.models import as_proto, assert_same, factored, known_rank, parse, uniform

SIZE, RANK = 32, 4


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(3)


def model(rng: np.random.Generator, *, full: bool = False) -> onnx.ModelProto:
    """Two calls of a layer with weights of their own, one of them within a block, and a helper.

    Args:
        rng: makes the weights.
        full: whether they are of full rank.
    """
    proto = parse(
        f"""<ir_version: 9, opset_import: ["": 17, "own": 1]>
        main (float[N, {SIZE}] x) => (float[N, {SIZE}] y) {{
            s = own.scale(x)
            h = own.block(s, W, b)
            y = own.linear <t = 1> (h, V, b)
        }}
        <domain: "own", opset_import: ["": 17]>
        linear <t> (x, w, c) => (z) {{ z = Gemm <transB: int = @t> (x, w, c) }}
        <domain: "own", opset_import: ["": 17, "own": 1]>
        block (x, w, c) => (z) {{ a = own.linear <t = 0> (x, w, c) z = Tanh (a) }}
        <domain: "own", opset_import: ["": 17]>
        scale (x) => (z) {{ k = Constant <value = float {{0.5}}> () z = Mul (x, k) }}""",
        {
            "W": known_rank(SIZE, SIZE, SIZE if full else RANK, rng, scale=0.125),
            "V": known_rank(SIZE, SIZE, SIZE if full else RANK, rng, scale=0.125),
            "b": uniform((SIZE,), rng),
        },
    )
    for node, name in zip(proto.graph.node, ("scale", "block", "head"), strict=True):
        node.name = name
        entry = node.metadata_props.add()
        entry.key, entry.value = "pkg.torch.onnx.name_scopes", f"['', '{name}']"
    return proto


def test_weights_that_calls_give_are_factored(rng: np.random.Generator) -> None:
    proto = model(rng)
    result = factored(proto, rank=RANK)
    rows = {row.weight: row for row in result.report.layers}
    assert {name: row.rank for name, row in rows.items()} == {"W": RANK, "V": RANK}
    assert rows["V"].name.startswith("head/")
    assert rows["W"].name.startswith("block/")
    after = as_proto(result.model)
    assert [function.name for function in after.functions] == ["scale"]
    assert after.graph.node[0].op_type == "scale"
    scopes = [entry.value for node in after.graph.node for entry in node.metadata_props]
    assert any("head" in scope for scope in scopes)
    onnx.checker.check_model(after, full_check=True)
    assert_same(proto, after, {"x": uniform((3, SIZE), rng)}, within=1e-5)


def test_inspect_speaks_of_the_same_nodes(rng: np.random.Generator) -> None:
    proto = model(rng)
    found = {row.weight: row for row in inspect(proto).entries}
    assert found["V"].ranks
    result = factored(proto, rank=RANK, exclude=[found["V"].name])
    ranks = {row.weight: row.rank for row in result.report.layers}
    assert ranks == {"W": RANK, "V": None}
    after = as_proto(result.model)
    assert after.graph.node[-1].op_type == "linear"  # its call is there again
    assert {function.name for function in after.functions} == {"linear", "scale"}
    assert_same(proto, after, {"x": uniform((3, SIZE), rng)}, within=1e-5)


def test_where_nothing_is_gained_all_is_as_it_was(rng: np.random.Generator) -> None:
    proto = model(rng, full=True)
    result = factored(proto, energy=1.0)
    assert all(row.rank is None for row in result.report.layers)
    assert len(result.report.layers) == 2
    plain = factored(proto, energy=1.0, exclude=["*"])
    for found in (result, plain):
        assert as_proto(found.model) == as_proto(ir.from_proto(proto))


def test_with_simplification(rng: np.random.Generator) -> None:
    proto = model(rng)
    result = factored(proto, rank=RANK, simplify=True, check=True, samples=2)
    assert {row.rank for row in result.report.layers} == {RANK}
    assert result.report.check is not None
    assert result.report.check.providers[0].outputs[0].relative_l2 < 1e-5
    assert_same(proto, result.model, {"x": uniform((3, SIZE), rng)}, within=1e-5)


def test_data_reach_what_is_inlined(rng: np.random.Generator) -> None:
    result = factored(model(rng), keep=0.5, data={"x": uniform((60, SIZE), rng)})
    assert result.report.calibration is not None
    assert result.report.calibration.layers == 2


@pytest.mark.parametrize("why", ["large body", "passes through", "other opset"])
def test_calls_that_would_cost_or_cannot_stay(why: str, rng: np.random.Generator) -> None:
    extra, opset = "", 17
    if why == "large body":
        numbers = ", ".join("1" for _ in range(300))
        extra = f"k = Constant <value = float[300] {{{numbers}}}> () q = ReduceSum (k)"
    if why == "other opset":
        opset = 16
    proto = parse(
        f"""<ir_version: 9, opset_import: ["": 17, "own": 1]>
        main (float[N, {SIZE}] x) => (float[N, {SIZE}] y) {{
            h, u = own.linear(x, W)
            y, v = own.linear(h, W)
        }}
        <domain: "own", opset_import: ["": {opset}]>
        linear (x, w) => (z, p) {{
            {extra}
            z = MatMul (x, w)
            {"" if why == "passes through" else "p = Identity (x)"}
        }}""".replace("(z, p)", "(z, x)" if why == "passes through" else "(z, p)"),
        {"W": known_rank(SIZE, SIZE, RANK, rng)},
    )
    given = ir.from_proto(proto)
    assert given_weights(given, Constants(given)) == []
    (row,) = factored(proto, rank=RANK).report.layers
    assert "is passed as argument 'w' of function 'linear'" in row.reason


def test_one_call_comes_back_the_other_stays(rng: np.random.Generator) -> None:
    original = ir.from_proto(model(rng))
    inlined = original.clone()
    calls = given_weights(inlined, Constants(inlined))
    assert [call.name for call in calls] == ["block", "head"]
    inline(inlined, calls)
    assert {call_of(node) for node in inlined.graph} == {None, "h", "y"}
    changed = inlined.clone()
    (gemm,) = [node for node in changed.graph if node.op_type == "Gemm"]
    assert call_of(gemm) == "y"
    gemm.attributes["alpha"] = ir.AttrFloat32("alpha", 2.0)
    put_back(changed, inlined, original)
    assert [node.op_type for node in changed.graph] == ["scale", "block", "Gemm"]
    assert [function.name for function in changed.functions.values()] == [
        *("linear", "block", "scale"),
    ]


def test_an_argument_that_the_body_does_not_read_comes_back(rng: np.random.Generator) -> None:
    proto = parse(
        f"""<ir_version: 9, opset_import: ["": 17, "own": 1]>
        main (float[N, {SIZE}] x) => (float[N, {SIZE}] y) {{
            h = own.linear(x, W, u)
            y = own.linear(h, V, v)
        }}
        <domain: "own", opset_import: ["": 17]>
        linear (x, w, unused) => (z) {{ t = MatMul (x, w) z = Tanh (t) }}""",
        {
            "W": known_rank(SIZE, SIZE, RANK, rng, scale=0.125),
            "V": known_rank(SIZE, SIZE, SIZE, rng, scale=0.125),
            "u": uniform((3,), rng),
            "v": uniform((5,), rng),
        },
    )
    result = factored(proto, energy=0.999)
    assert [layer.rank is None for layer in result.report.layers] == [False, True]
    call = next(node for node in as_proto(result.model).graph.node if node.op_type == "linear")
    assert list(call.input) == ["h", "V", "v"]
    assert_same(proto, result.model, {"x": uniform((3, SIZE), rng)}, within=1e-4)
