"""Static support: every rule, partitions, and whether the rules are true where one can ask."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnx_ir as ir
import pytest

from onnx_lowrank.graph.fixed import fix_shapes, infer_shapes
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.targets import open_target
from onnx_lowrank.targets.base import Job
from onnx_lowrank.targets.rules import Graph
from onnx_lowrank.targets.rules.partitions import partitions
from onnx_lowrank.targets.support import support_of
from tests.helpers.commands import call
from tests.helpers.models import parse, run_ort, uniform
from tests.helpers.rules import ML, NN, RULES, only
from tests.helpers.targets import require, save, two_layers

ALL = (NN, ML, "nnapi", "openvino", "qnn", "webgpu", "xnnpack")


def refused(reasons: dict[str, str | None]) -> dict[str, str]:
    return {name: why for name, why in reasons.items() if why is not None}


W = np.ones((8, 6), np.float32)
C = np.ones(6, np.float32)


def gemm(attributes: str = "", c: Array | None = C, w: Array = W, x: str = "4, 8") -> Any:
    weights = {"W": w} if c is None else {"W": w, "C": c}
    inputs = "x, W" if c is None else "x, W, C"
    text = f"g (float[{x}] x) => (float[4, 6] y) {{ y = Gemm{attributes}({inputs}) }}"
    return refused(only(text, weights))


def test_every_provider_has_rules() -> None:
    assert set(RULES) == set(ALL)


def test_plain_products_are_taken_by_all() -> None:
    assert gemm() == {}
    assert gemm("<transB = 1>", w=W.T.copy()) == {}
    matmul = "g (float[4, 8] x) => (float[4, 6] y) { y = MatMul(x, W) }"
    assert refused(only(matmul, {"W": W})) == {}


def test_gemm_with_scales() -> None:
    scaled = gemm("<alpha = 2.0>")
    assert set(scaled) == {NN, ML, "nnapi", "qnn", "xnnpack"}
    assert set(scaled.values()) == {"alpha and beta must be 1, they are 2 and 1"}
    assert set(gemm("<beta = 0.5>")) == {NN, ML, "nnapi", "qnn", "xnnpack"}


def test_gemm_with_trans_a() -> None:
    found = gemm("<transA = 1>", x="8, 4")
    assert found == dict.fromkeys((NN, ML, "nnapi", "xnnpack"), "transA must be 0")


def test_gemm_without_bias_crashes_xnnpack() -> None:
    assert gemm(c=None) == {
        "xnnpack": "a Gemm without C, which crashes ONNX Runtime's XNNPACK provider"
    }


def test_gemm_with_a_bias_that_is_no_vector() -> None:
    assert gemm(c=np.ones((4, 6), np.float32)) == {
        "nnapi": "C must be a vector of N",
        "qnn": "C must be [N] or [1, N]",
        "xnnpack": "C must be a vector of N",
    }
    assert set(gemm(c=np.ones((1, 6), np.float32))) == {"nnapi", "xnnpack"}
    assert set(gemm(c=np.ones(1, np.float32))) == {"nnapi", "qnn", "xnnpack"}


def test_products_of_more_axes() -> None:
    text = "g (float[2, 4, 8] x) => (float[2, 4, 6] y) { y = MatMul(x, W) }"
    assert refused(only(text, {"W": W})) == {
        NN: "2-D only, A has 3 axes",
        "nnapi": "2-D only, A has 3 axes",
    }
    text = "g (float[3, 2, 4, 8] x) => (float[3, 2, 4, 6] y) { y = MatMul(x, W) }"
    assert refused(only(text, {"W": W}))["xnnpack"] == "A of 4 axes with B of 2"
    text = "g (float[1,1,1,1,4,8] x) => (float[1,1,1,1,4,6] y) { y = MatMul(x, W) }"
    six = refused(only(text, {"W": W}))
    assert six[ML] == six["qnn"] == "at most 5 axes, one value has 6"


def test_weights_that_are_computed_or_on_the_left() -> None:
    text = "g (float[4, 8] x, float[8, 6] w) => (float[4, 6] y) { y = MatMul(x, w) }"
    found = refused(only(text, {}))
    assert found == dict.fromkeys((NN, ML, "nnapi", "xnnpack"), "B must be constant")
    text = "g (float[6, 4] x) => (float[8, 4] y) { y = MatMul(W, x) }"
    assert set(refused(only(text, {"W": W}))) == {NN, ML, "nnapi", "xnnpack"}
    # An initializer that is an input too may be overridden: it is no constant.
    text = "g (float[4, 8] x, float[8, 6] W) => (float[4, 6] y) { y = MatMul(x, W) }"
    assert set(refused(only(text, {"W": W}))) == {NN, ML, "nnapi", "xnnpack"}


def test_dynamic_sizes() -> None:
    text = "g (float[N, 8] x) => (float[N, 6] y) { y = MatMul(x, W) }"
    found = refused(only(text, {"W": W}))
    assert found == dict.fromkeys(
        ("nnapi", "qnn"), "static shapes only, x has a size that is not known"
    )


def test_other_types() -> None:
    text = "g (double[4, 8] x) => (double[4, 6] y) { y = MatMul(x, W) }"
    found = refused(only(text, {"W": W.astype(np.float64)}))
    assert found["xnnpack"] == found["webgpu"] == "float32 and float16 only, A is double"


@pytest.mark.parametrize(
    ("axes", "takers"),
    [((8,), set(ALL) - {"nnapi"}), ((8, 8), set(ALL)), ((4, 4, 4), {"openvino", "qnn", "webgpu"})],
)
def test_convolutions(axes: tuple[int, ...], takers: set[str]) -> None:
    sizes = ", ".join(map(str, axes))
    text = f"g (float[1, 3, {sizes}] x) => (float[1, 5, {sizes}] y) {{ y = Conv(x, K) }}"
    kernel = np.ones((5, 3, *[1] * len(axes)), np.float32)
    assert set(ALL) - set(refused(only(text, {"K": kernel}))) == takers


def test_operators_by_name() -> None:
    text = "g (float[4] x) => (float[4] y) { y = Erf(x) }"
    found = refused(only(text, {}))
    assert set(found) == {NN, "nnapi", "qnn", "xnnpack"}
    assert found["nnapi"] == "Erf is not among its operators"
    text = "g (float[4] x) => (float[4] y) { y = com.microsoft.Nothing(x) }"
    assert refused(only(text, {}))["qnn"] == "com.microsoft:Nothing is not among its operators"
    text = "g (float[4, 3] x) => (float[4] y) { y = ReduceMean<axes = [1], keepdims = 0>(x) }"
    assert ML not in refused(only(text, {}))
    text = "g (float[4, 3] x) => (int64[4] y) { y = ArgMax<axis = 1, keepdims = 0>(x) }"
    assert ML not in refused(only(text, {}))  # the list that comes with it says Argmax


def test_partitions() -> None:
    model = ir.from_onnx_text(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[2] x) => (float[2] y) {
            a = Relu(x)
            b = Erf(a)
            c = Relu(b)
            d = Neg(a)
            e = Add(c, d)
            y = Erf(e)
        }"""
    )
    nodes = list(model.graph)
    named = {node.outputs[0].name: node for node in nodes}

    def groups(*taken: str) -> list[list[str | None]]:
        found = partitions(nodes, {named[name] for name in taken})
        return [[node.outputs[0].name for node in group] for group in found]

    assert groups("a", "c", "d", "e") == [["a", "d"], ["c", "e"]]
    assert groups("a", "b", "c", "d", "e", "y") == [["a", "b", "d", "c", "e", "y"]]
    assert groups() == []
    assert groups("b", "d") == [["b", "d"]]


