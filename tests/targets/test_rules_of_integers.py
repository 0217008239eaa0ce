"""Rules of integers: scales of blocks, and products between Q and DQ."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import onnx_ir as ir
import pytest

from onnx_lowrank.graph.fixed import infer_shapes
from onnx_lowrank.graph.wishes import WISHES
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.targets import open_target
from onnx_lowrank.targets.base import Job
from onnx_lowrank.targets.rules import Graph
from onnx_lowrank.targets.support import support_of
from tests.helpers.models import parse, uniform
from tests.helpers.rules import ML, NN, RULES, only
from tests.helpers.targets import require, save


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
