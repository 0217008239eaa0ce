"""Two models compared field by field, but for the nodes that were factored."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx
import onnx.defs
import onnx.helper
import onnx.numpy_helper

from tests.helpers.models import (
    all_node_protos,
    as_proto,
    factored,
    known_rank,
    parse,
    uniform,
    unsigned,
)

__all__ = [
    "MARK",
    "RANK",
    "D",
    "Message",
    "assert_nodes",
    "assert_untouched",
    "by_name",
    "copied",
    "outcome",
    "plain",
    "rich",
    "without",
]

D, RANK = 16, 4
MARK = "lowrank"

Message = TypeVar("Message")


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
