"""Integers for maps around a width, and for pairs that a model has: each map by itself."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_lowrank import InputError, Result, compress
from onnx_lowrank.numerics.arrays import Array, Feed
from tests.helpers.formats import BITS, HEAD, LOST, error, feeds, operators, weight
from tests.helpers.models import parse

WIDTH, UNITS, LEFT = 96, 160, 120
OPTIONS: dict[str, Any] = {"ops": ("default", "hidden"), "simplify": False, "bench": False}


def block(rng: np.random.Generator) -> onnx.ModelProto:
    """Gated units between three maps, 40 of 160 of them copies of others; one has no bias."""
    gate, up = weight(rng, WIDTH, UNITS), weight(rng, WIDTH, UNITS)
    row = rng.standard_normal(UNITS).astype(np.float32)
    for own in (gate, up, row):
        own[..., LEFT:] = own[..., : UNITS - LEFT]
    return parse(
        f"""{HEAD} g (float[N,96] x) => (float[N,96] y) {{
            [gate] g0 = MatMul (x, G)
            g1 = Add (g0, a)
            s = Sigmoid (g1)
            [up] u = MatMul (x, U)
            h = Mul (s, u)
            [down] d = MatMul (h, D)
            y = Add (d, c)
        }}""",
        {
            **{"G": gate, "a": row, "U": up, "D": weight(rng, UNITS, WIDTH)},
            "c": rng.standard_normal(WIDTH).astype(np.float32),
        },
    )


def row_of(result: Result, name: str = "down") -> Any:
    return next(layer for layer in result.report.layers if layer.name == name)


def stored(model: ir.Model) -> int:
    """Bytes of the constants of matrices, scales and zero points among them."""
    values = (value.const_value for value in model.graph.initializers.values())
    return sum(own.nbytes for own in values if own is not None and len(own.shape) == 2)


@pytest.fixture(scope="module")
def samples() -> list[Feed]:
    parts = [feed["x"] for feed in feeds(np.random.default_rng(8), 320)]
    return [{"x": np.concatenate(parts[start::40])} for start in range(40)]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rank", [LEFT, None])
def test_each_map_is_stored_in_integers(
    bits: str, rank: int | None, samples: list[Feed], rng: np.random.Generator
) -> None:
    goal: dict[str, Any] = {"energy": 1.0} if rank is None else {"rank": rank}
    plain = compress(block(rng), **goal, calibration=samples, **OPTIONS)
    result = compress(
        block(np.random.default_rng(0)), **goal, weights=bits, calibration=samples, **OPTIONS
    )
    onnx.checker.check_model(ir.to_proto(result.model), full_check=True)
    assert operators(result).count("DequantizeLinear") == 3
    assert error(result) < error(plain) + LOST[bits]
    layer = row_of(result)
    width = UNITS if rank is None else rank
    assert (layer.rank, layer.format[:6]) == (rank, f"{bits} bits")
    assert layer.bytes_after == stored(result.model)
    assert layer.bytes_after < 0.3 * 4 * 3 * WIDTH * width
    assert 0.0 < layer.rounding_error < 2 * LOST[bits]


def test_a_goal_takes_width_and_format_together(
    samples: list[Feed], rng: np.random.Generator
) -> None:
    model = block(rng)
    result = compress(model, keep=0.14, weights="auto", data=samples, **OPTIONS)
    layer, goal = row_of(result), result.report.goal
    assert layer.rank is not None
    assert layer.format is not None
    assert layer.bytes_after <= 0.14 * layer.bytes_before
    assert goal is not None
    assert goal.predicted_damage is not None
    assert goal.achieved_damage is not None
    assert 0.67 < goal.predicted_damage / goal.achieved_damage < 1.5
    apart = compress(model, keep=0.14, weights="auto", data=samples, **(OPTIONS | {"ops": None}))
    assert error(result) < error(apart)  # copies are left out at no cost


def test_samples_say_how_to_round_what_is_left(
    samples: list[Feed], rng: np.random.Generator
) -> None:
    """The last map is rounded on the moments of the units that stay."""
    model = block(rng)
    near = compress(model, rank=LEFT, weights="4", calibration=samples, **OPTIONS)
    floats = ir.to_proto(compress(model, rank=LEFT, calibration=samples, **OPTIONS).model)
    options: dict[str, Any] = {"bench": False, "simplify": False, "data": samples, "weights": "4"}
    blind = compress(floats, energy=1.0, calibrate=False, **options)
    again = compress(floats, energy=1.0, **options)
    assert error(near) < 0.6 * error(blind)
    assert error(near) < 1.3 * error(again)


def test_inputs_in_8_bits(samples: list[Feed], rng: np.random.Generator) -> None:
    result = compress(
        block(rng), rank=LEFT, weights="8", activations="int8", data=samples, **OPTIONS
    )
    nodes = operators(result)
    assert nodes.count("MatMulInteger") == 3
    assert nodes.count("DynamicQuantizeLinear") == 2  # the first two maps read one value
    assert row_of(result).rank == LEFT
    assert error(result) < 0.05


def test_ranges_of_samples(samples: list[Feed], rng: np.random.Generator) -> None:
    shaped: dict[str, Any] = {"shape_for": "qnn", "dims": {"N": 64}}
    own = {**OPTIONS, **shaped}
    result = compress(block(rng), keep=0.25, weights="8", activations="int8", data=samples, **own)
    assert operators(result).count("QuantizeLinear") >= 3
    assert "inputs and results in 8 bits" in row_of(result).format
    assert error(result) < 0.1


def test_one_node_each(samples: list[Feed], rng: np.random.Generator) -> None:
    own = {**OPTIONS, "operators": "microsoft"}
    result = compress(block(rng), rank=LEFT, weights="4", calibration=samples, **own)
    assert operators(result).count("MatMulNBits") == 3
    assert result.model.opset_imports[""] == 17
    assert error(result) < 0.15


def test_a_recipe_stores_again(
    samples: list[Feed], tmp_path: Path, rng: np.random.Generator
) -> None:
    model, path = block(rng), tmp_path / "recipe.json"
    first = compress(model, keep=0.2, weights="8,4", data=samples, save_recipe=path, **OPTIONS)
    again = compress(model, recipe=path, data=samples, bench=False)
    assert first.report.output.bytes == again.report.output.bytes
    assert error(again) == pytest.approx(error(first), rel=0.1)
    text = re.sub(r'"block": \d+', '"block": 24', path.read_text())
    path.write_text(text)
    with pytest.raises(InputError, match="'down': format: expected a block that is a power of two"):
        compress(model, recipe=path, data=samples, bench=False)


def test_they_are_healed(samples: list[Feed], rng: np.random.Generator) -> None:
    model, own = block(rng), {"weights": "4", "data": samples, **OPTIONS}
    plain, healed = (compress(model, keep=0.12, heal=steps, **own) for steps in (0, 60))
    assert healed.report.healing is not None
    assert row_of(healed).format is not None
    assert error(healed) < error(plain)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"exclude": ["up"]}, "left out by exclude='up'"),
        ({"quantize_ops": ["conv"]}, "quantize_ops= does not name matmul"),
    ],
)
def test_why_they_stay_floats(
    change: dict[str, Any], reason: str, samples: list[Feed], rng: np.random.Generator
) -> None:
    result = compress(block(rng), rank=LEFT, weights="8", calibration=samples, **OPTIONS, **change)
    assert row_of(result).format is None
    assert reason.split("=")[0] in row_of(result).reason
    assert "DequantizeLinear" not in operators(result)


def test_a_map_narrower_than_a_block_keeps_floats(
    samples: list[Feed], rng: np.random.Generator
) -> None:
    result = compress(block(rng), rank=8, weights="8", calibration=samples, **OPTIONS)
    layer = row_of(result)
    assert layer.rank == 8
    assert operators(result).count("DequantizeLinear") == 2
    assert layer.bytes_after == stored(result.model)


@pytest.mark.parametrize("goal", [{"energy": 1.0}, {"rank": 24}])
def test_a_pair_that_is_there_already(
    goal: dict[str, Any], samples: list[Feed], rng: np.random.Generator
) -> None:
    base: dict[str, Array] = {"A": weight(rng, 96, 32), "B": weight(rng, 32, 64)}
    model = parse(
        f"""{HEAD} g (float[N,96] x) => (float[N,64] y) {{
            [first] h = MatMul (x, A)
            [second] y = MatMul (h, B)
        }}""",
        base,
    )
    options: dict[str, Any] = {"calibration": samples, "bench": False, "simplify": False}
    plain = compress(model, **goal, **options)
    result = compress(model, **goal, weights="8", **options)
    assert operators(result).count("DequantizeLinear") == 2
    assert error(result) < error(plain) + LOST["8"]
    layer = row_of(result, "second")
    assert layer.rank == goal.get("rank")
    assert layer.bytes_after < 0.3 * 4 * (layer.rank or 32) * (96 + 64)
