"""Everything but the factored nodes stays exactly as it was, field by field in the protobuf."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx
import onnx.defs
import onnx.helper
import onnx.numpy_helper
import onnx_ir as ir
import pytest

from onnx_lowrank import compress
from tests.helpers.models import (
    all_node_protos,
    as_proto,
    factored,
    known_rank,
    parse,
    run_ort,
    uniform,
    unsigned,
)
from tests.helpers.places import CACHE

D, RANK = 16, 4
MARK = "lowrank"
NEWEST = onnx.defs.onnx_opset_version()
NEWEST_IR = int(onnx.IR_VERSION)

Message = TypeVar("Message")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(17)


# --- the comparison


def copied(message: Message) -> Message:
    twin = type(message)()
    twin.CopyFrom(message)  # type: ignore[attr-defined]
    return twin


def plain(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which what may be left out or empty is left out."""
    model = copied(model)
    for message in (model, model.graph, *model.functions, *all_node_protos(model)):
        for field, value in message.ListFields():
            if value in ("", 0):
                message.ClearField(field.name)
    for item in model.opset_import:
        item.domain = item.domain  # set or not, it is the same
    return model


def without(message: Message, *fields: str) -> Message:
    twin = copied(message)
    for name in fields:
        twin.ClearField(name)  # type: ignore[attr-defined]
    return twin


def by_name(messages: Sequence[Any]) -> dict[str, Any]:
    return {message.name: message for message in messages}


def assert_nodes(
    before: Sequence[onnx.NodeProto], after: Sequence[onnx.NodeProto], factored: Collection[str]
) -> None:
    """The old nodes in their order, those factored with other inputs, and new ones between."""
    old = [node for node in after if MARK not in node.name]
    kept = [node for node in before if node.op_type != "Constant" or node in old]
    assert [node.name for node in old] == [node.name for node in kept]
    for now, then in zip(old, kept, strict=True):
        if then.name in factored:
            assert now != then
            assert without(now, "input") == without(then, "input")
        else:
            assert now == then
    for name in factored:
        assert any(node.name.startswith(f"{name}.{MARK}") for node in after)


def assert_untouched(
    before: onnx.ModelProto,
    after: onnx.ModelProto,
    nodes: Collection[str],
    weights: Collection[str],
) -> None:
    """All is as it was but for these nodes of the main graph and these weights of theirs."""
    before, after = plain(before), plain(unsigned(after))
    containers = ("graph", "functions", "opset_import")
    assert without(after, *containers) == without(before, *containers)
    imports = [
        sorted((item.domain, item.version) for item in model.opset_import)
        for model in (before, after)
    ]
    assert imports[1] == imports[0]
    assert [f.name for f in after.functions] == [f.name for f in before.functions]
    for now, then in zip(after.functions, before.functions, strict=True):
        assert without(now, "opset_import") == without(then, "opset_import")
        assert {(i.domain, i.version) for i in now.opset_import} == {
            (i.domain, i.version) for i in then.opset_import
        }

    fields = ("node", "initializer", "value_info", "input", "quantization_annotation")
    assert without(after.graph, *fields) == without(before.graph, *fields)
    assert [v for v in before.graph.input if v.name not in weights] == list(after.graph.input)
    annotations = {a.tensor_name: a for a in after.graph.quantization_annotation}
    assert annotations == {
        a.tensor_name: a
        for a in before.graph.quantization_annotation
        if a.tensor_name not in weights
    }
    assert_nodes(before.graph.node, after.graph.node, nodes)

    # In a file the large ones come last.
    tensors = by_name([t for t in after.graph.initializer if MARK not in t.name])
    kept = by_name([t for t in before.graph.initializer if t.name not in weights])
    assert set(tensors) == set(kept)
    for name, old in kept.items():
        tensor = tensors[name]
        assert tensor.data_type == old.data_type
        np.testing.assert_array_equal(
            onnx.numpy_helper.to_array(tensor), onnx.numpy_helper.to_array(old)
        )
        data = ("raw_data", "float_data", "int32_data", "int64_data", "double_data")
        assert without(tensor, *data) == without(old, *data)

    # An initializer says its type and shape itself.
    values = by_name(after.graph.value_info)
    for value in before.graph.value_info:
        if value.name not in kept and value.name not in weights:
            assert values.get(value.name) == value, value.name


# --- a model with all that can be written into one


