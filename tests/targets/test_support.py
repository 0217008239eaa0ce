"""Static support: every rule, partitions, and whether the rules are true where one can ask."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnx_ir as ir
import pytest

from onnx_lowrank.graph.fixed import fix_shapes, infer_shapes
from onnx_lowrank.graph.wishes import WISHES
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.targets import open_target
from onnx_lowrank.targets.base import Job
from onnx_lowrank.targets.rules import Graph, all_rules
from onnx_lowrank.targets.rules.partitions import partitions
from onnx_lowrank.targets.support import support_of
from tests.helpers.commands import call
from tests.helpers.models import (
    parse,
    run_ort,
    uniform,
)
from tests.helpers.targets import require, save, two_layers

RULES = {rules.name: rules for rules in all_rules()}
NN, ML = "coreml (NeuralNetwork)", "coreml (MLProgram)"
ALL = (NN, ML, "nnapi", "openvino", "qnn", "webgpu", "xnnpack")


def only(text: str, weights: dict[str, Array], node: int = -1) -> dict[str, str | None]:
    """Provider -> why it refuses a node of a model."""
    model = ir.from_proto(
        parse(f'<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]> {text}', weights)
    )
    infer_shapes(model)
    graph = Graph(model)
    return {name: rules.refusal(graph, graph.nodes[node]) for name, rules in RULES.items()}


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


# Numbers


@pytest.mark.parametrize("op", ["DequantizeLinear", "QuantizeLinear"])
def test_scales_of_blocks(op: str) -> None:
    """The rules and what ``--for`` offers know the same of it."""
    kind, to = ("int8", "float") if op == "DequantizeLinear" else ("float", "int8")
    text = (
        f"g ({kind}[8, 6] x) => ({to}[8, 6] y) {{ y = {op} <axis = 0, block_size = 4> (x, s, z) }}"
    )
    zero = {"z": np.zeros((2, 6), np.int8)}
    reasons = only(text, {"s": np.ones((2, 6), np.float32), **zero})
    why = "a scale for a tensor or a channel only, not for blocks of 4"
    known = {name for name, reason in reasons.items() if reason == why}
    assert {"nnapi", "qnn"} <= known
    whole = text.replace("block_size = 4", "block_size = 0")
    assert all(r != why for r in only(whole, {"s": np.ones((), np.float32)} | zero).values())
    for name, wishes in WISHES.items():
        for rules in RULES.values():
            if rules.name.partition(" ")[0] == name:
                assert rules.blocks == wishes.blocks


@pytest.mark.qnn
def test_qnn_leaves_scales_of_blocks(tmp_path: Path, rng: np.random.Generator) -> None:
    """As the rules say; the product behind them it takes."""
    require("qnn")
    head = '<ir_version: 10, opset_import: ["": 21]> g (float[4, 64] x) => (float[4, 32] y)'
    codes = rng.integers(0, 200, (64, 32)).astype(np.uint8)
    blocks = parse(
        f"""{head} {{
            w = DequantizeLinear <axis = 0, block_size = 32> (q, s)
            y = MatMul (x, w)
        }}""",
        {"q": codes, "s": np.full((2, 32), 0.01, np.float32)},
    )
    path, feed = save(blocks, tmp_path / "m.onnx"), {"x": uniform((4, 64), rng)}
    (outcome,) = open_target("qnn").run([path], [feed], Job(), lambda _: None)
    assert outcome.nodes is not None
    (on_cpu,) = outcome.nodes["CPUExecutionProvider"]
    assert "DequantizeLinear" in on_cpu
    (said,) = (s for s in support_of(path, None, {}, {}).providers if s.provider == "qnn")
    assert [node.op_type for node in said.model.left] == ["DequantizeLinear"]


_QDQ = """
    xq = QuantizeLinear (r, xs, xz)
    xd = DequantizeLinear (xq, xs, xz)
"""
_BACK = """
    mq = QuantizeLinear (m, ms, mz)
    md = DequantizeLinear (mq, ms, mz)
    y = Relu (md)
"""
_DYNAMIC = """
    xq, xs, xz = DynamicQuantizeLinear (r)
    i = MatMulInteger (xq, q, xz)
    f = Cast <to = 1> (i)
    t = Mul (xs, s)
    y = Mul (f, t)
