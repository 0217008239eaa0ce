"""Where a weight may live, and what of a model stays as it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.checker
import onnx.numpy_helper
import onnx.parser
import onnx.shape_inference
import pytest
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantType,
    quantize_dynamic,
    quantize_static,
)

from onnx_lowrank.numerics.arrays import Array
from tests.helpers.models import (
    all_graph_protos,
    all_node_protos,
    as_proto,
    assert_same,
    assert_valid,
    distance,
    factored,
    known_rank,
    linear_model,
    op_types,
    parameters,
    parse,
    run_ort,
    uniform,
    unsigned,
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


# --- initializers that are inputs


def old_model(version: int, opset: int, rng: np.random.Generator) -> onnx.ModelProto:
    model = parse(
        f"""<ir_version: {version}, opset_import: ["": {opset}]>
        g (float[3, {D}] x, float[{D}, {D}] W, float[{D}, {D}] V) => (float[3, {D}] y) {{
            h = MatMul(x, W)
            T = Transpose(V)
            k = MatMul(h, T)
            y = MatMul(k, V)
        }}""",
        {"W": known_rank(D, D, RANK, rng), "V": known_rank(D, D, RANK, rng)},
    )
    return onnx.shape_inference.infer_shapes(model)


@pytest.mark.parametrize("version", [3, 8])
def test_initializers_that_are_inputs_are_left_with_a_reason(
    version: int, rng: np.random.Generator
) -> None:
    model = old_model(version, 8, rng)
    result = factored(model, rank=RANK)
    assert {layer.status for layer in result.report.layers} == {"dense"}
    for layer in result.report.layers:
        assert "also a graph input" in layer.reason
        assert "constant_inputs=True" in layer.reason
    after = as_proto(result.model)
    assert [value.name for value in after.graph.input] == ["x", "W", "V"]
    assert after.ir_version == version
    assert_same(model, after, {"x": uniform((3, D), rng)})


@pytest.mark.parametrize("version", [3, 8])
def test_constant_inputs_forces_them(version: int, rng: np.random.Generator) -> None:
    model = old_model(version, 8, rng)
    result = factored(model, rank=RANK, constant_inputs=True)
    assert {layer.status for layer in result.report.layers} == {"factored"}
    after = as_proto(result.model)
    assert [value.name for value in after.graph.input] == ["x"]
    assert after.ir_version == version
    # Before IR version 4 an initializer would have to be an input again.
    assert len(after.graph.initializer) == (0 if version == 3 else 4)
    assert parameters(after) == 2 * PAIR
    assert_valid(after)
    assert_same(model, after, {"x": uniform((3, D), rng)})


def test_an_overridable_weight_can_still_be_overridden(rng: np.random.Generator) -> None:
    model = old_model(8, 8, rng)
    after = factored(model, rank=RANK).model
    feeds = {"x": uniform((3, D), rng), "W": uniform((D, D), rng)}
    np.testing.assert_array_equal(run_ort(model, feeds)["y"], run_ort(after, feeds)["y"])


# --- what stays


def annotated(rng: np.random.Generator) -> onnx.ModelProto:
    model = parse(
        f"""<ir_version: 10, opset_import: ["": 17, "com.example": 3, "ai.onnx.ml": 2],
            producer_name: "maker", producer_version: "1.2", domain: "org.test",
            model_version: 7, doc_string: "a model">
        main_graph (float[batch, {D}] x) => (float[batch, {D}] y) {{
            h = Relu(x)
            m = MatMul(h, W)
            p = Add(m, b)
            y = MatMul(p, V)
        }}""",
        {
            "W": known_rank(D, D, RANK, rng),
            "V": known_rank(D, D, D, rng),
            "b": uniform((D,), rng),
        },
    )
    for index, node in enumerate(model.graph.node):
        node.name, node.doc_string = f"/layer/{node.op_type}_{index}", f"doc {index}"
        node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=f"['', 'layer{index}']")
    model.metadata_props.add(key="license", value="free")
    model.graph.metadata_props.add(key="graph", value="note")
    model.graph.doc_string = "the graph"
    model = onnx.shape_inference.infer_shapes(model)
    model.graph.value_info[0].metadata_props.add(key="value", value="note")
    model.graph.input[0].doc_string = "an input"
    return model


def test_everything_else_is_as_it_was(rng: np.random.Generator) -> None:
    model = annotated(rng)
    after = as_proto(factored(model, rank=RANK, exclude=["/layer/MatMul_3"]).model)
    for name in (
        "ir_version",
        "producer_name",
        "producer_version",
        "domain",
        "model_version",
        "doc_string",
    ):
        assert getattr(after, name) == getattr(model, name), name
    assert {(i.domain, i.version) for i in after.opset_import} == {
        ("", 17),
        ("com.example", 3),
        ("ai.onnx.ml", 2),
    }
    assert list(unsigned(after).metadata_props) == list(model.metadata_props)
    assert list(after.graph.metadata_props) == list(model.graph.metadata_props)
    assert after.graph.name == "main_graph"
    assert after.graph.doc_string == "the graph"
    assert list(after.graph.input) == list(model.graph.input)
    assert list(after.graph.output) == list(model.graph.output)
    values = {value.name: value for value in after.graph.value_info}
    for value in model.graph.value_info:
        assert values[value.name] == value
    tensors = {
        tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in after.graph.initializer
    }
    for tensor in model.graph.initializer:
        if tensor.name != "W":
            np.testing.assert_array_equal(tensors[tensor.name], onnx.numpy_helper.to_array(tensor))
    assert_valid(after)


def test_the_node_itself_is_the_second_of_the_pair(rng: np.random.Generator) -> None:
    model = annotated(rng)
    after = as_proto(factored(model, rank=RANK, exclude=["layer3"]).model)
    before = {node.name: node for node in model.graph.node}
    found = {node.name: node for node in after.graph.node}
    assert set(found) == {*before, "/layer/MatMul_1.lowrank"}
    for name, node in before.items():
        if name != "/layer/MatMul_1":
            node.domain = ""  # set or not, it is the same
            found[name].domain = ""
            assert found[name] == node
    second, first = found["/layer/MatMul_1"], found["/layer/MatMul_1.lowrank"]
    assert list(second.output) == ["m"]
    assert second.doc_string == "doc 1"
    assert list(second.metadata_props) == list(before["/layer/MatMul_1"].metadata_props)
    own = {entry.key: entry.value for entry in second.metadata_props}
    assert {entry.key: entry.value for entry in first.metadata_props} == {
        **own,
        "onnx_lowrank.pair": "/layer/MatMul_1",
    }
    assert list(second.input) == [first.output[0], "/layer/MatMul_1.lowrank_B"]
    assert list(first.input) == ["h", "/layer/MatMul_1.lowrank_A"]
    hidden = next(v for v in after.graph.value_info if v.name == first.output[0])
    dims = [dim.dim_param or dim.dim_value for dim in hidden.type.tensor_type.shape.dim]
    assert dims == ["batch", RANK]


def test_a_node_without_a_name_lends_that_of_its_output(rng: np.random.Generator) -> None:
    model = linear_model(known_rank(D, D, RANK, rng), name="")
    after = as_proto(factored(model, rank=RANK).model)
    assert [node.name for node in after.graph.node] == ["y.lowrank", ""]
    assert [tensor.name for tensor in after.graph.initializer] == ["y.lowrank_A", "y.lowrank_B"]


def test_custom_operators_are_left_alone(rng: np.random.Generator) -> None:
    model = parse(
        f"""<ir_version: 8, opset_import: ["": 17, "custom": 2]>
        g (float[3, {D}] x) => (float[3, {D}] y) {{
            h = custom.MatMul <strange = 3> (x, W)
            y = MatMul(h, V)
        }}""",
        {"W": known_rank(D, D, RANK, rng), "V": known_rank(D, D, RANK, rng)},
    )
    # ONNX Runtime cannot load it: the check, which may be left out for that, has to be asked for.
    result = factored(model, rank=RANK, check=True)
    assert op_types(result.model) == ["MatMul", "MatMul", "MatMul"]
    assert any("neither checked nor timed" in note for note in result.report.notes)
    after = as_proto(result.model)
    assert after.graph.node[0] == model.graph.node[0]
    assert [(i.domain, i.version) for i in after.opset_import] == [("", 17), ("custom", 2)]


# --- quantization after factoring

QUANTIZABLE = {
    "MatMul": ("y = MatMul(x, W)", (4, D), (4, E)),
    "MatMul, 3-D": ("m = MatMul(x, W)\n y = Add(m, b)", (2, 4, D), (2, 4, E)),
    "MatMul, dynamic": ("m = MatMul(x, W)\n y = Add(m, b)", ("B", "S", D), ("B", "S", E)),
    "Gemm": ("y = Gemm(x, W, b)", (4, D), (4, E)),
    "Gemm transB, dynamic": ("y = Gemm <transB = 1> (x, W, b)", ("B", D), ("B", E)),
}


def quantizable(name: str, rng: np.random.Generator) -> tuple[onnx.ModelProto, dict[str, Array]]:
    body, x, y = QUANTIZABLE[name]
    shape_x, shape_y = (str(list(shape)).replace("'", "") for shape in (x, y))
    weight = known_rank(*((E, D) if "transB" in name else (D, E)), RANK, rng)
    model = parse(
        f"""<ir_version: 8, opset_import: ["": 17]>
        g (float{shape_x} x) => (float{shape_y} y) {{ {body} }}""",
        {"W": weight, "b": uniform((E,), rng)},
    )
    feeds = {"x": uniform([3 if isinstance(size, str) else size for size in x], rng)}
    return onnx.shape_inference.infer_shapes(model), feeds


class Feeds(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, feeds: dict[str, Array]) -> None:
        self._left = [feeds, feeds]

    def get_next(self) -> dict[str, Array] | None:
        return self._left.pop() if self._left else None


@pytest.mark.parametrize("name", QUANTIZABLE)
@pytest.mark.parametrize("how", ["dynamic", "static"])
@pytest.mark.filterwarnings("ignore")
def test_the_result_can_be_quantized(
    name: str, how: str, rng: np.random.Generator, tmp_path: Path
) -> None:
    """What int8 adds to the error of OUT is judged against what it adds to that of IN.

    Weights have 7 bits: without int8 dot products a processor adds two products in 16 bits, which
    saturate with 8-bit weights, in IN and OUT at different values.
    """
    model, feeds = quantizable(name, rng)
    quantized = []
    onnx.save(model, tmp_path / "in.onnx")
    factored(tmp_path / "in.onnx", rank=RANK).save(tmp_path / "out.onnx")
    for label in ("in", "out"):
        source, target = tmp_path / f"{label}.onnx", tmp_path / f"{label}.quantized.onnx"
        if how == "dynamic":
            quantize_dynamic(source, target, weight_type=QuantType.QInt8, reduce_range=True)
        else:
            quantize_static(source, target, Feeds(feeds), reduce_range=True)
        quantized.append(onnx.load(target))
    weights = [
        {t.name: t for t in proto.graph.initializer if t.data_type == onnx.TensorProto.INT8}
        for proto in quantized
    ]
    large = [[t for t in each.values() if len(t.dims) == 2] for each in weights]
    assert len(large[0]) == 1
    assert len(large[1]) == 2  # both factors are quantized
    exact = run_ort(model, feeds)["y"]
    before, found = (distance(run_ort(proto, feeds)["y"], exact) for proto in quantized)
    assert before < 0.05
    assert found < before + 0.03
