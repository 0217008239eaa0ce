"""Weights in loops, branches and function bodies."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.checker
import onnx.numpy_helper
import onnx.parser
import onnx.shape_inference
import pytest

from onnx_lowrank.numerics.arrays import Array
from tests.helpers.models import (
    all_graph_protos,
    all_node_protos,
    as_proto,
    assert_same,
    factored,
    known_rank,
    linear_model,
    parameters,
    parse,
    uniform,
)

D, E, RANK = 16, 24, 4
PAIR = RANK * 2 * D


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(9)


def with_weight(graph: onnx.GraphProto, name: str, array: Array) -> None:
    graph.initializer.append(onnx.numpy_helper.from_array(array, name))


def constant(name: str, array: Array) -> onnx.NodeProto:
    tensor = onnx.numpy_helper.from_array(array, name)
    return onnx.helper.make_node("Constant", [], [name], value=tensor)


def subgraph(model: onnx.ModelProto, name: str) -> onnx.GraphProto:
    return next(graph for graph in all_graph_protos(model) if graph.name == name)


def check_unique_names(model: onnx.ModelProto) -> None:
    """No value is given twice and no two nodes with a name have the same."""
    values = [name for node in all_node_protos(model) for name in node.output if name]
    for graph in all_graph_protos(model):
        values += [tensor.name for tensor in graph.initializer]
    assert len(set(values)) == len(values)
    names = [node.name for node in all_node_protos(model) if node.name]
    assert len(set(names)) == len(names)


# --- subgraphs

LOOP = f"""<ir_version: 8, opset_import: ["": 17]>
g (float[3, {D}] x) => (float[3, {D}] y) {{
    y = Loop (count, , x) <body = body (int64 i, bool go_in, float[3, {D}] h)
        => (bool go, float[3, {D}] next) {{
        go = Identity(go_in)
        m = MatMul(h, W)
        next = Relu(m)
    }}>
}}"""

SCAN = f"""<ir_version: 8, opset_import: ["": 17]>
g (float[5, 3, {D}] x) => (float[5, 3, {D}] y) {{
    y = Scan <num_scan_inputs = 1, body = body (float[3, {D}] h) => (float[3, {D}] out) {{
        out = MatMul(h, W)
    }}> (x)
}}"""


@pytest.mark.parametrize("owner", ["main", "body", "Constant"])
@pytest.mark.parametrize("kind", ["Loop", "Scan"])
def test_loop_and_scan(kind: str, owner: str, rng: np.random.Generator) -> None:
    model = parse(LOOP if kind == "Loop" else SCAN)
    weight = known_rank(D, D, RANK, rng, scale=0.125)
    if kind == "Loop":
        with_weight(model.graph, "count", np.array(3))
    body = subgraph(model, "body")
    if owner == "Constant":
        body.node.insert(0, constant("W", weight))
    else:
        with_weight(model.graph if owner == "main" else body, "W", weight)
    result = factored(model, rank=RANK)
    after = as_proto(result.model)
    assert [layer.status for layer in result.report.layers] == ["factored"]
    assert parameters(after) == PAIR
    home = after.graph if owner == "main" else subgraph(after, "body")
    floats = [t for t in home.initializer if t.data_type == onnx.TensorProto.FLOAT]
    ops = [node.op_type for node in subgraph(after, "body").node]
    assert ops.count("MatMul") == 2
    stored = (0, 2) if owner == "Constant" else (2, 0)  # as the weight was
    assert (len(floats), ops.count("Constant")) == stored
    onnx.checker.check_model(after, full_check=True)
    check_unique_names(after)
    shape = (3, D) if kind == "Loop" else (5, 3, D)
    assert_same(model, after, {"x": uniform(shape, rng)})


def test_a_weight_behind_a_chain_in_a_nested_branch(rng: np.random.Generator) -> None:
    model = parse(
        f"""<ir_version: 8, opset_import: ["": 17]>
        g (bool c, float[3, {D}] x) => (float[3, {D}] y) {{
            y = If (c) <
                then_branch = outer () => (float[3, {D}] a) {{
                    a = If (c) <
                        then_branch = inner () => (float[3, {D}] p) {{ T = Transpose(W)
                                                                      p = MatMul(x, T) }},
                        else_branch = inner2 () => (float[3, {D}] q) {{ q = Neg(x) }}
                    >
                }},
                else_branch = other () => (float[3, {D}] b) {{ b = Identity(x) }}
            >
        }}""",
        {"W": known_rank(D, D, RANK, rng)},
    )
    after = as_proto(factored(model, rank=RANK).model)
    assert [node.op_type for node in subgraph(after, "inner").node] == ["MatMul", "MatMul"]
    assert len(after.graph.initializer) == 2
    for c in (True, False):
        assert_same(model, after, {"c": np.array(c), "x": uniform((3, D), rng)})


def test_names_do_not_clash_across_graphs(rng: np.random.Generator) -> None:
    """Nodes of one name in two branches, and values that have the factors' names already."""
    model = parse(
        f"""<ir_version: 8, opset_import: ["": 17]>
        g (bool c, float[3, {D}] x) => (float[3, {D}] y) {{
            taken = Neg(x)
            y = If (c) <
                then_branch = then () => (float[3, {D}] a) {{ a = MatMul(taken, V) }},
                else_branch = other () => (float[3, {D}] b) {{ b = MatMul(x, U) }}
            >
        }}"""
    )
    model.graph.node[0].output[0] = "fc.lowrank_A"
    subgraph(model, "then").node[0].input[0] = "fc.lowrank_A"
    for branch, name in (("then", "V"), ("other", "U")):
        with_weight(subgraph(model, branch), name, known_rank(D, D, RANK, rng))
        subgraph(model, branch).node[0].name = "fc"
    with_weight(model.graph, "fc.lowrank_B", np.zeros(1, np.float32))
    after = as_proto(factored(model, rank=RANK).model)
    onnx.checker.check_model(after, full_check=True)
    values = [name for node in all_node_protos(after) for name in node.output]
    values += [tensor.name for graph in all_graph_protos(after) for tensor in graph.initializer]
    assert len(set(values)) == len(values)
    assert {"fc.lowrank_A_2", "fc.lowrank_A_3", "fc.lowrank_B_2", "fc.lowrank_B_3"} <= set(values)
    for c in (True, False):
        assert_same(model, after, {"c": np.array(c), "x": uniform((3, D), rng)})


