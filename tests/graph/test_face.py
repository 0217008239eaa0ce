"""What others see of a model, and what describes it, is the same in OUT, field by field."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.checker
import onnx.helper
import onnx.numpy_helper
import pytest
from onnx import TensorProto

from onnx_lowrank import compress
from onnx_lowrank.graph.face import differences
from onnx_lowrank.graph.load import load
from onnx_lowrank.numerics.arrays import Array
from tests.helpers.models import all_graph_protos, known_rank, parse, run_ort, uniform, unsigned
from tests.helpers.onnxsim_here import onnxsim_here

__all__ = ["onnxsim_here"]

D, RANK = 16, 2
MARK = "lowrank"
make_node = onnx.helper.make_node


def weight(seed: int, m: int = D, n: int = D) -> Array:
    return known_rank(m, n, RANK, np.random.default_rng(seed), scale=2**-2)


def described(message: Any, *keys: str) -> None:
    """Give a message metadata and documentation."""
    message.doc_string = f"about {getattr(message, 'name', '')}"
    for key in keys or ("one", "two"):
        entry = message.metadata_props.add()
        entry.key, entry.value = key, f"of {getattr(message, 'name', '')}"


def annotated(graph: onnx.GraphProto, name: str, scale: str) -> None:
    annotation = graph.quantization_annotation.add()
    annotation.tensor_name = name
    entry = annotation.quant_parameter_tensor_names.add()
    entry.key, entry.value = "SCALE_TENSOR", scale


# --- the models


def rich() -> onnx.ModelProto:
    """Everything that a graph of one branch can say of itself."""
    x = onnx.helper.make_tensor_value_info(
        "x", TensorProto.FLOAT, ["N", D], shape_denotation=["DATA_BATCH", "DATA_FEATURE"]
    )
    x.type.denotation = "TENSOR"
    y = onnx.helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", D])
    constant = onnx.numpy_helper.from_array(weight(2), "inner")
    constant.doc_string = "about the tensor"
    nodes = [
        make_node("Identity", ["x"], ["same"], name="same"),
        make_node("MatMul", ["same", "W"], ["h"], name="fc"),
        make_node("Constant", [], ["V"], value=constant, name="v"),
        make_node("MatMul", ["h", "V"], ["k"], name="fc2"),
        make_node("Add", ["k", "b"], ["l"], name="bias"),
        make_node("Tanh", ["l"], ["m"]),
        make_node("MatMul", ["m", "Full"], ["y"], name="kept"),
    ]
    weights = [
        onnx.numpy_helper.from_array(weight(1), "W"),
        onnx.numpy_helper.from_array(uniform([D], np.random.default_rng(3)), "b"),
        onnx.helper.make_tensor("Full", TensorProto.FLOAT, [D, D], np.eye(D).ravel().tolist()),
        onnx.helper.make_tensor("scale", TensorProto.FLOAT, [], [0.5]),
    ]
    values = [
        onnx.helper.make_tensor_value_info("h", TensorProto.FLOAT, ["N", D], "about h"),
        onnx.helper.make_tensor_value_info("m", TensorProto.FLOAT, ["N", D]),
        onnx.helper.make_tensor_value_info("Full", TensorProto.FLOAT, [D, D]),
    ]
    graph = onnx.helper.make_graph(nodes, "rich", [x], [y], weights, value_info=values)
    for message in (x, y, graph, *nodes, *weights, *graph.input, *graph.value_info):
        described(message)
    for target in (graph.node, graph.initializer, graph.input, graph.output):
        for message in target:
            if not message.metadata_props:
                described(message)
    for name in ("x", "m", "y", "Full"):
        annotated(graph, name, "scale")
    model = onnx.helper.make_model(
        graph,
        opset_imports=[onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("ai.onnx.ml", 3)],
        ir_version=10,
        producer_name="producer",
        producer_version="7",
        model_version=3,
        domain="some.domain",
    )
    model.doc_string = "about the model"
    onnx.helper.set_model_props(model, {"author": "me", "onnxsim.kept": "mine"})
    return model


def defaults(ir_version: int = 8) -> onnx.ModelProto:
    """Weights that a caller may override, one of them read through a Transpose."""
    return parse(
        f"""<ir_version: {ir_version}, opset_import: ["": 9]>
        g (float[N, {D}] x, float[{D}, {D}] W, float[{D}] b, float[{D}, {D}] T)
            => (float[N, {D}] y, float[N, {D}] z) {{
            same = Identity(x)
            h = MatMul(same, W)
            k = Add(h, b)
            turned = Transpose<perm = [1, 0]>(T)
            l = MatMul(k, turned)
            y = Relu(l)
            z = MatMul(l, V)
        }}""",
        {
            "W": weight(1),
            "b": uniform([D], np.random.default_rng(2)),
            "T": weight(3),
            **({} if ir_version < 4 else {"V": weight(4)}),
        },
    )


def before_version_4() -> onnx.ModelProto:
    """Every initializer is an input; a weight in a Constant node is not."""
    model = defaults(3)
    constant = onnx.numpy_helper.from_array(weight(4), "inner")
    model.graph.node.insert(0, make_node("Constant", [], ["V"], value=constant, name="v"))
    return model


def branches() -> onnx.ModelProto:
    model = parse(
        f"""<ir_version: 10, opset_import: ["": 17]>
        g (float[2, {D}] x, bool c, int64 n) => (float[2, {D}] y, float[2, {D}] z) {{
            same = Identity(x)
            y = If(c) <
                then_branch = yes () => (float[2, {D}] a) {{ p = MatMul(same, W) a = Relu(p) }},
                else_branch = no () => (float[2, {D}] q) {{ q = MatMul(same, V) }}>
            z = Loop(n, c, same) <
                body = step (int64 i, bool go, float[2, {D}] state)
                    => (bool again, float[2, {D}] next) {{
                    again = Identity(go)
                    r = MatMul(state, W)
                    next = Tanh(r)
                }}>
        }}""",
        {"W": weight(1), "V": weight(2)},
    )
    for number, graph in enumerate(all_graph_protos(model)):
        described(graph)
        for message in (*graph.node, *graph.output, *graph.input):
            described(message)
        for node in graph.node:
            node.name = f"n{number}/{node.output[0]}"
        inner = [v for n in graph.node for v in n.output if v in ("p", "r")]
        for name in inner:
            graph.value_info.append(
                onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, D], "inner")
            )
    return model


def functions() -> onnx.ModelProto:
    model = parse(
        f"""<ir_version: 10, opset_import: ["": 17, "local": 1, "com.microsoft": 1]>
        g (float[N, {D}] x) => (float[N, {D}] y) {{
            a = local.twice(x)
            b = com.microsoft.Gelu(a)
            y = MatMul(b, W)
        }}
        <domain: "local", opset_import: ["": 17]>
        twice (v) => (w) {{ same = Identity(v) w = Add(same, v) }}""",
        {"W": weight(1)},
    )
    described(model.functions[0])
    for node in model.functions[0].node:
        described(node)
        node.name = f"{node.op_type}_inside"
    return model


def kinds() -> onnx.ModelProto:
    """A sequence and an optional among the outputs."""
    model = parse(
        f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[2, {D}] x) => (float[2, {D}] y, seq(float[2, {D}]) s, optional(float[2, {D}]) o) {{
            same = Identity(x)
            y = MatMul(same, W)
            s = SequenceConstruct(y, same)
            o = Optional(same)
        }}""",
        {"W": weight(1)},
    )
    model.graph.output[1].doc_string = "a sequence"
    return model