"""
# What stands between Relu(x) and y -> what QNN and NNAPI leave to the CPU, by operator.
BODIES: dict[str, tuple[str, list[str], list[str]]] = {
    "weights by channels, floats": (
        "w = DequantizeLinear <axis = 1> (q, s)  y = MatMul (r, w)",
        ["DequantizeLinear"],
        ["DequantizeLinear", "MatMul"],
    ),
    "weights with one scale, floats": (
        "w = DequantizeLinear (q, one)  y = MatMul (r, w)",
        [],
        ["DequantizeLinear", "MatMul"],
    ),
    "integers, weights by channels": (
        f"{_QDQ} w = DequantizeLinear <axis = 1> (q, s)  m = MatMul (xd, w) {_BACK}",
        [],
        ["MatMul"],
    ),
    "integers, weights with one scale": (
        f"{_QDQ} w = DequantizeLinear (q, one)  m = MatMul (xd, w) {_BACK}",
        [],
        [],
    ),
    "integers, with a bias": (
        f"{_QDQ} w = DequantizeLinear (q, one)  m = Gemm (xd, w, b) {_BACK}",
        [],
        [],
    ),
    "integers times floats": (
        f"{_QDQ} w = DequantizeLinear <axis = 1> (q, s)  y = MatMul (xd, w)",
        ["DequantizeLinear"],
        ["DequantizeLinear", "MatMul"],
    ),
    "in each run": (_DYNAMIC, [], ["DynamicQuantizeLinear", "MatMulInteger"]),
    "in each run, for two": (
        f"""{_DYNAMIC.replace("y =", "h =")}
        i2 = MatMulInteger (xq, q2, xz)  f2 = Cast <to = 1> (i2)  g = Mul (f2, t)  y = Add (h, g)
        """,
        ["DynamicQuantizeLinear", "MatMulInteger", "MatMulInteger"],
        ["DynamicQuantizeLinear", "MatMulInteger", "MatMulInteger"],
    ),
    "the model's own input and output": (
        """
        xq = QuantizeLinear (x, xs, xz)
        xd = DequantizeLinear (xq, xs, xz)
        w = DequantizeLinear (q, one)
        m = MatMul (xd, w)
        mq = QuantizeLinear (m, ms, mz)
        y = DequantizeLinear (mq, ms, mz)
        """,
        ["DequantizeLinear", "QuantizeLinear"],
        [],
    ),
}


def integers(body: str) -> onnx.ModelProto:
    """``Relu(x)``, a body, and the constants that it reads."""
    rng = np.random.default_rng(3)
    known: dict[str, Array] = {
        "q": rng.integers(-99, 99, (64, 32)).astype(np.int8),
        "q2": rng.integers(-99, 99, (64, 32)).astype(np.int8),
        "s": np.full(32, 0.01, np.float32),
        "one": np.array(0.01, np.float32),
        "b": uniform((32,), rng),
        "xs": np.array(0.01, np.float32),
        "ms": np.array(0.1, np.float32),
        "xz": np.array(0, np.uint8),
        "mz": np.array(128, np.uint8),
    }
    read = {name: array for name, array in known.items() if re.search(rf"\b{name}\b", body)}
    # What the body computes itself is no constant.
    computed = {
        name.strip() for line in re.findall(r"([\w, ]+) = ", body) for name in line.split(",")
    }
    head = '<ir_version: 8, opset_import: ["": 17]> g (float[4, 64] x) => (float[4, 32] y)'
    relu = "" if "(x," in body else "r = Relu (x)"
    return parse(
        f"{head} {{ {relu} {body} }}", {n: a for n, a in read.items() if n not in computed}
    )


@pytest.mark.parametrize("name", BODIES)
def test_products_of_integers(name: str) -> None:
    """What is left to the CPU where weights, inputs and results are integers, or only some."""
    body, qnn, nnapi = BODIES[name]
    model = ir.from_proto(integers(body))
    infer_shapes(model)
    graph = Graph(model)

    def left(provider: str) -> list[str]:
        rules = RULES[provider]
        return sorted(n.op_type for n in graph.nodes if rules.refusal(graph, n) is not None)

    assert left("qnn") == qnn
    assert left("nnapi") == nnapi
    for provider in ("xnnpack", NN, ML):
        assert {"MatMul", "Gemm", "MatMulInteger"} & set(left(provider))


def test_nnapi_wants_unsigned_integers() -> None:
    body = BODIES["integers, weights with one scale"][0]
    proto = integers(body)
    for tensor in proto.graph.initializer:
        if tensor.name in ("xz", "mz"):
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.array(0, np.int8), tensor.name))
    model = ir.from_proto(proto)
    infer_shapes(model)
    graph = Graph(model)
    nnapi = RULES["nnapi"]
    reasons = {node.op_type: nnapi.refusal(graph, node) for node in graph.nodes}
    assert reasons["MatMul"] == "what is multiplied, and the result, must be uint8"
    assert str(reasons["QuantizeLinear"]).startswith("uint8 only")


@pytest.mark.qnn
@pytest.mark.parametrize("name", BODIES)
def test_rules_of_qnn_tell_the_truth_about_integers(name: str, tmp_path: Path) -> None:
    """What the rules leave to the CPU is what the emulator's session leaves there."""
    require("qnn")
    body, expected, _ = BODIES[name]
    path = save(integers(body), tmp_path / "m.onnx")
    feed = {"x": np.ones((4, 64), np.float32)}
    (outcome,) = open_target("qnn").run([path], [feed], Job(), lambda _: None)
    assert outcome.error is None
    assert outcome.nodes is not None
    on_cpu = outcome.nodes.get("CPUExecutionProvider", ())
    assert sorted(re.findall(r"\w+", node)[-1] for node in on_cpu) == expected


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
