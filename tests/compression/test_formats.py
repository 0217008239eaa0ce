"""Weights in 8 and 4 bits: what becomes of products, pairs and tables, judged by ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from onnx_lowrank import Result, compress
from tests.helpers.formats import BITS, HEAD, LOST, error, feeds, operators, two, weight
from tests.helpers.models import parse


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("goal", [{"energy": 1.0}, {"rank": 24}, {"rank": 8}])
def test_dense_layers_and_pairs(bits: str, goal: dict[str, Any], rng: np.random.Generator) -> None:
    model, samples = two(rng), feeds(rng)
    plain = compress(model, **goal, calibration=samples, bench=False)
    result = compress(model, **goal, weights=bits, calibration=samples, bench=False)
    assert error(result) < error(plain) + LOST[bits]
    onnx.checker.check_model(ir.to_proto(result.model), full_check=True)
    floats = 4 * (96 * 80 + 80 * 48)
    if "energy" in goal:
        assert operators(result).count("DequantizeLinear") == 2
        assert result.report.output.bytes < floats * {"8": 0.4, "4": 0.3}[bits]
    assert result.report.output.bytes < plain.report.output.bytes
    for layer in result.report.layers:
        assert layer.format is not None
        assert layer.format.startswith(f"{bits} bits")
        assert layer.rounding_error is not None
        assert 0.0 < layer.rounding_error < LOST[bits]
    assert [value.name for value in result.model.graph.outputs] == ["y"]


def test_samples_say_how_to_round(rng: np.random.Generator) -> None:
    model, samples = two(rng), feeds(rng, 64)
    fitted = compress(model, energy=1.0, weights="4", calibration=samples, bench=False)
    plain = compress(model, energy=1.0, weights="4", data=None, calibrate=False, bench=False)
    rounded = [layer.rounding_error for layer in plain.report.layers]
    assert all(error is not None and error > 0.05 for error in rounded)
    first = fitted.report.layers[0].rounding_error
    assert first is not None
    assert first < 0.5 * (rounded[0] or 0.0)


@pytest.mark.parametrize("bits", BITS)
def test_layers_that_share_their_first_factor(bits: str, rng: np.random.Generator) -> None:
    model = parse(
        f"""{HEAD} g (float[N,96] x) => (float[N,64] y, float[N,64] z) {{
            y = MatMul (x, W1)
            z = MatMul (x, W2)
        }}""",
        {"W1": weight(rng, 96, 64), "W2": weight(rng, 96, 64)},
    )
    samples = feeds(rng, 40)
    share = {"8": 0.14, "4": 0.08}[bits]  # of the bytes, as they are stored
    shared = compress(
        model, keep=share, weights=bits, calibration=samples, bench=False, simplify=False
    )
    assert any("shares" in layer.reason for layer in shared.report.layers)
    assert shared.report.check is not None
    plain = compress(model, keep=0.5, calibration=samples, bench=False, simplify=False)
    for own, other in zip(
        shared.report.check.providers[0].outputs,
        plain.report.check.providers[0].outputs if plain.report.check else (),
        strict=True,
    ):
        assert own.relative_l2 < other.relative_l2 + LOST[bits]


@pytest.mark.parametrize("bits", BITS)
def test_a_weight_behind_transpose_that_several_nodes_read(
    bits: str, rng: np.random.Generator
) -> None:
    model = parse(
        f"""{HEAD} g (float[N,64] x) => (float[N,64] y) {{
            T = Transpose <perm=[1, 0]> (W)
            h = MatMul (x, T)
            a = Tanh (h)
            y = MatMul (a, T)
        }}""",
        {"W": weight(rng, 64, 64)},
    )
    result = compress(model, energy=1.0, weights=bits, bench=False, simplify=False)
    assert "W" not in result.model.graph.initializers
    kinds = operators(result)  # a runtime makes floats of it once
    assert (kinds.count("DequantizeLinear"), kinds.count("Mul")) == (0, 1)
    assert error(result) < 2 * LOST[bits]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("width", [128, 40])
def test_tables(bits: str, width: int, rng: np.random.Generator) -> None:
    model = parse(
        f"""{HEAD} g (int64[B,T] i, int64 j) => (float[B,T,{width}] y, float[{width}] z) {{
            y = Gather (E, i)
            z = Gather (E, j)
        }}""",
        {"E": rng.standard_normal((50, width)).astype(np.float32)},
    )
    i = rng.integers(-50, 50, (3, 4))
    data = [{"i": i, "j": np.array(number)} for number in (0, 49, -1)]
    result = compress(model, energy=1.0, weights=bits, calibration=data, bench=False)
    assert result.report.check is not None
    for output in result.report.check.providers[0].outputs:
        assert output.relative_l2 < LOST[bits if width == 128 else "8"]
    assert "E" not in result.model.graph.initializers
    assert result.report.output.bytes < result.report.input.bytes
    session = ort.InferenceSession(ir.to_proto(result.model).SerializeToString())
    for shape in ((2, 0), (0, 3), (0, 0)):  # no indices are rows, none of them
        feed = {"i": np.zeros(shape, np.int64), "j": np.array(0)}
        assert session.run(["y"], feed)[0].shape == (*shape, width)
    kind = bits if width == 128 else "8"
    assert any(note.startswith(f"tables in {kind} bits") for note in result.report.notes)
    assert {str(layer.format)[:6] for layer in result.report.layers} == {f"{kind} bits"}


@pytest.mark.parametrize("ops", [(), ("default",), ("default", "gather")])
def test_a_tied_table_is_stored_once(
    rng: np.random.Generator, tmp_path: Path, ops: tuple[str, ...]
) -> None:
    """The table of a small decoder, which its head reads too."""
    model = parse(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (int64[B,T] i) => (float[B,T,200] y) {
            h = Gather (E, i)
            m = MatMul (h, W)
            r = Relu (m)
            a = Add (r, h)
            t = Transpose <perm = [1, 0]> (E)
            y = MatMul (a, t)
        }""",
        {
            "E": rng.standard_normal((200, 96)).astype(np.float32) / 10,
            "W": rng.standard_normal((96, 96)).astype(np.float32) / 10,
        },
    )
    data = [{"i": rng.integers(0, 200, (2, 9))} for _ in range(12)]
    options: dict[str, Any] = {"calibration": data, "bench": False, "ops": ops}
    recipe, limit = tmp_path / "recipe.json", 35_000
    result = compress(model, max_size=limit, weights="8,4", save_recipe=recipe, **options)
    assert result.report.output.bytes <= limit  # the floats alone take 113,664 bytes
    assert "E" not in result.model.graph.initializers
    assert {layer.format[:6] for layer in result.report.layers if layer.format} <= {
        *("4 bits", "6 bits", "8 bits")
    }
    rows = {layer.form: layer for layer in result.report.layers if layer.weight == "E"}
    assert len({(row.format, row.bytes_before, row.bytes_after) for row in rows.values()}) == 1
    assert rows["gather"].bytes_after == result_bytes(result, "E.")
    again = compress(model, recipe=recipe, bench=False, calibration=data)
    assert result_bytes(again, "E.") == result_bytes(result, "E.")
    exact = compress(model, energy=1.0, weights="8", **options)
    assert exact.report.check is not None
    assert exact.report.check.providers[0].outputs[0].relative_l2 < 0.02