def plain() -> onnx.ModelProto:
    """Outputs of which nothing but the type is declared, and an input that nothing reads."""
    model = parse(
        f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[N, {D}] x, float[3] unused) => (float[N, {D}] y) {{
            same = Identity(x)
            h = MatMul(same, W)
            y = Relu(h)
        }}""",
        {"W": weight(1)},
    )
    model.graph.output[0].type.tensor_type.ClearField("shape")
    return model


MODELS: dict[str, Callable[[], onnx.ModelProto]] = {
    "rich": rich,
    "defaults": defaults,
    "IR 3": before_version_4,
    "branches": branches,
    "functions": functions,
    "kinds": kinds,
    "plain": plain,
}


# --- the comparison


def values_of(graph: onnx.GraphProto) -> set[str]:
    names = {tensor.name for tensor in graph.initializer} | {v.name for v in graph.input}
    return names | {name for node in graph.node for name in node.output}


def by_name(messages: Any, key: str = "name") -> dict[str, Any]:
    return {getattr(message, key): message for message in messages}


def assert_graph(before: onnx.GraphProto, after: onnx.GraphProto) -> None:
    for name in ("name", "doc_string"):
        assert getattr(after, name) == getattr(before, name)
    for name in ("input", "output", "metadata_props"):
        assert list(getattr(after, name)) == list(getattr(before, name))
    there = values_of(after)
    outputs = {value.name for value in after.output}
    old, new = by_name(before.value_info), by_name(after.value_info)
    assert {name for name in old if name in there - outputs} <= set(new)
    for name, value in new.items():
        if name in old:
            assert value == old[name]
        else:
            assert MARK in name, f"{name} was not declared"
    old = by_name(before.quantization_annotation, "tensor_name")
    new = by_name(after.quantization_annotation, "tensor_name")
    assert new == {name: value for name, value in old.items() if name in there}
    for annotation in new.values():
        assert {entry.value for entry in annotation.quant_parameter_tensor_names} <= there
    old, new = by_name(before.initializer), by_name(after.initializer)
    for name in set(old) & set(new):
        assert new[name] == old[name]
    old, new = by_name(before.node), by_name(after.node)
    for name in set(old) & set(new) - {""}:
        assert new[name].doc_string == old[name].doc_string
        assert list(new[name].metadata_props) == list(old[name].metadata_props)
        for attribute in old[name].attribute:
            if attribute.HasField("g"):
                (now,) = [a for a in new[name].attribute if a.name == attribute.name]
                assert_graph(attribute.g, now.g)


def without(model: onnx.ModelProto) -> onnx.ModelProto:
    rest = onnx.ModelProto()
    rest.CopyFrom(model)
    for name in ("graph", "functions", "opset_import"):
        rest.ClearField(name)
    return rest


def imports(model: onnx.ModelProto) -> dict[str, int]:
    return {item.domain: item.version for item in model.opset_import}


def assert_face(before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    assert without(unsigned(after)) == without(before)
    assert imports(after) == imports(before)
    assert_graph(before.graph, after.graph)
    for now, then in zip(after.functions, before.functions, strict=True):
        for name in ("name", "doc_string", "domain"):
            assert getattr(now, name) == getattr(then, name)
        for name in ("input", "output", "node", "metadata_props"):
            assert list(getattr(now, name)) == list(getattr(then, name))


def written(model: onnx.ModelProto, folder: Path, **options: Any) -> tuple[onnx.ModelProto, Any]:
    result = compress(model, bench=False, samples=1, **{"rank": RANK, "min_gain": 0, **options})
    result.save(folder / "out.onnx", force=True)
    after = onnx.load(folder / "out.onnx")
    return after, result.report


OPTIONS: dict[str, dict[str, Any]] = {
    "simplified": {},
    "as it is": {"simplify": False},
    "nothing factored": {"min_gain": 0.99},
    "not checked": {"check": False},
}


@pytest.mark.usefixtures("onnxsim_here")
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_the_face_stays(name: str, options: str, tmp_path: Path) -> None:
    before = MODELS[name]()
    after, report = written(before, tmp_path, **OPTIONS[options])
    if name != "plain":  # the checker wants the shape of an output, ONNX Runtime does not
        for model in (before, after):
            onnx.checker.check_model(model, full_check=True)
    assert not any("not simplified" in note or "differs" in note for note in report.notes)
    assert_face(before, after)
    factored = [layer.name for layer in report.layers if layer.rank is not None]
    assert bool(factored) == (options != "nothing factored")
    same = sum(node.op_type == "Identity" and node.output[0] == "same" for node in after.graph.node)
    if options == "as it is":
        assert same == sum("same" in node.output for node in before.graph.node)


@pytest.mark.usefixtures("onnxsim_here")
@pytest.mark.parametrize("simplify", [True, False])
@pytest.mark.parametrize("make", [defaults, before_version_4])
def test_inputs_that_are_said_to_be_constant(
    make: Callable[[], onnx.ModelProto], simplify: bool, tmp_path: Path
) -> None:
    """Those that are factored or folded go, and that is said; others keep their default values."""
    before = make()
    after, report = written(
        before, tmp_path, constant_inputs=True, simplify=simplify, exclude=["l"]
    )
    onnx.checker.check_model(after, full_check=True)
    (note,) = [note for note in report.notes if "face differs" in note]
    gone = ["W", "T"] if simplify else ["W"]
    assert note.partition(": ")[2] == "; ".join(f"input {n!r} is gone" for n in gone)
    kept = [value.name for value in before.graph.input if value.name not in gone]
    assert [value.name for value in after.graph.input] == kept
    assert {*kept} - {"x"} <= {tensor.name for tensor in after.graph.initializer}
    assert after.ir_version == before.ir_version
    assert list(after.graph.output) == list(before.graph.output)


@pytest.mark.usefixtures("onnxsim_here")
def test_a_caller_overrides_the_default(tmp_path: Path) -> None:
    """What is fed in place of a default value counts, after as before."""
    before = defaults()
    after, _ = written(before, tmp_path)
    rng = np.random.default_rng(5)
    feeds = {"x": uniform([3, D], rng), "W": uniform([D, D], rng), "T": uniform([D, D], rng)}
    expected, found = (run_ort(model, feeds) for model in (before, after))
    for name in ("y", "z"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-5)
    assert any(MARK in node.name for node in after.graph.node)


def test_metadata_stays_the_same_however_often_it_is_run(tmp_path: Path) -> None:
    first = rich()
    model = first
    for _ in range(3):
        model, _ = written(model, tmp_path, simplify=False, min_gain=0.99)
    assert model.graph.node == first.graph.node
    assert_face(first, model)


def test_external_data_keep_their_documentation(tmp_path: Path) -> None:
    before = rich()
    large = onnx.numpy_helper.from_array(uniform([D, 64], np.random.default_rng(4)), "large")
    described(large)
    before.graph.initializer.append(large)
    before.graph.node.append(make_node("MatMul", ["y", "large"], ["unused"]))
    for number in range(2):
        result = compress(
            before if not number else tmp_path / "0.onnx",
            rank=RANK,
            min_gain=0.99,
            simplify=False,
            check=False,
            bench=False,
        )
        result.save(tmp_path / f"{number}.onnx", external_data="always")
        proto = onnx.load(tmp_path / f"{number}.onnx", load_external_data=False)
        (found,) = [tensor for tensor in proto.graph.initializer if tensor.name == "large"]
        assert found.data_location == TensorProto.EXTERNAL
        assert found.doc_string == large.doc_string
        assert list(found.metadata_props) == list(large.metadata_props)


def changed(change: Callable[[onnx.GraphProto], object]) -> list[str]:
    """What is said of a model after a change of its graph."""
    model = defaults()
    change(model.graph)
    return differences(load(defaults()).model, load(model).model)


def test_differences_of_two_faces() -> None:
    assert changed(lambda graph: None) == []

    def renamed(graph: onnx.GraphProto) -> None:
        graph.output[1].name = graph.node[-1].output[0] = "w"

    assert changed(renamed) == ["output 'z' is gone", "output 'w' is new"]

    def sized(graph: onnx.GraphProto) -> None:
        graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4

    (text,) = changed(sized)
    assert text == f"input 'x' is FLOAT [4, {D}] in place of FLOAT [N, {D}]"

    def required(graph: onnx.GraphProto) -> None:
        del graph.initializer[0]

    assert changed(required) == ["input 'W' has no default value any more"]

    def constant(graph: onnx.GraphProto) -> None:
        del graph.input[1]

    assert changed(constant) == ["input 'W' is gone"]

    def other(graph: onnx.GraphProto) -> None:
        graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weight(9), "W"))

    assert changed(other) == ["input 'W' has another default value"]

    def turned(graph: onnx.GraphProto) -> None:
        last = graph.input.pop()
        graph.input.insert(0, last)

    assert changed(turned) == ["the inputs stand in another order"]

    old, new = defaults(), defaults()
    new.ir_version = 9
    new.opset_import[0].version = 10
    assert differences(load(old).model, load(new).model) == [
        "IR version 9 in place of 8",
        "opset import 'ai.onnx': 10 in place of 9",
    ]