def test_partitions_are_those_of_the_checker_that_onnxruntime_brings() -> None:
    checker = pytest.importorskip("onnxruntime.tools.mobile_helpers.usability_checker")
    rng = np.random.default_rng(3)
    kinds = ("Relu", "Erf", "Neg", "Softmax", "Cos")
    for _ in range(40):
        names, lines = ["x"], []
        for number in range(14):
            name = f"v{number}"
            if rng.random() < 0.4:
                lines.append(f"{name} = Add({rng.choice(names)}, {rng.choice(names)})")
            else:
                lines.append(f"{name} = {rng.choice(kinds)}({rng.choice(names)})")
            names.append(name)
        body = "\n".join([*lines, f"y = Relu({names[-1]})"])
        proto = parse(
            f'<ir_version: 8, opset_import: ["": 17]> g (float[2] x) => (float[2] y) {{ {body} }}'
        )
        for index, node in enumerate(proto.graph.node):
            node.name = str(index)
        theirs = checker.check_nnapi_partitions(onnx.shape_inference.infer_shapes(proto), True)
        model = ir.from_proto(proto)
        infer_shapes(model)
        graph = Graph(model)
        taken = {n for n in graph.nodes if RULES["nnapi"].refusal(graph, n) is None}
        found = partitions(graph.nodes, taken)
        # Within a group theirs come in the order of a set.
        assert [{n.name for n in group} for group in found] == [
            {n.name for n in group} for group in theirs.supported_groups
        ]


