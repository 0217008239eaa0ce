"""Adapters beside a weight: found in every way in which they are written, merged, factored."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_lowrank import compress, inspect
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.graph.spool import Spool
from onnx_lowrank.maps.adapters import Merged, merge_adapters
from onnx_lowrank.maps.forms import all_forms
from onnx_lowrank.numerics.arrays import Array
from tests.helpers.models import (
    all_node_protos,
    as_proto,
    assert_same,
    distance,
    factored,
    op_types,
    parameters,
    parse,
    run_ort,
    uniform,
)

M, N, R = 24, 20, 3
HEAD = '<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>'
SHAPES = {"W": (M, N), "A": (M, R), "B": (R, N), "b": (N,), "c": (N,), "d": (R,), "v": (N,)}
SHAPES |= {"Wt": (N, M), "At": (R, M), "Bt": (N, R), "V": (M, N), "A2": (M, R), "B2": (R, N)}

# Name -> the lines between x and y, and the operators that are left of them.
WRITTEN = {
    "plain": ("w = MatMul(x, W) a = MatMul(x, A) b1 = MatMul(a, B) y = Add(w, b1)", 1),
    "the other way round": (
        "w = MatMul(x, W) a = MatMul(x, A) b1 = MatMul(a, B) y = Add(b1, w)", 1,
    ),
    "scale behind": (
        "w = MatMul(x, W) a = MatMul(x, A) b1 = MatMul(a, B) s1 = Mul(b1, s) y = Add(w, s1)", 1,
    ),
    "scale between": (
        "w = MatMul(x, W) a = MatMul(x, A) s1 = Mul(s, a) b1 = MatMul(s1, B) y = Add(w, b1)", 1,
    ),
    "scale before": (
        "w = MatMul(x, W) s1 = Mul(x, s) a = MatMul(s1, A) b1 = MatMul(a, B) y = Add(w, b1)", 1,
    ),
    "divided": (
        "w = MatMul(x, W) a = MatMul(x, A) b1 = MatMul(a, B) s1 = Div(b1, s) y = Add(w, s1)", 1,
    ),
    "scale of each column": (
        "w = MatMul(x, W) a = MatMul(x, A) b1 = MatMul(a, B) s1 = Mul(b1, v) y = Add(w, s1)", 1,
    ),
    "bias in front of the sum": (
        "w0 = MatMul(x, W) w = Add(w0, b) a = MatMul(x, A) b1 = MatMul(a, B) y = Add(w, b1)", 2,
    ),
    "bias behind the sum": (
        "w = MatMul(x, W) a = MatMul(x, A) b1 = MatMul(a, B) t = Add(w, b1) y = Add(t, b)", 2,
    ),
    "biases of the adapter": (
        "w0 = MatMul(x, W) w = Add(b, w0) a0 = MatMul(x, A) a = Add(a0, d) b0 = MatMul(a, B) "
        "b1 = Add(b0, c) s1 = Mul(b1, s) y = Add(w, s1)", 3,
    ),
    "two in a row": (
        "w = MatMul(x, W) a = MatMul(x, A) b1 = MatMul(a, B) t = Add(w, b1) "
        "a2 = MatMul(x, A2) b2 = MatMul(a2, B2) s2 = Mul(b2, s) y = Add(t, s2)", 1,
    ),
    "passed over": (
        "w0 = MatMul(x, W) w = Identity(w0) x1 = Identity(x) x2 = Dropout(x1) a = MatMul(x2, A) "
        "b1 = MatMul(a, B) y = Add(w, b1)", 2,
    ),
    "weights turned": (
        "W1 = Transpose<perm=[1, 0]>(Wt) w = MatMul(x, W1) A1 = Transpose(At) a = MatMul(x, A1) "
        "B1 = Transpose(Bt) b1 = MatMul(a, B1) y = Add(w, b1)", None,
    ),
    "einsum": (
        'w = Einsum<equation="nd,dk->nk">(x, W) a = Einsum<equation="nd,rd->nr">(x, At) '
        'b1 = Einsum<equation="nr,rk->nk">(a, B) y = Add(w, b1)', 1,
    ),
    "einsum with dots beside MatMul": (
        'w = MatMul(x, W) a = Einsum<equation="...d,dr->...r">(x, A) b1 = MatMul(a, B) '
        "y = Add(w, b1)", 1,
    ),
    "peft by the TorchScript exporter": (
        "w0 = MatMul(x, W) w = Add(b, w0) a = MatMul(x, A) b1 = MatMul(a, B) "
        "k = Constant<value = float {2.0}>() s1 = Mul(b1, k) t = Add(w, s1) y = Cast<to = 1>(t)", 3,
    ),
    "gemm": (
        "w = Gemm<transB=1>(x, Wt, b) a = Gemm<transB=1, alpha=2.0>(x, At) b1 = Gemm(a, B) "
        "s1 = Mul(b1, s) y = Add(w, s1)", 1,
    ),
    "gemm with scales and biases": (
        "w = Gemm<alpha=0.5>(x, W, b) a = Gemm(x, A, d) b1 = Gemm<alpha=3.0, beta=0.5>(a, B, c) "
        "y = Add(b1, w)", 2,
    ),
}  # fmt: skip


def model(body: str, seed: int = 0, **weights: Array) -> onnx.ModelProto:
    rng = np.random.default_rng(seed)
    known = {name: uniform(shape, rng) for name, shape in SHAPES.items()}
    known = {**known, "s": np.array(0.7, np.float32), **weights}
    text = f"{HEAD} g (float[7, {M}] x) => (float[7, {N}] y) {{ {body} }}"
    used = {name: array for name, array in known.items() if re.search(rf"[(, ]{name}[,)]", body)}
    proto = parse(text, used)
    for node in proto.graph.node:
        node.name = f"node_{node.output[0]}"
    return proto


def fed(rows: int = 7) -> dict[str, Array]:
    return {"x": uniform((rows, M), np.random.default_rng(5))}


def merged(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, Merged]:
    found = ir.from_proto(proto)
    what = merge_adapters(found, Constants(found), all_forms(), Spool())
    return ir.to_proto(found), what


def products(proto: onnx.ModelProto) -> int:
    return sum(kind in ("MatMul", "Gemm", "Einsum") for kind in op_types(proto))


@pytest.mark.parametrize("way", WRITTEN)
def test_three_products_become_one(way: str) -> None:
    body, left = WRITTEN[way]
    proto = model(body)
    result, found = merged(proto)
    onnx.checker.check_model(result, full_check=True)
    assert [node.name for node in found.nodes] == ["node_w0" if "w0 =" in body else "node_w"]
    assert not found.left
    assert products(result) == 1
    if left is not None:
        assert len(op_types(result)) == left
    gone = M * R + R * N
    assert sum(found.nodes.values()) == (2 * gone if "A2" in body else gone)
    assert parameters(proto) - parameters(result) >= sum(found.nodes.values()) - N
    assert_same(proto, result, fed(), within=2e-6, in_reference="Einsum" not in body)


@pytest.mark.parametrize("way", WRITTEN)
def test_the_sum_is_factored(way: str) -> None:
    """At full rank the pair is the map with its adapter; two products are left."""
    proto = model(WRITTEN[way][0])
    result = factored(proto, rank=N, min_gain=-1, check=True)
    assert products(as_proto(result.model)) == 2
    assert_same(proto, result.model, fed(), within=1e-5, in_reference=False)
    assert [layer.rank for layer in result.report.layers] == [N]
    (note,) = [note for note in result.report.notes if "merged into" in note]
    assert note.startswith("1 adapter merged into the weights beside them, W + s·A·B")


def test_left_dense_the_sum_is_one_product(tmp_path: Path) -> None:
    """Smaller and faster than three; the report says so."""
    proto = model(WRITTEN["scale behind"][0])
    result = compress(proto, energy=1.0, bench=False)
    assert [layer.rank for layer in result.report.layers] == [None]
    assert op_types(result.model) == ["MatMul"]
    assert any("merged into" in note for note in result.report.notes)
    totals = result.report.totals
    assert totals.parameters_after < totals.parameters_before
    assert_same(proto, result.model, fed(), within=2e-6)
    result.save(tmp_path / "out.onnx")


def test_the_rank_is_that_of_the_sum() -> None:
    """W is of full rank; with its adapter it is of rank 4, which is found with samples."""
    rng = np.random.default_rng(3)
    w = uniform((M, 4), rng) @ uniform((4, N), rng)
    change = uniform((M, R), rng), uniform((R, N), rng)
    proto = model(WRITTEN["plain"][0], W=w - change[0] @ change[1], A=change[0], B=change[1])
    feeds = [{"x": uniform((7, M), rng)} for _ in range(12)]
    for options in ({}, {"data": feeds}, {"data": feeds, "weights": "8"}):
        result = factored(proto, energy=0.9999, rank_multiple=1, check=True, **options)
        assert [layer.rank for layer in result.report.layers] == [4]
        off = distance(run_ort(result.model, fed())["y"], run_ort(proto, fed())["y"])
        assert off < (1e-2 if "weights" in options else 1e-5)
    kept = factored(proto, keep=0.6, data=feeds, rank_multiple=1, check=True)
    assert kept.report.check is not None
    assert kept.report.check.providers[0].outputs[0].relative_l2 < 1e-5


def test_the_names_stay() -> None:
    """The output of the graph, the node of W, and W."""
    result, _ = merged(model(WRITTEN["bias in front of the sum"][0]))
    assert [value.name for value in result.graph.output] == ["y"]
    assert {node.name for node in result.graph.node} == {"node_w0", "node_w"}
    assert {tensor.name for tensor in result.graph.initializer} == {"W", "b"}


SHARED = f"""{HEAD} g (float[7, {M}] x) => (float[7, {N}] y, float[7, {N}] z) {{
    w = MatMul(x, W) v = MatMul(x, V) a = MatMul(x, A)
    b1 = MatMul(a, B) s1 = Mul(b1, s) y = Add(w, s1)
    b2 = MatMul(a, B2) z = Add(b2, v)
}}"""


def test_projections_that_share_a() -> None:
    rng = np.random.default_rng(0)
    weights = {name: uniform(SHAPES[name], rng) for name in ("W", "V", "A", "B", "B2")}
    proto = parse(SHARED, {**weights, "s": np.array([0.3], np.float32)})
    result, found = merged(proto)
    assert len(found.nodes) == 2
    assert op_types(result) == ["MatMul", "MatMul"]
    assert {tensor.name for tensor in result.graph.initializer} == {"W", "V"}
    assert_same(proto, result, fed(), within=2e-6)


STAYS = {
    "w is an output": ("w = MatMul(x, W) a = MatMul(x, A) b1 = MatMul(a, B) y = Add(w, b1)", "w"),
    "b1 is an output": ("w = MatMul(x, W) a = MatMul(x, A) b1 = MatMul(a, B) y = Add(w, b1)", "b1"),
    "a nonlinear adapter": (
        "w = MatMul(x, W) a0 = MatMul(x, A) a = Relu(a0) b1 = MatMul(a, B) y = Add(w, b1)", "",
    ),
    "another input": (
        "x2 = Tanh(x) w = MatMul(x2, W) a = MatMul(x, A) b1 = MatMul(a, B) y = Add(w, b1)", "",
    ),
    "a computed scale": (
        "w = MatMul(x, W) a = MatMul(x, A) b1 = MatMul(a, B) m = ReduceMax(x) n1 = Mul(b1, m) "
        "y = Add(w, n1)", "",
    ),
    "a residual": ("w = MatMul(x, W) a = Relu(w) y = Add(w, a)", ""),
    "a scale for each row": (
        "w = MatMul(x, W) a = MatMul(x, A) b1 = MatMul(a, B) n1 = Mul(b1, rows) y = Add(w, n1)", "",
    ),
    "a subtraction": (
        "w = MatMul(x, W) a = MatMul(x, A) b1 = MatMul(a, B) y = Sub(w, b1)", "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", STAYS)
def test_what_is_no_adapter_stays(way: str) -> None:
    body, output = STAYS[way]
    proto = model(body, rows=uniform((7, 1), np.random.default_rng(2)))
    if output:
        proto.graph.output.append(onnx.helper.make_tensor_value_info(output, 1, [7, N]))
    before = proto.SerializeToString(deterministic=True)
    result, found = merged(proto)
    assert not found.nodes
    assert op_types(result) == op_types(onnx.load_from_string(before))


def test_a_weight_that_others_read_stays_with_the_reason() -> None:
    """The sum would stand beside it."""
    body = WRITTEN["plain"][0].replace("y = Add(w, b1)", "t = Add(w, b1) r = MatMul(x, W) "
                                       "y = Mul(t, r)")  # fmt: skip
    result = factored(model(body), rank=4)
    notes = [note for note in result.report.notes if "adapters that stay" in note]
    assert notes == [
        "adapters that stay beside their weights: node_w: W is also read by others, the sum would "
        "stand beside it"
    ]


@pytest.mark.parametrize("glob", ["node_w", "node_b1"])
def test_what_the_user_leaves_out_stays_as_it_is(glob: str) -> None:
    proto = model(WRITTEN["scale behind"][0])
    result = factored(proto, rank=4, exclude=[glob])
    assert not any("merged into" in note for note in result.report.notes)
    dense = {tensor.name for tensor in as_proto(result.model).graph.initializer}
    assert ("W" in dense) == (glob == "node_w")
    assert {"A", "B"} <= dense
    said = f"adapters that stay beside their weights: node_w: left out by exclude='{glob}'"
    assert said in result.report.notes


def test_forms_that_are_off_stay() -> None:
    result = factored(model(WRITTEN["plain"][0]), rank=4, ops=["conv"])
    assert op_types(result.model) == ["MatMul", "MatMul", "MatMul", "Add"]


def test_inspect_names_it() -> None:
    found = inspect(model(WRITTEN["scale behind"][0]))
    (entry,) = found.entries
    assert (entry.name, entry.form, entry.weight) == ("node_w", "matmul-right + adapter", "W")
    assert entry.shape == (1, M, N)
    assert entry.parameters == M * N + M * R + R * N
    assert entry.reason == f"with its adapter, W + s·A·B, {M * R + R * N} parameters beside W"
    assert found.parameters == entry.parameters + 1


SWAPPED = f"""{HEAD}
g (float[7, {M}] x, float[{M}, {R}] lora_A, float[{R}, {N}] lora_B, float alpha)
=> (float[7, {N}] y)
{{
    w0 = MatMul(x, W) w = Add(w0, b) a = MatMul(x, lora_A) b1 = MatMul(a, lora_B)
    s1 = Mul(b1, alpha) y = Add(w, s1)
}}"""


@pytest.mark.parametrize("both", [True, False])
def test_an_adapter_that_is_fed_leaves_its_weight_as_it_is(both: bool) -> None:
    rng = np.random.default_rng(0)
    text, weights = SWAPPED, {"W": uniform((M, N), rng), "b": uniform((N,), rng)}
    if not both:
        text = text.replace(f"float[{M}, {R}] lora_A,", "")
        weights["lora_A"] = uniform((M, R), rng)
    proto = parse(text, weights)
    result = factored(proto, rank=4)
    layer = next(layer for layer in result.report.layers if layer.weight == "W")
    names = "'lora_A' and 'lora_B'" if both else "'lora_B'"
    assert f"an adapter stands beside it whose weights are given as input, {names}" in layer.reason
    assert op_types(result.model) == op_types(proto)


def test_an_adapter_beside_a_quantized_weight_stays() -> None:
    rng = np.random.default_rng(0)
    body = "W = DequantizeLinear(q, scale) " + WRITTEN["plain"][0]
    proto = model(
        body, q=rng.integers(-9, 9, (M, N)).astype(np.int8), scale=np.array(0.1, np.float32)
    )
    del proto.graph.initializer[:1]
    result = factored(proto, rank=4)
    reasons = {layer.name: layer.reason for layer in result.report.layers}
    assert "is quantized (DequantizeLinear)" in reasons["node_w"]
    assert "is the first map of a pair" in reasons["node_a"]
    assert op_types(result.model) == op_types(proto)


@pytest.mark.parametrize("kind", ["float16", "double"])
def test_other_types(kind: str) -> None:
    """A float16 base with an adapter in float32, as mixed training leaves it; double alone."""
    rng = np.random.default_rng(0)
    if kind == "double":
        text = f"""{HEAD} g (double[7, {M}] x) => (double[7, {N}] y) {{
            w = MatMul(x, W) a = MatMul(x, A) b1 = MatMul(a, B) y = Add(w, b1) }}"""
        types: dict[str, Any] = dict.fromkeys("WAB", np.float64)
    else:
        text = f"""{HEAD} g (float16[7, {M}] x) => (float16[7, {N}] y) {{
            w = MatMul(x, W) x1 = Cast<to = 1>(x) a = MatMul(x1, A) b1 = MatMul(a, B)
            b2 = Cast<to = 10>(b1) y = Add(w, b2) }}"""
        types = {"W": np.float16, "A": np.float32, "B": np.float32}
    proto = parse(text, {name: uniform(SHAPES[name], rng, own) for name, own in types.items()})
    proto = onnx.shape_inference.infer_shapes(proto)
    result, found = merged(proto)
    assert len(found.nodes) == 1
    assert op_types(result) == ["MatMul"]
    assert_same(proto, result, {"x": uniform((7, M), rng, types["W"])}, in_reference=False)


def test_old_files_whose_weights_are_constant_nodes() -> None:
    """Before IR version 4 an initializer is an input: a new bias is a Constant node there."""
    proto = model(WRITTEN["biases of the adapter"][0])
    nodes = [
        onnx.helper.make_node("Constant", [], [tensor.name], value=tensor)
        for tensor in proto.graph.initializer
    ]
    for place, node in enumerate(nodes):
        proto.graph.node.insert(place, node)
    del proto.graph.initializer[:]
    proto.ir_version = 3
    result, found = merged(proto)
    assert len(found.nodes) == 1
    assert not result.graph.initializer
    assert sum(node.op_type == "Constant" for node in all_node_protos(result)) == 3
    assert_same(proto, result, fed(), within=2e-6, in_reference=False)


def test_a_bias_of_one_element_in_an_adapter() -> None:
    proto = model("w = MatMul(x, W) a = Gemm(x, A, d) b1 = Gemm(a, B, e) y = Add(w, b1)",
                  e=np.array([0.4], np.float32))  # fmt: skip
    result, found = merged(proto)
    assert len(found.nodes) == 1
    assert products(result) == 1
    assert_same(proto, result, fed(), within=2e-6)


def test_a_scale_that_adds_an_axis_leaves_all_as_it_is() -> None:
    body = (
        "w = MatMul(x, W) a = MatMul(x, A) b1 = MatMul(a, B) b2 = Mul(b1, t) z = Add(w, b2) "
        f"flat = Constant<value = int64[2] {{-1, {N}}}>() y = Reshape(z, flat)"
    )
    proto = model(body, t=np.full((1, 1, 1), 0.5, np.float32))
    shaped = onnx.shape_inference.infer_shapes(proto)
    result, found = merged(shaped)
    assert not found.nodes
    onnx.checker.check_model(result, full_check=True)
