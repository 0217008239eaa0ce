"""onnxsim before the factoring: what it may do, and what is undone with a reason."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import onnx.shape_inference
import pytest

from onnx_lowrank import compress
from onnx_lowrank.compression.result import Result
from onnx_lowrank.graph import simplify
from onnx_lowrank.numerics.arrays import Array
from tests.helpers.models import (
    known_rank,
    linear_model,
    op_types,
    parse,
    uniform,
    unsigned,
)

SCOPES = "pkg.torch.onnx.name_scopes"


def weight(seed: int = 0, m: int = 64, n: int = 64) -> Array:
    return known_rank(m, n, 4, np.random.default_rng(seed), scale=2**-3)


def model_with_identity() -> onnx.ModelProto:
    model = parse(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[N, 64] x) => (float[N, 64] y) {
            same = Identity(x)
            h = MatMul(same, W)
            y = Relu(h)
        }""",
        {"W": weight()},
    )
    model.graph.node[1].name = "fc"
    return model


def run(source: onnx.ModelProto | Path, **options: object) -> Result:
    return compress(source, rank=4, bench=False, samples=1, **options)  # type: ignore[arg-type]


def undone(result: Result) -> str:
    """Why the model is not simplified."""
    (note,) = [note for note in result.report.notes if note.startswith("not simplified: ")]
    return note


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file to write a program into that stands in for onnxsim."""
    path = tmp_path / "worker.py"
    monkeypatch.setattr(simplify, "WORKER", path)
    return path


def test_it_simplifies() -> None:
    result = run(model_with_identity())
    assert op_types(result.model) == ["MatMul", "MatMul", "Relu"]
    assert not any("simplified" in note for note in result.report.notes)
    assert op_types(run(model_with_identity(), simplify=False).model)[0] == "Identity"


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("raise ValueError('cannot do that')", "ValueError: cannot do that"),
        ("import sys; sys.exit(3)", "exit code 3"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "crashed with signal 11"),
        ("pass", "unusable model"),
        ("import sys; open(sys.argv[2], 'wb').write(b'nonsense')", "unusable model"),
    ],
    ids=["raises", "exits", "crashes", "writes nothing", "writes nonsense"],
)
def test_a_failure_is_undone_with_the_reason(program: str, reason: str, worker: Path) -> None:
    worker.write_text(program)
    result = run(model_with_identity())
    assert reason in undone(result)
    assert op_types(result.model) == ["Identity", "MatMul", "MatMul", "Relu"]


def test_onnxsim_that_is_not_there(worker: Path) -> None:
    worker.write_text("import onnxsim_is_not_installed")
    assert "No module named 'onnxsim_is_not_installed'" in undone(run(model_with_identity()))


CHANGED = """
import sys, onnx, onnx.numpy_helper
model = onnx.load(sys.argv[1])
{change}
onnx.save(model, sys.argv[2])
"""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            "w = model.graph.initializer[0]\n"
            "array = onnx.numpy_helper.to_array(w) * 1.001\n"
            "w.CopyFrom(onnx.numpy_helper.from_array(array.astype('f'), 'W'))",
            "changed output 'y' by 1.0e-03",
        ),
        (
            "model.graph.output[0].name = model.graph.node[-1].output[0] = 'other'",
            "inputs or outputs",
        ),
        ("model.graph.node[1].op_type = 'NoSuch'", "onnx.checker rejects"),
        (
            "model.graph.initializer.append("
            "onnx.helper.make_tensor('big', 1, [100000], [0.0] * 100000))",
            "400000 bytes larger",
        ),
    ],
    ids=["values", "names", "validity", "size"],
)
def test_harm_is_undone_with_the_reason(change: str, reason: str, worker: Path) -> None:
    worker.write_text(CHANGED.format(change=change))
    result = run(model_with_identity())
    assert reason in undone(result)
    assert op_types(result.model) == ["Identity", "MatMul", "MatMul", "Relu"]


def test_outputs_near_zero_are_compared_by_what_they_can_hold(worker: Path) -> None:
    """A sigmoid far below 0 is exact to 1e-7 and no better: that is not another result."""
    model = model_with_identity()
    model.graph.node[2].op_type = "Sigmoid"
    model.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["c"], value_float=-14.0))
    model.graph.node.insert(3, onnx.helper.make_node("Clip", ["h", "", "c"], ["low"]))
    model.graph.node[4].input[0] = "low"
    change = "model.graph.node[0].attribute[0].f = -14.0001"
    worker.write_text(CHANGED.format(change=change))
    assert not any("simplified" in note for note in run(model).report.notes)


def test_growth_by_folding_is_undone() -> None:
    """onnxsim folds a constant Expand: 1 KB becomes 4 MB."""
    model = parse(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[1024, 64] x) => (float[1024, 64] y, float[1024, 1024] z) {
            shape = Constant<value = int64[2] {1024, 1024}>()
            z0 = Expand(one, shape)
            z = Mul(z0, two)
            y = MatMul(x, W)
        }""",
        {"W": weight(), "one": np.ones((1, 1), np.float32), "two": np.full(1, 2, np.float32)},
    )
    result = run(model)
    assert "bytes larger" in undone(result)
    assert "Expand" in op_types(result.model)
    assert result.report.output.bytes < result.report.input.bytes