@pytest.mark.qnn
@pytest.mark.parametrize("kind", ["float", "float16"])
@pytest.mark.parametrize(("rows", "axes"), [(4, ""), (3, "2, "), ("N", "")])
def test_rules_of_qnn_tell_the_truth(kind: str, rows: Any, axes: str, tmp_path: Path) -> None:
    """What the rules say is what the emulator's session takes (sums are fused there)."""
    require("qnn")
    path = save(two_layers(rows, kind=kind, axes=axes), tmp_path / "m.onnx")
    (support,) = (s for s in support_of(path, None, {}, {}).providers if s.provider == "qnn")
    shape = [2 if axes else None, 4 if rows == "N" else rows, 32]
    feed = {"x": np.ones([d for d in shape if d], {"float": "f4", "float16": "f2"}[kind])}
    (outcome,) = open_target("qnn").run([path], [feed], Job(), lambda _: None)
    assert outcome.nodes is not None
    everything = list(outcome.nodes) == ["QNNExecutionProvider"]
    assert everything == (support.model.taken == support.model.nodes)
    assert everything == (rows != "N")


# fix_shapes


def test_fix_shapes_folds_what_depends_on_sizes() -> None:
    rng = np.random.default_rng(1)
    proto = parse(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[batch, seq, 8] x) => (float[batch, m, 4] y) {
            s = Shape(x)
            b = Gather<axis = 0>(s, zero)
            b1 = Unsqueeze(b, axis)
            t = Concat<axis = 0>(b1, tail)
            r = Reshape(x, t)
            y = MatMul(r, W)
        }""",
        {
            "zero": np.array(0, np.int64),
            "axis": np.array([0], np.int64),
            "tail": np.array([-1, 16], np.int64),
            "W": uniform((16, 4), rng),
        },
    )
    model = ir.from_proto(proto)
    fix_shapes(model, {"x": (3, 6, 8)})
    assert [node.op_type for node in model.graph] == ["Reshape", "MatMul"]
    assert list(model.graph.outputs[0].shape or ()) == [3, 3, 4]
    fixed = ir.to_proto(model)
    onnx.checker.check_model(fixed, full_check=True)
    feeds = {"x": uniform((3, 6, 8), rng)}
    assert np.array_equal(run_ort(fixed, feeds)["y"], run_ort(proto, feeds)["y"])


# The verb


def test_support_before_and_after(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = save(two_layers("N"), tmp_path / "before.onnx")
    after = tmp_path / "after.onnx"
    args = ("--for", "nnapi", "--rank", 8, "--no-simplify", "--no-bench", "--dim", "N=4")
    assert call(before, after, *args) == 0
    report_path = tmp_path / "r.json"
    capsys.readouterr()
    assert call("support", after, "--before", before, "--report", report_path) == 0
    report = json.loads(report_path.read_text())
    found = {entry["provider"]: entry for entry in report["providers"]}
    assert set(found) == set(ALL)
    nnapi = found["nnapi"]
    assert (nnapi["before"]["taken"], nnapi["before"]["partitions"]) == (0, 0)
    assert (nnapi["model"]["taken"], nnapi["model"]["nodes"]) == (5, 5)
    assert nnapi["model"]["partitions"] == 1
    assert {left["rule"] for left in nnapi["before"]["left"]} == {
        "static shapes only, x has a size that is not known",
        "static shapes only, product has a size that is not known",
        "static shapes only, sum has a size that is not known",
        "static shapes only, act has a size that is not known",
    }
    printed = capsys.readouterr().out
    assert "0 of 4 → 5 of 5" in printed
    assert "xnnpack leaves 1 node to the CPU:" in printed
    assert "relu (Relu): Relu is not among its operators" in printed
    assert call("support", before, "--dim", "N=4", "--nodes") == 0
    assert "leaves" in capsys.readouterr().out


def test_support_of_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(two_layers("N"), tmp_path / "m.onnx")
    assert call("support", tmp_path / "none.onnx") == 1
    assert call("support", path, "--input-shape", "z:1,2") == 1
    assert f"--input-shape z: {path} has no such input" in capsys.readouterr().err
    assert call("support", path, "--dim", "M=4") == 1
    assert "--dim M=4: no input has a dimension 'M'" in capsys.readouterr().err