def rich(rng: np.random.Generator, opset: int = 17, version: int = 10) -> onnx.ModelProto:
    """One layer to factor, "fc", among nodes, notes and names of every kind."""
    model = parse(
        f"""<ir_version: {version},
            opset_import: ["": {opset}, "com.example": 3, "com.unused": 5, "ai.onnx.ml": 2],
            producer_name: "maker", producer_version: "1.2", domain: "org.test",
            model_version: 7, doc_string: "a model">
        main_graph (float[batch, {D}] x, bool flag) => (float[batch, {D}] y, float[batch, ?] z) {{
            h = Relu(x)
            m = MatMul(h, W)
            p = Add(m, b)
            c = com.example.MatMul <strange = 3, more = ["a", "b"]> (p, K)
            k = Constant <value = float[1] {{2.0}}> ()
            q = Mul(c, k)
            s = If (flag) <
                then_branch = left () => (float[batch, {D}] u) {{ u = Tanh(q) }},
                else_branch = right () => (float[batch, {D}] v) {{ v = Sigmoid(q) }}
            >
            y = Add(s, b)
            z = com.example.Nothing(y)
        }}""",
        {
            "W": known_rank(D, D, RANK, rng),
            "K": uniform((D, D), rng),
            "b": uniform((D,), rng),
        },
    )
    graph = model.graph
    for index, node in enumerate(graph.node):
        node.name = f"/layer/{node.op_type}:{index} é"
        node.doc_string = f"doc {index}"
    graph.node[1].name = "fc"
    graph.doc_string = "the graph"
    graph.input[0].doc_string, graph.output[0].doc_string = "an input", "an output"
    graph.initializer[1].doc_string = graph.initializer[2].doc_string = "a tensor"
    for name in "hmpcqs":
        graph.value_info.append(
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", D])
        )
    for name in ("b", "W", "x"):
        annotation = graph.quantization_annotation.add()
        annotation.tensor_name = name
        entry = annotation.quant_parameter_tensor_names.add()
        entry.key, entry.value = "SCALE_TENSOR", "b"
    entry = model.metadata_props.add()
    entry.key, entry.value = "license", "free"
    if version >= 10:  # since when everything else may carry metadata, too
        for part in (
            graph,
            *graph.node,
            graph.value_info[0],
            graph.input[0],
            graph.output[0],
        ):
            entry = part.metadata_props.add()
            entry.key, entry.value = "note", "kept"
    if version < 4:
        for tensor in graph.initializer:
            graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )
    return model


def outcome(model: onnx.ModelProto, tmp_path: Path, *, saved: bool) -> onnx.ModelProto:
    result = factored(model, rank=RANK, constant_inputs=True)
    (layer,) = result.report.layers
    assert layer.status == "factored", layer.reason
    if not saved:
        return as_proto(result.model)
    result.save(tmp_path / "out.onnx")
    return onnx.load(tmp_path / "out.onnx")


@pytest.mark.parametrize("saved", [False, True], ids=["memory", "file"])
@pytest.mark.parametrize("opset", range(7, NEWEST + 1))
def test_every_opset(opset: int, saved: bool, rng: np.random.Generator, tmp_path: Path) -> None:
    model = rich(rng, opset)
    assert_untouched(model, outcome(model, tmp_path, saved=saved), ["fc"], ["W"])


@pytest.mark.parametrize("saved", [False, True], ids=["memory", "file"])
@pytest.mark.parametrize("version", range(3, NEWEST_IR + 1))
def test_every_ir_version(
    version: int, saved: bool, rng: np.random.Generator, tmp_path: Path
) -> None:
    model = rich(rng, version=version)
    after = outcome(model, tmp_path, saved=saved)
    assert after.ir_version == version
    assert_untouched(model, after, ["fc"], ["W"])
    if version < 4:  # where an initializer has to be an input, the factors are Constant nodes
        names = [node.op_type for node in after.graph.node if MARK in node.output[0]]
        assert names == ["Constant", "Constant", "MatMul"]


def test_nothing_to_do_changes_nothing(rng: np.random.Generator, tmp_path: Path) -> None:
    model = rich(rng)
    before = model.SerializeToString()
    result = factored(model, rank=RANK, exclude=["*"])
    assert_untouched(model, as_proto(result.model), [], [])
    assert model.SerializeToString() == before