def result_bytes(result: Result, start: str) -> int:
    """Of codes and scales whose names begin in one way."""
    values = result.model.graph.initializers.items()
    own = [v.const_value for name, v in values if name in (f"{start}codes", f"{start}scales")]
    return sum(tensor.nbytes for tensor in own if tensor is not None)


def test_a_size_counts_the_format(rng: np.random.Generator) -> None:
    """As floats the model has to lose most of its ranks, in 4 bits none."""
    model, samples = two(rng), feeds(rng)
    limit = 9_000
    result = compress(model, max_size=limit, weights="4", calibration=samples, bench=False)
    assert result.report.output.bytes <= limit
    assert error(result) < LOST["4"]
    plan = compress(
        model, max_size=limit, weights="4", calibration=samples, bench=False, dry_run=True
    )
    assert abs(plan.report.output.bytes - result.report.output.bytes) < 4_000


def test_refit_and_healing_come_before(rng: np.random.Generator) -> None:
    model, samples = two(rng), feeds(rng, 48)
    result = compress(
        model, rank=16, weights="8", refit=True, heal=6, calibration=samples, bench=False
    )
    assert result.report.healing is not None
    assert all(layer.format for layer in result.report.layers)
    plain = compress(model, rank=16, refit=True, heal=6, calibration=samples, bench=False)
    assert error(result) < error(plain) + LOST["8"]


def test_scales_are_healed(rng: np.random.Generator) -> None:
    """Of what the first layer gives a few directions matter, which its own rounding ignores."""
    model = parse(
        f"""{HEAD} g (float[N,96] x) => (float[N,16] y) {{
            h = MatMul (x, W1)
            y = Gemm (h, W2, b)
        }}""",
        {"W1": weight(rng, 96, 80), "W2": weight(rng, 80, 16), "b": np.ones(16, np.float32)},
    )
    samples = feeds(rng, 200)
    result = compress(
        model, energy=1.0, weights="4", calibration=samples, heal=100, bench=False, simplify=False
    )
    healing = result.report.healing
    assert healing is not None
    assert healing.trained == 3
    assert healing.error_after < 0.98 * healing.error_before
    onnx.checker.check_model(ir.to_proto(result.model), full_check=True)
    stored = result.model.graph.initializers
    kinds = {
        name.rpartition(".")[2]: tensor.const_value.dtype.name
        for name, tensor in stored.items()
        if tensor.const_value is not None
    }
    assert kinds == {"b": "FLOAT", "codes": "UINT4", "scales": "FLOAT16", "zeros": "UINT4"}


def test_scales_of_convolutions_are_healed(rng: np.random.Generator) -> None:
    """Through what a runtime makes floats of: blocks of which the last is not full."""
    model = parse(
        f"""{HEAD} g (float[N,8,6,6] x) => (float[N,40,2,2] y) {{
            h = Conv (x, W1)
            y = Conv (h, W2, b)
        }}""",
        {
            "W1": weight(rng, 48, 72).reshape(48, 8, 3, 3),
            "W2": weight(rng, 40, 432).reshape(40, 48, 3, 3),
            "b": np.ones(40, np.float32),
        },
    )
    samples = [{"x": rng.standard_normal((2, 8, 6, 6)).astype(np.float32)} for _ in range(60)]
    result = compress(
        model,
        energy=1.0,
        weights="4",
        ops=["conv"],
        calibration=samples,
        heal=20,
        bench=False,
        simplify=False,
    )
    healing = result.report.healing
    assert healing is not None
    assert healing.trained == 3
    assert healing.error_after < healing.error_before
    assert "Sub" in operators(result)
    onnx.checker.check_model(ir.to_proto(result.model), full_check=True)
