"""Weights in 8 and 4 bits: convolutions, what stays floats and why, and opsets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_lowrank import Result, compress
from onnx_lowrank.cli.program import exit_code
from onnx_lowrank.errors import InputError, UsageError
from onnx_lowrank.numerics.arrays import Array, Feed
from tests.helpers.formats import BITS, HEAD, LOST, error, feeds, operators, two, weight
from tests.helpers.models import parse

LEFT: dict[str, tuple[str, str, str, dict[str, Array], str]] = {
    "float16": (
        "float16[N,64] x",
        "float16",
        "y = MatMul (x, W)",
        {"W": np.ones((64, 32), np.float16)},
        "formats are for float32",
    ),
    "narrow": (
        "float[N,8] x",
        "float",
        "y = MatMul (x, W)",
        {"W": np.ones((8, 32), np.float32)},
        "narrower than a block of 16",
    ),
    "not finite": (
        "float[N,64] x",
        "float",
        "y = MatMul (x, W)",
        {"W": np.full((64, 32), np.nan, np.float32)},
        "NaN or Inf",
    ),
    "also read": (
        "float[N,64] x",
        "float",
        "h = MatMul (x, W)\n r = ReduceSum <keepdims=0> (W)\n y = Add (h, r)",
        {"W": np.ones((64, 32), np.float32)},
        "also read by",
    ),
    "left operand": (
        "float[32,N] x",
        "float",
        "y = MatMul (W, x)",
        {"W": np.ones((8, 32), np.float32)},
        "so small that integers save nothing",
    ),
    "batch": (
        "float[2,N,64] x",
        "float",
        "y = MatMul (x, W)",
        {"W": np.ones((2, 64, 32), np.float32)},
        "a batch of weights",
    ),
}


@pytest.mark.parametrize("kind", LEFT)
def test_what_stays_floats_says_why(kind: str) -> None:
    takes, gives, body, constants, why = LEFT[kind]
    model = parse(f"{HEAD} g ({takes}) => ({gives} y) {{ {body} }}", constants)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    result = compress(model, energy=1.0, weights="4", bench=False, check=False, simplify=False)
    assert why in result.report.layers[0].reason
    assert result.report.layers[0].format is None
    assert "DequantizeLinear" not in operators(result)
    assert result.model.opset_imports[""] == 17


def test_zeros_stay_zeros(rng: np.random.Generator) -> None:
    w = weight(rng, 64, 32)
    w[:, 3], w[5] = 0.0, 0.0
    model = parse(f"{HEAD} g (float[N,64] x) => (float[N,32] y) {{ y = MatMul (x, W) }}", {"W": w})
    for bits in BITS:
        result = compress(model, energy=1.0, weights=bits, bench=False)
        assert error(result) < LOST[bits]


def test_layers_that_are_excluded_stay(rng: np.random.Generator) -> None:
    result = compress(
        two(rng), energy=1.0, weights="8", exclude=["second"], bench=False, simplify=False
    )
    assert [layer.format is None for layer in result.report.layers] == [False, True]
    assert "exclude" in result.report.layers[1].reason


def test_weights_that_are_stored_wider_than_they_are_read(rng: np.random.Generator) -> None:
    text = f"""{HEAD} g (float[N,96] x) => (float[N,64] y) {{
        w = Cast <to = 1> (W)
        [product] h = MatMul (x, w)
        v = Cast <to = 1> (V)
        [last] y = MatMul (h, v)
    }}"""
    weights = {name: weight(rng, *shape) for name, shape in (("W", (96, 96)), ("V", (96, 64)))}
    model = parse(text, {name: own.astype(np.float64) for name, own in weights.items()})
    common: dict[str, Any] = {"calibration": feeds(rng), "bench": False, "simplify": False}
    result = compress(model, **common, keep=0.3, weights="auto")
    goal = result.report.goal
    assert goal is not None
    assert goal.predicted_damage is not None
    assert goal.predicted_damage == pytest.approx(error(result) ** 2, rel=0.5)


@pytest.mark.parametrize("goal", [{"energy": 1.0}, {"keep": 0.2}])
@pytest.mark.parametrize("bits", BITS)
def test_default_values_of_inputs_that_count_as_constants(
    bits: str, goal: dict[str, Any], rng: np.random.Generator
) -> None:
    model = two(rng)
    for tensor in model.graph.initializer:
        info = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        model.graph.input.append(info)
    common: dict[str, Any] = {"calibration": feeds(rng), "bench": False, "simplify": False}
    left = compress(model, **common, energy=1.0, weights=bits)
    assert not any(layer.format for layer in left.report.layers)
    result = compress(model, **common, **goal, weights=bits, constant_inputs=True)
    assert all(layer.format for layer in result.report.layers)
    assert error(result) < (2 * LOST[bits] if "energy" in goal else 0.5)
    assert [value.name for value in result.model.graph.inputs] == ["x", "b"]


def test_an_empty_weight_stays(rng: np.random.Generator) -> None:
    text = f"""{HEAD} g (float[N,96] x) => (float[N,64] y) {{
        [nothing] h = MatMul (x, W)
        c = Concat <axis = 1> (h, x)
        [last] y = MatMul (c, V)
    }}"""
    model = parse(text, {"W": np.zeros((96, 0), np.float32), "V": weight(rng, 96, 64)})
    options: dict[str, Any] = {"calibration": feeds(rng), "bench": False, "simplify": False}
    goals: list[dict[str, Any]] = [
        {"energy": 1.0, "weights": "4"},
        {"keep": 0.3, "weights": "8,4"},
    ]
    for goal in goals:
        layers = {layer.name: layer for layer in compress(model, **options, **goal).report.layers}
        assert layers["last"].format is not None
        assert layers["nothing"].format is None
        assert "96×0 is empty" in layers["nothing"].reason


def test_an_old_opset_is_raised(rng: np.random.Generator) -> None:
    model = parse(
        '<ir_version: 6, opset_import: ["" : 11]> g (float[N,64] x) => (float[N,2,16] y) '
        "{ a = MatMul (x, W)\n b = Unsqueeze <axes=[1]> (a)\n p, q = Split <axis=2> (b)\n"
        " c = Concat <axis=1> (p, q)\n y = Softmax <axis=2> (c) }",
        {"W": rng.standard_normal((64, 32)).astype(np.float32)},
    )
    samples = [{"x": rng.standard_normal((8, 64)).astype(np.float32)} for _ in range(4)]
    result = compress(model, energy=1.0, weights="8", calibration=samples, bench=False)
    assert "opset 11 was raised to 21" in result.report.notes
    assert result.report.layers[0].format == "8 bits, blocks of 64"
    assert 0.0 < error(result) < LOST["8"]


def test_an_opset_that_cannot_be_raised_is_an_error(tmp_path: Path) -> None:
    model = parse(
        '<ir_version: 6, opset_import: ["" : 11]> g (float[N,64] x) => (float[N,32] y) '
        '{ a = Resize <coordinate_transformation_mode="tf_half_pixel_for_nn"> (x, E, S)\n'
        " y = MatMul (a, W) }",
        {
            "W": np.ones((64, 32), np.float32),
            "E": np.zeros(0, np.float32),
            "S": np.ones(2, np.float32),
        },
    )
    with pytest.raises(InputError, match="Resize of opset 11 has coordinate_transformation_mode"):
        compress(model, energy=1.0, weights="4", bench=False)
    onnx.save(model, tmp_path / "in.onnx")
    files = [str(tmp_path / name) for name in ("in.onnx", "out.onnx")]
    assert exit_code([*files, "--weights", "4"]) == 1
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("options", [{"shape_for": "qnn"}, {"ep": "coreml"}])
def test_a_target_without_blocks(options: dict[str, Any], rng: np.random.Generator) -> None:
    with pytest.raises(UsageError, match="takes no weights in blocks"):
        compress(two(rng), weights="4", **options)
    with pytest.raises(UsageError, match="weights"):
        compress(two(rng), weights="5")


def test_a_table_that_is_factored_has_pairs_of_floats(rng: np.random.Generator) -> None:
    model = parse(
        f"{HEAD} g (int64[B] i) => (float[B,64] y) {{ y = Gather (E, i) }}",
        {"E": weight(rng, 100, 64)},
    )
    for goal, table in (({"rank": 8}, False), ({"energy": 1.0}, True)):
        result = compress(model, **goal, ops=["gather"], weights="8", bench=False)
        assert error(result) < (0.02 if table else 1.5)
        notes = [note for note in result.report.notes if note.startswith("tables in")]
        assert bool(notes) == table


def convolutions(rng: np.random.Generator) -> onnx.ModelProto:
    """Two convolutions, an LSTM over what they give, and a Gemm."""
    return parse(
        f"""{HEAD} g (float[N,8,10,10] x) => (float[N,12] y) {{
            [c1] a = Conv <pads=[1,1,1,1]> (x, W1, b1)
            r = Relu (a)
            [c2] c = Conv <strides=[2,2]> (r, W2)
            [each] e = Conv <group=64> (c, W5)
            p = GlobalAveragePool (e)
            f = Flatten (p)
            s = Unsqueeze (f, z)
            [cell] o, h, k = LSTM <hidden_size=16> (s, W3, R)
            l = Squeeze (h, z)
            [last] y = Gemm (l, W4)
        }}""",
        {
            "W1": weight(rng, 48, 72).reshape(48, 8, 3, 3),
            "b1": weight(rng, 48, 1).reshape(-1),
            "W2": weight(rng, 64, 432).reshape(64, 48, 3, 3),
            "W3": weight(rng, 64, 64)[None],
            "R": weight(rng, 64, 16)[None],
            "W4": weight(rng, 16, 12),
            "W5": weight(rng, 64, 9).reshape(64, 1, 3, 3) + np.float32(0.1),
            "z": np.array([0]),
        },
    )


def images(rng: np.random.Generator, count: int = 16) -> list[Feed]:
    return [{"x": rng.standard_normal((2, 8, 10, 10)).astype(np.float32)} for _ in range(count)]


def by_name(result: Result) -> dict[str, Any]:
    return {layer.name: layer for layer in result.report.layers}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("ops", [None, ["default", "conv", "lstm"]])
def test_convolutions_and_cells(bits: str, ops: list[str] | None, rng: np.random.Generator) -> None:
    """With their forms off they are rounded to nearest, as no sample was gathered for them."""
    model, samples = convolutions(rng), images(rng)
    result = compress(model, energy=1.0, weights=bits, ops=ops, calibration=samples, bench=False)
    assert 0.0 < error(result) < LOST[bits]
    for name in ("c1", "c2", "cell"):
        assert by_name(result)[name].format.startswith(f"{bits} bits")
        assert by_name(result)[name].rank is None
    each = by_name(result)["each"]
    assert each.format == "8 bits, a scale for each output"
    assert each.reason.startswith("depthwise convolution: its 64 groups are small maps already; ")
    kinds = operators(result)
    assert (kinds.count("Conv"), kinds.count("LSTM"), kinds.count("Mul")) == (3, 1, 4)
    onnx.checker.check_model(ir.to_proto(result.model), full_check=True)
    before = compress(model, energy=1.0, calibration=samples, bench=False).report.output.bytes
    assert result.report.output.bytes < before * {"8": 0.35, "4": 0.25}[bits]
    nearest = any("rounded to nearest in 4 of 5" in note for note in result.report.notes)
    assert nearest is (ops is None)
    again = compress(model, recipe=result.recipe, calibration=samples, bench=False)
    assert ir.to_proto(again.model) == ir.to_proto(result.model)


def test_a_budget_chooses_formats_of_convolutions(rng: np.random.Generator) -> None:
    model, samples = convolutions(rng), images(rng)
    result = compress(model, keep=0.2, weights="auto", calibration=samples, bench=False)
    goal = result.report.goal
    assert goal is not None
    assert 0.5 < (goal.predicted_damage or 0.0) / (goal.achieved_damage or 1.0) < 2.0
    assert result.report.output.bytes < 0.3 * 4 * (48 * 72 + 64 * 432 + 64 * 80)
    assert by_name(result)["c2"].format is not None
    again = compress(model, recipe=result.recipe, calibration=samples, bench=False)
    assert ir.to_proto(again.model) == ir.to_proto(result.model)
    own = compress(
        model, keep=0.9, weights="auto", quantize_ops=["gemm"], calibration=samples, bench=False
    )
    reason = by_name(own)["c2"].reason
    assert "weights stay floats: quantize_ops=" in reason


@pytest.mark.parametrize("bits", BITS)
def test_pairs_of_convolutions(bits: str, rng: np.random.Generator) -> None:
    model, samples = convolutions(rng), images(rng)
    made: dict[str, Any] = {"ops": ["conv", "lstm"], "calibration": samples, "bench": False}
    plain = compress(model, rank=18, **made)
    result = compress(model, rank=18, weights=bits, **made)
    ranks = {name: layer.rank for name, layer in by_name(result).items()}
    assert ranks == {"c1": 18, "c2": 18, "each": None, "cell": 18, "last": None}
    assert {layer.form for layer in result.report.layers} >= {"conv", "conv-spatial"}
    assert error(result) < error(plain) + LOST[bits]
    assert result.report.output.bytes < plain.report.output.bytes
    for name in ("c1", "c2", "cell"):
        rounding = by_name(result)[name].rounding_error
        assert rounding is not None
        assert 0.0 < rounding < LOST[bits]