def test_the_new_node_carries_the_old_ones_metadata(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    after = outcome(rich(rng), tmp_path, saved=False)
    nodes = by_name(after.graph.node)
    own = {entry.key: entry.value for entry in nodes["fc"].metadata_props}
    new = {entry.key: entry.value for entry in nodes["fc.lowrank"].metadata_props}
    assert new == {**own, "onnx_lowrank.pair": "fc"}
    values = by_name(after.graph.value_info)
    shape = values[nodes["fc.lowrank"].output[0]].type.tensor_type.shape
    assert [dim.dim_param or dim.dim_value for dim in shape.dim] == ["batch", RANK]


def test_metadata_of_a_tensor(rng: np.random.Generator, tmp_path: Path) -> None:
    model = rich(rng)
    entry = model.graph.initializer[1].metadata_props.add()
    entry.key, entry.value = "note", "kept"
    after = outcome(model, tmp_path, saved=True)
    assert_untouched(model, after, ["fc"], ["W"])


def test_metadata_of_an_initializers_value(rng: np.random.Generator, tmp_path: Path) -> None:
    # torch's dynamo exporter says there which parameter of the module it is.
    model = rich(rng)
    value = onnx.helper.make_tensor_value_info("b", onnx.TensorProto.FLOAT, [D])
    entry = value.metadata_props.add()
    entry.key, entry.value = "pkg.torch.onnx.original_node_name", "p_bias"
    model.graph.value_info.append(value)
    after = outcome(model, tmp_path, saved=True)
    assert by_name(after.graph.value_info).get("b") == value


def test_an_annotation_of_the_weight_goes_with_it(rng: np.random.Generator, tmp_path: Path) -> None:
    after = outcome(rich(rng), tmp_path, saved=True)
    named = {annotation.tensor_name for annotation in after.graph.quantization_annotation}
    assert named == {"b", "x"}


# --- functions


def with_functions(rng: np.random.Generator) -> onnx.ModelProto:
    model = parse(
        f"""<ir_version: 10, opset_import: ["": 18, "local": 1, "com.example": 2]>
        g (float[N, {D}] x) => (float[N, {D}] y) {{
            h = local.block <slope = 0.5> (x)
            m = MatMul(h, W)
            y = local.outer(m)
        }}
        <domain: "local", opset_import: ["": 18, "com.example": 2], doc_string: "a block">
        block <slope, other: float = 2.0> (a) => (b) {{
            t = LeakyRelu <alpha: float = @slope> (a)
            u = LeakyRelu <alpha: float = @other> (t)
            b = Identity(u)
        }}
        <domain: "local", opset_import: ["": 18, "local": 1]>
        outer (a) => (b) {{ b = local.block <slope = 0.25> (a) }}""",
        {"W": known_rank(D, D, RANK, rng)},
    )
    for index, node in enumerate(all_node_protos(model)):
        node.name = f"n{index}"
    entry = model.functions[0].metadata_props.add()
    entry.key, entry.value = "note", "kept"
    value = onnx.helper.make_tensor_value_info("t", onnx.TensorProto.FLOAT, ["N", D])
    model.functions[0].value_info.append(value)
    return model


def test_functions(rng: np.random.Generator, tmp_path: Path) -> None:
    model = with_functions(rng)
    after = outcome(model, tmp_path, saved=True)
    assert_untouched(model, after, ["n1"], ["W"])
    feeds = {"x": uniform((3, D), rng)}
    np.testing.assert_allclose(
        run_ort(after, feeds)["y"], run_ort(model, feeds)["y"], rtol=1e-4, atol=1e-4
    )


def test_overloaded_functions(rng: np.random.Generator, tmp_path: Path) -> None:
    model = parse(
        f"""<ir_version: 10, opset_import: ["": 18, "local": 1]>
        g (float[N, {D}] x) => (float[N, {D}] y) {{
            h = local.act:one (x)
            m = MatMul(h, W)
            y = local.act:two (m)
        }}
        <domain: "local", overload: "one", opset_import: ["": 18]> act (a) => (b) {{ b = Relu(a) }}
        <domain: "local", overload: "two", opset_import: ["": 18]> act (a) => (b) {{ b = Tanh(a) }}
        """,
        {"W": known_rank(D, D, RANK, rng)},
    )
    for index, node in enumerate(model.graph.node):
        node.name = f"n{index}"
    after = outcome(model, tmp_path, saved=True)
    assert_untouched(model, after, ["n1"], ["W"])


# --- corners of the container


def test_the_default_domain_by_its_long_name(rng: np.random.Generator, tmp_path: Path) -> None:
    model = parse(
        f"""<ir_version: 8, opset_import: ["ai.onnx": 17]>
        g (float[N, {D}] x) => (float[N, {D}] y) {{ h = Relu(x)  y = ai.onnx.MatMul(h, W) }}""",
        {"W": known_rank(D, D, RANK, rng)},
    )
    after = outcome(model, tmp_path, saved=True)
    onnx.checker.check_model(after)
    feeds = {"x": uniform((3, D), rng)}
    np.testing.assert_allclose(
        run_ort(after, feeds)["y"], run_ort(model, feeds)["y"], rtol=1e-4, atol=1e-4
    )


def test_a_domain_that_is_imported_twice(rng: np.random.Generator, tmp_path: Path) -> None:
    # skl2onnx writes such models.
    model = parse(
        f"""<ir_version: 8, opset_import: ["": 17, "ai.onnx.ml": 1]>
        g (float[N, {D}] x) => (float[N, {D}] y) {{ y = MatMul(x, W) }}""",
        {"W": known_rank(D, D, RANK, rng)},
    )
    model.opset_import.append(onnx.helper.make_opsetid("", 17))
    after = outcome(model, tmp_path, saved=True)
    assert {(i.domain, i.version) for i in after.opset_import} == {("", 17), ("ai.onnx.ml", 1)}


def test_a_graph_that_imports_no_default_domain(rng: np.random.Generator, tmp_path: Path) -> None:
    model = parse(
        f"""<ir_version: 8, opset_import: ["com.microsoft": 1]>
        g (float[N, {D}] x) => (float[N, {D}] y) {{ y = com.microsoft.FusedMatMul(x, W) }}""",
        {"W": known_rank(D, D, RANK, rng)},
    )
    after = outcome(model, tmp_path, saved=True)
    onnx.checker.check_model(after)
    feeds = {"x": uniform((3, D), rng)}
    np.testing.assert_allclose(
        run_ort(after, feeds)["y"], run_ort(model, feeds)["y"], rtol=1e-4, atol=1e-4
    )


def test_types_that_are_no_tensors(rng: np.random.Generator, tmp_path: Path) -> None:
    model = parse(
        f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[N, {D}] x, seq(float[N]) parts, optional(float[2]) maybe)
        => (float[N, {D}] y, int64 count) {{
            y = MatMul(x, W)
            count = SequenceLength(parts)
        }}""",
        {"W": known_rank(D, D, RANK, rng)},
    )
    model.graph.node[0].name, model.graph.node[1].name = "fc", "length"
    after = outcome(model, tmp_path, saved=True)
    assert_untouched(model, after, ["fc"], ["W"])


def test_tensors_of_every_type_and_way_of_storing(rng: np.random.Generator, tmp_path: Path) -> None:
    model = rich(rng)
    for kind in (
        onnx.TensorProto.STRING,
        onnx.TensorProto.BOOL,
        onnx.TensorProto.INT4,
        onnx.TensorProto.UINT8,
        onnx.TensorProto.INT64,
        onnx.TensorProto.FLOAT8E4M3FN,
        onnx.TensorProto.BFLOAT16,
        onnx.TensorProto.COMPLEX64,
    ):
        values: list[Any] = [b"a", b"b"] if kind == onnx.TensorProto.STRING else [1, 0]
        tensor = onnx.helper.make_tensor(f"t{kind}", kind, [2], values)
        model.graph.initializer.append(tensor)
    after = outcome(model, tmp_path, saved=True)
    assert_untouched(model, after, ["fc"], ["W"])


# --- real models, as they are


@pytest.mark.parametrize(
    "name",
    [
        "magika",
        "mlp-sklearn",
        "vit",
        pytest.param("captcha", marks=pytest.mark.slow),
        pytest.param("minilm-l3", marks=pytest.mark.slow),
        pytest.param("minilm-l6-dynamo", marks=pytest.mark.slow),
        pytest.param("ppocrv5-rec", marks=pytest.mark.slow),
    ],
)
def test_real_models(name: str, tmp_path: Path) -> None:
    path = CACHE / f"{name}.onnx"
    if not path.is_file():
        pytest.skip(f"{name} is not here: python models/get.py {name}")
    result = compress(path, keep=0.5, simplify=False, check=False, bench=False)
    layers = [layer for layer in result.report.layers if layer.status == "factored"]
    assert layers
    result.save(tmp_path / "out.onnx")
    assert_untouched(
        onnx.load(path),
        onnx.load(tmp_path / "out.onnx"),
        {layer.name for layer in layers},
        {layer.weight for layer in layers},
    )


def test_an_ir_model_keeps_what_a_protobuf_keeps(rng: np.random.Generator) -> None:
    model = rich(rng)
    result = factored(ir.from_proto(model), rank=RANK)
    assert_untouched(model, as_proto(result.model), ["fc"], ["W"])
