"""Inspect: every linear map is listed, and nothing large goes unmentioned."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import pytest

import onnx_lowrank
from onnx_lowrank.cli.program import exit_code
from onnx_lowrank.compression.inspection import ENERGIES, Inspection
from onnx_lowrank.numerics.arrays import Array
from tests.helpers.models import (
    all_graph_protos,
    all_node_protos,
    known_rank,
    parse,
    uniform,
)
from tests.helpers.places import CACHE

RANK = 4


def rng() -> np.random.Generator:
    return np.random.default_rng(3)


def inspected(model: onnx.ModelProto | Path, tmp_path: Path) -> Inspection:
    if isinstance(model, Path):
        return onnx_lowrank.inspect(model)
    onnx.save(model, tmp_path / "model.onnx")
    return onnx_lowrank.inspect(tmp_path / "model.onnx")


def stored(model: onnx.ModelProto) -> Iterator[tuple[str, int]]:
    """Name and elements of every constant, read off the protobuf."""
    for graph in all_graph_protos(model):
        for tensor in graph.initializer:
            yield tensor.name, math.prod(tensor.dims)
    for node in all_node_protos(model):
        if node.op_type == "Constant" and node.attribute[0].HasField("t"):
            yield node.output[0], math.prod(node.attribute[0].t.dims)


def assert_all_mentioned(model: onnx.ModelProto, inspection: Inspection) -> None:
    tensors = list(stored(model))
    total = sum(size for _, size in tensors)
    assert inspection.parameters == total
    rows = {row.weight: row for row in (*inspection.entries, *inspection.others)}
    for name, size in tensors:
        if size and size >= 0.01 * total:
            assert name in rows, f"{name} has {size} of {total} parameters"
            assert rows[name].parameters == size
    for row in inspection.others:
        assert row.reason
        assert row.form == ""
    for row in inspection.entries:
        assert row.form
        assert row.ops
        assert row.ranks or row.reason
        if row.ranks:
            assert len(row.ranks) == len(ENERGIES)
            assert list(row.ranks) == sorted(row.ranks)
            assert row.break_even is not None


def one(text: str, weights: dict[str, Array], *, version: int = 8) -> onnx.ModelProto:
    return parse(
        f'<ir_version: {version}, opset_import: ["": 17, "com.microsoft": 1, "f": 1]>\n{text}',
        weights,
    )


def every_form() -> onnx.ModelProto:
    """One of each form, with weights of rank 4."""
    random = rng()
    return one(
        """g (float[4, 16] x, int64[4] i, float[5, 4, 16] s, float[1, 16, 5, 5] p)
        => (float y) {
            n1 = MatMul(x, M)            n2 = MatMul(L, x)
            n3 = Gemm <transB = 1> (x, G) n4 = Gemm(H, x)
            n5 = Einsum <equation = "bd,df->bf"> (x, E)
            n6 = Gather(T, i)
            n7 = Conv(p, C)              n8 = Conv <group = 16> (p, P)
            n9, a, b = LSTM <hidden_size = 3> (s, W, R)
            n10, c = GRU <hidden_size = 4> (s, U, Q)
            n11 = com.microsoft.FusedMatMul(x, F)
            n12 = com.microsoft.FusedGemm <activation = "Relu"> (x, K)
            n13 = com.microsoft.Attention <num_heads = 2> (s, A, z)
            y = Identity(n1)
        }""",
        {
            "M": known_rank(16, 12, RANK, random),
            "L": known_rank(12, 4, RANK, random),
            "G": known_rank(12, 16, RANK, random),
            "H": known_rank(12, 4, RANK, random),
            "E": known_rank(16, 12, RANK, random),
            "T": known_rank(40, 16, RANK, random),
            "C": known_rank(12, 144, RANK, random).reshape(12, 16, 3, 3),
            "P": uniform((16, 1, 3, 3), random),
            "W": known_rank(12, 16, RANK, random)[None],
            "R": uniform((1, 12, 3), random),
            "U": known_rank(12, 16, RANK, random)[None],
            "Q": uniform((1, 12, 4), random),
            "F": known_rank(16, 12, RANK, random),
            "K": known_rank(16, 12, RANK, random),
            "A": known_rank(16, 24, RANK, random),
            "z": uniform((24,), random),
        },
    )


def subgraphs() -> onnx.ModelProto:
    model = one(
        """g (bool c, float[3, 16] x) => (float[3, 16] y) {
            y = If (c) <
                then_branch = t () => (float[3, 16] a) { a = MatMul(x, W) },
                else_branch = e () => (float[3, 16] b) { b = MatMul(x, V)  u = Add(b, S) }
            >
        }""",
        {"W": uniform((16, 16), rng())},
    )
    branch = model.graph.node[0].attribute[1].g
    for name in "VS":
        array = uniform((16, 16), rng())
        branch.initializer.append(onnx.numpy_helper.from_array(array, name))
    return model


def functions() -> onnx.ModelProto:
    model = one(
        """g (float[3, 16] x) => (float[3, 16] y) { z = f.own(x)  y = f.given(z, W) }
        <domain: "f", opset_import: ["": 17]>
        own (a) => (b) { b = MatMul(a, V) }
        <domain: "f", opset_import: ["": 17]>
        given (a, w) => (b) { b = MatMul(a, w) }""",
        {"W": uniform((16, 16), rng())},
    )
    constant = onnx.numpy_helper.from_array(uniform((16, 16), rng()), "V")
    body = model.functions[0]
    nodes = [onnx.helper.make_node("Constant", [], ["V"], value=constant), *body.node]
    del body.node[:]
    body.node.extend(nodes)
    return model


def overridable() -> onnx.ModelProto:
    return one(
        "g (float[3, 16] x, float[16, 16] W) => (float[3, 16] y) { y = MatMul(x, W) }",
        {"W": uniform((16, 16), rng())},
    )


OTHERS: dict[str, tuple[str, dict[str, Array], str]] = {
    "a large bias": (
        "g (float[16, 16] x) => (float[16, 16] y) { y = Add(x, B) }",
        {"B": uniform((16, 16), rng())},
        "read by Add (input 1)",
    ),
    "a transposed convolution": (
        "g (float[1, 3, 4, 4] x) => (float y) { y = ConvTranspose(x, B) }",
        {"B": uniform((3, 6, 2, 2), rng())},
        "read by ConvTranspose (input 1)",
    ),
    "a custom operator": (
        "g (float[16, 16] x) => (float[16, 16] y) { y = f.MatMul(x, B) }",
        {"B": uniform((16, 16), rng())},
        "read by MatMul (input 1)",
    ),
    "a constant that is an output": (
        "g (float[16, 16] x) => (float[16, 16] y, float[16, 16] B) { y = Relu(x) }",
        {"B": uniform((16, 16), rng())},
        "the graph's outputs",
    ),
    "a constant that nothing reads": (
        "g (float[16, 16] x) => (float[16, 16] y) { y = Relu(x) }",
        {"B": uniform((16, 16), rng())},
        "read by nothing",
    ),
    "recurrent weights": (
        "g (float[5, 3, 16] x) => (float y) { y, h, c = LSTM <hidden_size = 8> (x, W, B) }",
        {"W": uniform((1, 32, 16), rng()), "B": uniform((1, 32, 8), rng())},
        "read by LSTM (input 2)",
    ),
    "a table that is read by column": (
        "g (int64[2] i) => (float[16, 2] y) { y = Gather <axis = 1> (B, i) }",
        {"B": uniform((16, 40), rng())},
        "read by Gather (input 0)",
    ),
    "a quantized table": (
        """g (int64[2] i) => (float[2, 16] y)
        { T = DequantizeLinear(B, s)  y = Gather(T, i) }""",
        {"B": np.ones((40, 16), np.int8), "s": np.array(0.5, np.float32)},
        "read by DequantizeLinear (input 0)",
    ),
}

MODELS: dict[str, Callable[[], onnx.ModelProto]] = {
    "every form": every_form,
    "subgraphs": subgraphs,
    "functions": functions,
    "overridable": overridable,
    **{name: lambda case=case: one(*case[:2]) for name, case in OTHERS.items()},  # type: ignore[misc]
}


@pytest.mark.parametrize("name", MODELS)
def test_nothing_large_goes_unmentioned(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    assert_all_mentioned(model, inspected(model, tmp_path))


@pytest.mark.parametrize(
    "name",
    [
        "magika",
        "mlp-sklearn",
        "vit",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "captcha",
                "cnn",
                "minilm-l3",
                "minilm-l3-static",
                "minilm-l6-dynamo",
                "mlp-torchscript",
                "ppocrv4-rec",
                "ppocrv5-rec",
            )
        ),
    ],
)
def test_nothing_large_goes_unmentioned_in_a_real_model(name: str, tmp_path: Path) -> None:
    path = CACHE / f"{name}.onnx"
    if not path.is_file():
        pytest.skip(f"{name} is not here: python models/get.py {name}")
    assert_all_mentioned(onnx.load(path), inspected(path, tmp_path))


def test_every_form_is_listed_with_its_shape_and_ranks(tmp_path: Path) -> None:
    rows = inspected(every_form(), tmp_path).entries
    found = {(row.name, row.form): row for row in rows}
    shapes = {
        ("n1", "matmul-right"): (1, 16, 12),
        ("n2", "matmul-left"): (1, 4, 12),
        ("n3", "gemm-right"): (1, 16, 12),
        ("n4", "gemm-left"): (1, 4, 12),
        ("n5", "einsum"): (1, 16, 12),
        ("n6", "gather"): (1, 40, 16),
        ("n7", "conv"): (1, 144, 12),
        ("n7", "conv-spatial"): (1, 48, 36),
        ("n8", "conv"): (16, 1, 3, 3),
        ("n9", "lstm"): (1, 16, 12),
        ("n10", "gru"): (1, 16, 12),
        ("n11", "fused-matmul-right"): (1, 16, 12),
        ("n12", "fused-gemm-right"): (1, 16, 12),
        ("n13", "attention"): (1, 16, 24),
    }
    assert {key: row.shape for key, row in found.items()} == shapes
    for (name, form), row in found.items():
        if name == "n8":
            assert (row.break_even, row.ranks) == (None, ())
            assert "depthwise convolution" in row.reason
            continue
        _, m, n = shapes[name, form]
        assert row.break_even == pytest.approx(m * n / (m + n))
        assert max(row.ranks) <= (RANK if form != "conv-spatial" else 36)
        hint = f"off by default; ops={row.ops!r}"
        off = row.ops in ("conv", "gather", "gru", "lstm")
        assert row.reason == (hint if off else "")


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_handled_says_who_reads_it(name: str, tmp_path: Path) -> None:
    others = {row.weight: row for row in inspected(one(*OTHERS[name][:2]), tmp_path).others}
    assert OTHERS[name][2] in others["B"].reason


def reasons(inspection: Inspection) -> dict[str, str]:
    return {row.weight: row.reason for row in inspection.entries}


def test_weights_that_cannot_be_used_say_why(tmp_path: Path) -> None:
    assert "constant_inputs=True" in reasons(inspected(overridable(), tmp_path))["W"]
    assert reasons(inspected(functions(), tmp_path))["W"] == ""  # its call is inlined
    holds_nan = one(
        "g (float[3, 16] x) => (float[3, 16] y) { y = MatMul(x, W) }",
        {"W": np.full((16, 16), np.nan, np.float32)},
    )
    assert reasons(inspected(holds_nan, tmp_path))["W"] == "holds NaN or Inf"
    shared = one(
        """g (int64[3] i) => (float[3, 16] y, float[16, 16] z)
        { e = Gather(W, i)  y = MatMul(e, W)  z = Relu(W) }""",
        {"W": uniform((16, 16), rng())},
    )
    entries = inspected(shared, tmp_path).entries
    assert [row.reason for row in entries] == [
        "off by default; ops='gather'; its constant is also read by z",
        "its constant is also read by z",
    ]


def test_a_weight_of_no_size(tmp_path: Path) -> None:
    model = one(
        "g (float[3, 16] x) => (float[3, 0] y) { y = MatMul(x, W) }",
        {"W": np.zeros((16, 0), np.float32)},
    )
    (row,) = inspected(model, tmp_path).entries
    assert row.parameters == 0
    assert row.ranks == ()


def command(path: Path, capfd: pytest.CaptureFixture[str]) -> str:
    assert exit_code(["inspect", str(path)]) == 0
    captured = capfd.readouterr()
    assert captured.err == ""
    return captured.out


def test_the_command_prints_it_all(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(every_form(), path)
    lines = command(path, capfd).splitlines()
    inspection = onnx_lowrank.inspect(path)
    assert lines[0] == f"{path}: {inspection.parameters:,} parameters"
    assert lines[1].strip() == "13 linear maps with a constant weight"
    assert lines[2].startswith("rank that holds so much of the energy of the weight")
    assert re.findall(r"at ([\d.]+)", lines[3]) == [f"{energy:g}" for energy in ENERGIES]
    for row in inspection.entries:
        (line,) = [line for line in lines if line.split()[:2] == [row.name, row.form]]
        assert row.shape is not None
        sizes = row.shape[1:] if len(row.shape) == 3 and row.shape[0] == 1 else row.shape
        assert "×".join(map(str, sizes)) in line
        assert f"{100 * row.parameters / inspection.parameters:.1f} %" in line
        assert re.sub(r"ops='(\w+)'", r"--ops \1", row.reason) in line
        for rank in row.ranks:
            assert row.break_even is not None
            assert f"{rank} ({rank / row.break_even:.2f})" in line
    for row in inspection.others:
        assert any(line.startswith(f"not handled: {row.weight} ") for line in lines)


def test_nodes_with_one_weight_are_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = one(
        """g (float[3, 16] x) => (float[3, 16] y)
        { a = MatMul(x, W)  b = MatMul(a, W)  c = MatMul(b, W)  y = MatMul(c, V) }""",
        {"W": uniform((16, 16), rng()), "V": uniform((16, 16), rng())},
    )
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    lines = command(path, capfd).splitlines()
    assert lines[4].startswith("a (+2 with the same weight)")
    assert lines[5].startswith("y ")
    assert len(lines) == 6


def test_a_model_without_linear_maps(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(one("g (float[3] x) => (float[3] y) { y = Relu(x) }", {}), path)
    assert command(path, capfd).strip() == f"{path}: 0 parameters"


def test_weights_in_a_file_of_their_own(tmp_path: Path) -> None:
    """Small square ones too: nothing holds a part of the file when it is closed."""
    model = parse(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[N, 32] x) => (float[N, 32] y) { h = MatMul(x, W) r = Relu(h) y = MatMul(r, V) }""",
        {name: uniform((32, 32), rng()) for name in "WV"},
    )
    options: dict[str, Any] = {
        "save_as_external_data": True,
        "location": "data",
        "size_threshold": 0,
    }
    onnx.save(model, tmp_path / "model.onnx", **options)
    found = onnx_lowrank.inspect(tmp_path / "model.onnx")
    assert [len(entry.ranks) for entry in found.entries] == [len(ENERGIES)] * 2