def test_names_are_deterministic(rng: np.random.Generator) -> None:
    model = linear_model(known_rank(D, D, RANK, rng))
    first, second = (as_proto(factored(model, rank=RANK).model) for _ in range(2))
    assert first.SerializeToString(deterministic=True) == second.SerializeToString(
        deterministic=True
    )
    assert [node.name for node in first.graph.node] == ["fc.lowrank", "fc"]
    assert [tensor.name for tensor in first.graph.initializer] == ["fc.lowrank_A", "fc.lowrank_B"]


# --- functions

FUNCTION_MODEL = f"""<ir_version: 8, opset_import: ["": 17, "local": 1]>
g (float[3, {D}] x) => (float[3, {D}] y) {{
    h = local.Linear(x)
    y = local.Linear(h)
}}
<domain: "local", opset_import: ["": 17]>
Linear (a) => (b) {{
    T = Transpose(W)
    b = MatMul(a, T)
}}"""


def test_a_constant_in_a_function_body(rng: np.random.Generator) -> None:
    model = parse(FUNCTION_MODEL)
    model.functions[0].node.insert(0, constant("W", known_rank(D, D, RANK, rng)))
    model.functions[0].node[2].name = "inside"
    result = factored(model, rank=RANK)
    after = as_proto(result.model)
    (layer,) = result.report.layers
    assert (layer.name, layer.status) == ("inside", "factored")
    (function,) = after.functions
    assert (function.domain, function.name) == ("local", "Linear")
    ops = [node.op_type for node in function.node]
    assert ops == ["Constant", "Constant", "MatMul", "MatMul"]
    assert not after.graph.initializer
    assert parameters(after) == PAIR
    assert function.opset_import == model.functions[0].opset_import
    onnx.checker.check_model(after, full_check=True)
    assert_same(model, after, {"x": uniform((3, D), rng)})


def test_a_constant_that_two_nodes_of_a_function_share(rng: np.random.Generator) -> None:
    model = parse(FUNCTION_MODEL)
    body = model.functions[0]
    body.node.insert(0, constant("W", known_rank(D, D, RANK, rng)))
    body.node[-1].output[0] = "m"
    body.node.append(onnx.helper.make_node("MatMul", ["m", "W"], ["b"]))
    result = factored(model, rank=RANK)
    assert [layer.status for layer in result.report.layers] == ["factored", "factored"]
    assert parameters(result.model) == PAIR
    onnx.checker.check_model(as_proto(result.model), full_check=True)
    assert_same(model, result.model, {"x": uniform((3, D), rng)})


def test_a_weight_that_is_a_functions_argument_is_left_with_a_reason(
    rng: np.random.Generator,
) -> None:
    model = parse(
        f"""<ir_version: 8, opset_import: ["": 17, "local": 1]>
        g (float[3, {D}] x) => (float[3, {D}] y) {{
            h = local.Linear(x, W)
            y = local.Linear(h, V)
        }}
        <domain: "local", opset_import: ["": 16]>
        Linear (a, w) => (b) {{ b = MatMul(a, w) }}""",
        {"W": known_rank(D, D, RANK, rng), "V": known_rank(D, D, RANK, rng)},
    )
    result = factored(model, rank=RANK)
    (layer,) = result.report.layers
    assert layer.status == "dense"
    assert layer.weight == "W"
    assert "argument 'w' of function 'Linear'" in layer.reason
    assert "inline the function first" in layer.reason
    after = as_proto(result.model)
    assert [function.name for function in after.functions] == ["Linear"]
    assert parameters(after) == parameters(model)
    assert_same(model, after, {"x": uniform((3, D), rng)})


def test_a_weight_that_is_read_by_a_function_call_too_stays(rng: np.random.Generator) -> None:
    model = parse(
        f"""<ir_version: 8, opset_import: ["": 17, "local": 1]>
        g (float[3, {D}] x) => (float[3, {D}] y) {{
            h = local.Linear(x, W)
            y = MatMul(h, W)
        }}
        <domain: "local", opset_import: ["": 16]>
        Linear (a, w) => (b) {{ b = Add(a, w) }}""".replace("Add(a, w)", "MatMul(a, w)"),
        {"W": known_rank(D, D, RANK, rng)},
    )
    result = factored(model, rank=RANK)
    assert {layer.status for layer in result.report.layers} == {"dense"}
    assert_same(model, result.model, {"x": uniform((3, D), rng)})