def test_a_copy_of_a_small_weight_is_growth_too() -> None:
    """A table that the last product reads as well: onnxsim makes a second one of the Transpose."""
    model = parse(
        """<ir_version: 8, opset_import: ["": 17]>
        g (int64[N, 6] ids) => (float[N, 6, 150] y) {
            x = Gather(table, ids)
            t = Transpose<perm = [1, 0]>(table)
            y = MatMul(x, t)
        }""",
        {"table": uniform((150, 48), np.random.default_rng(4))},
    )
    assert "28800 bytes larger" in undone(run(model))


def test_weights_of_integers_are_not_made_floats() -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["" : 17]> g (float[1,8,9] x) => (float[1,32,9] y) {
            f = Cast <to=1> (q)
            w = Mul (f, s)
            y = Conv (x, w)
        }""",
        {
            "q": np.random.default_rng(0).integers(-99, 99, (32, 8, 1)).astype(np.int8),
            "s": np.full((32, 1, 1), 0.01, np.float32),
        },
    )
    assert "of which onnxsim would make floats" in undone(run(model))


def test_a_large_model_is_not_simplified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simplify, "SIZE_LIMIT", 1000)
    result = run(model_with_identity())
    (note,) = [note for note in result.report.notes if note.startswith("not simplified")]
    assert "above the limit" in note


def test_a_model_that_cannot_be_compared_is_not_simplified() -> None:
    model = model_with_identity()
    model.graph.node[0].domain, model.graph.node[0].op_type = "my.domain", "Odd"
    model.opset_import.append(onnx.helper.make_opsetid("my.domain", 1))
    assert "cannot be compared" in undone(run(model))


def test_without_the_check_it_says_that_nothing_was_compared() -> None:
    result = run(model_with_identity(), check=False)
    assert op_types(result.model) == ["MatMul", "MatMul", "Relu"]
    assert any("not compared" in note for note in result.report.notes)


def test_names_and_metadata_survive() -> None:
    model = model_with_identity()
    model.graph.doc_string = "about the graph"
    onnx.helper.set_model_props(model, {"author": "me"})
    fc = model.graph.node[1]
    fc.doc_string = "about the node"
    for holder in (fc, model.graph, model.graph.input[0]):
        entry = holder.metadata_props.add()
        entry.key, entry.value = SCOPES, "['', 'layer', 'layer.fc']"
    result = run(model, include=["layer.fc"])
    assert [layer.rank for layer in result.report.layers] == [4]
    kept = unsigned(result.model).metadata_props
    assert {entry.key: entry.value for entry in kept} == {"author": "me"}
    assert result.model.graph.doc_string == "about the graph"
    (node,) = [node for node in result.model.graph if node.name == "fc"]
    assert node.doc_string == "about the node"
    for holder in (node, result.model.graph, result.model.graph.inputs[0]):
        assert holder.metadata_props[SCOPES] == "['', 'layer', 'layer.fc']"


def test_a_matmul_with_a_bias_stays_itself() -> None:
    """onnxsim would make one Gemm of the two under the name of the Add."""
    model = linear_model(weight(), bias=uniform([64], np.random.default_rng(1)), rows=3)
    entry = model.graph.node[0].metadata_props.add()
    entry.key, entry.value = SCOPES, "['', 'layer']"
    result = run(model, include=["layer"])
    (layer,) = result.report.layers
    assert (layer.name, layer.op_type, layer.rank) == ("fc", "MatMul", 4)
    assert op_types(result.model) == ["MatMul", "MatMul", "Add"]


def test_three_dimensional_matmul_stays_a_matmul() -> None:
    """onnxsim would make Reshape, Gemm and Reshape of it."""
    model = parse(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[2, 5, 64] x) => (float[2, 5, 64] y) {
            h = MatMul(x, W)
            y = Add(h, b)
        }""",
        {"W": weight(), "b": uniform([64], np.random.default_rng(1))},
    )
    assert op_types(run(model).model) == ["MatMul", "MatMul", "Add"]


def test_custom_domains_and_functions_survive(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["": 17, "local": 1, "com.microsoft": 1]>
        g (float[N, 64] x) => (float[N, 64] y) {
            a = local.twice(x)
            b = com.microsoft.Gelu(a)
            y = MatMul(b, W)
        }
        <domain: "local", opset_import: ["": 17]>
        twice (v) => (w) { w = Add(v, v) }"""
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight(), "W"))
    result = run(model)
    assert [layer.rank for layer in result.report.layers] == [4]
    assert {"local", "com.microsoft"} <= set(result.model.opset_imports)
    assert "Gelu" in op_types(result.model)
    json.loads(result.report.to_json())


def test_values_are_declared_only_where_they_were(tmp_path: Path) -> None:
    plain = model_with_identity()
    assert not plain.graph.value_info
    declared = onnx.shape_inference.infer_shapes(plain)
    assert declared.graph.value_info
    found = []
    for name, model in (("plain", plain), ("declared", declared)):
        # At this gain nothing is factored: what is written is what onnxsim made.
        result = compress(model, rank=4, min_gain=0.99, bench=False, samples=1)
        result.save(tmp_path / f"{name}.onnx")
        found.append({v.name for v in onnx.load(tmp_path / f"{name}.onnx").graph.value_info})
    assert found[0] == set()
    assert "h" in found[1]
