"""Inputs in 8 bits: what becomes of layers and pairs, under every goal, and what recipes hold."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_lowrank import InputError, Result, UsageError, compress
from onnx_lowrank.cli.program import exit_code
from onnx_lowrank.compression import prepare
from onnx_lowrank.maps.formats import Format
from onnx_lowrank.numerics.arrays import Array, Feed
from tests.helpers.models import parse

HEAD = '<ir_version: 8, opset_import: ["" : 17]>'
FORMAT = "8 bits per channel, inputs in 8 bits, unsigned"


@pytest.fixture(autouse=True)
def _saturating(monkeypatch: pytest.MonkeyPatch) -> None:
    """Integers without a sign, which every processor multiplies exactly."""
    monkeypatch.setattr(prepare, "saturates", lambda: True)


def weight(rng: np.random.Generator, m: int, n: int) -> Array:
    return np.asarray(rng.standard_normal((m, n)) / 8, np.float32)


def three(rng: np.random.Generator, opset: int = 17) -> onnx.ModelProto:
    """Two products of one activation, and a Gemm behind them."""
    return parse(
        f"""<ir_version: 8, opset_import: ["" : {opset}]>
        g (float[N,96] x) => (float[N,48] y) {{
            [q] q = MatMul (x, Q)
            [k] k = MatMul (x, K)
            s = Add (q, k)
            a = Tanh (s)
            [last] y = Gemm <transB=1> (a, W, b)
        }}""",
        {
            "Q": weight(rng, 96, 80),
            "K": weight(rng, 96, 80),
            "W": weight(rng, 48, 80),
            "b": rng.standard_normal(48).astype(np.float32),
        },
    )


def feeds(rng: np.random.Generator, count: int = 40) -> list[Feed]:
    """Inputs of which a few directions hold most of the energy."""
    basis = rng.standard_normal((96, 96)) * np.exp(-np.arange(96) / 16)[:, None]
    return [{"x": (rng.standard_normal((8, 96)) @ basis).astype(np.float32)} for _ in range(count)]


def error(result: Result) -> float:
    assert result.report.check is not None
    return result.report.check.providers[0].outputs[0].relative_l2


def operators(result: Result) -> list[str]:
    return [node.op_type for node in result.model.graph]


def formats(result: Result) -> dict[str, str | None]:
    return {layer.name: layer.format for layer in result.report.layers}


@pytest.mark.parametrize("goal", [{"energy": 1.0}, {"rank": 24}, {"rank": 8}])
def test_one_kind_for_all_layers(goal: dict[str, Any], rng: np.random.Generator) -> None:
    model, samples = three(rng), feeds(rng)
    common: dict[str, Any] = {"calibration": samples, "bench": False, "simplify": False, **goal}
    plain = compress(model, **common)
    result = compress(model, **common, weights="8", activations="int8")
    onnx.checker.check_model(ir.to_proto(result.model), full_check=True)
    assert set(formats(result).values()) == {FORMAT}
    assert error(result) < error(plain) + 0.02
    assert result.model.opset_imports[""] == 17
    found = operators(result)
    # Second factors of fewer than 16 rows stay floats.
    matrices = {"energy": 3, "rank": 6}["energy" if "energy" in goal else "rank"]
    floats = 3 if goal == {"rank": 8} else 0
    assert found.count("MatMulInteger") == matrices - floats
    # x is read by two layers, and rounded once.
    assert found.count("DynamicQuantizeLinear") == matrices - floats - 1
    for layer in result.report.layers:
        assert layer.rounding_error is not None
        assert 0.0 < layer.rounding_error < 0.02


@pytest.mark.parametrize(
    "goal", [{"max_size": "30KB"}, {"keep": 0.24}, {"keep": 0.16, "weights": "8"}]
)
def test_chosen_beside_others(goal: dict[str, Any], rng: np.random.Generator) -> None:
    """What is predicted is what comes out, with rounded inputs too."""
    model, samples = three(rng), feeds(rng, 60)
    common: dict[str, Any] = {"calibration": samples, "bench": False, "simplify": False}
    result = compress(model, **common, **{"weights": "auto", **goal}, activations="int8")
    goal_of = result.report.goal
    assert goal_of is not None
    assert 0.5 < (goal_of.predicted_damage or 0.0) / (goal_of.achieved_damage or 1.0) < 2.0
    again = compress(model, calibration=samples, bench=False, recipe=result.recipe)
    assert formats(again) == formats(result)
    assert error(again) == error(result)


def test_pairs_whose_factors_are_both_rounded(rng: np.random.Generator) -> None:
    """With nothing else to choose from the prediction has to know what rounding inside loses."""
    low = (weight(rng, 96, 20) @ weight(rng, 20, 80)).astype(np.float32)
    model = parse(
        f"{HEAD} g (float[N,96] x) => (float[N,80] y) {{ [it] y = MatMul (x, W) }}", {"W": low}
    )
    samples = feeds(rng, 60)
    common: dict[str, Any] = {"calibration": samples, "bench": False, "simplify": False}
    result = compress(model, **common, keep=0.14, weights="8", activations="int8")
    (layer,) = result.report.layers
    assert layer.rank is not None
    goal = result.report.goal
    assert goal is not None
    assert 0.4 < (goal.predicted_damage or 0.0) / (goal.achieved_damage or 1.0) < 2.5


def test_a_recipe_decides_about_the_sign(
    rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, samples = three(rng), feeds(rng)
    common: dict[str, Any] = {"calibration": samples, "bench": False, "check": False}
    wanted: dict[str, Any] = {"energy": 1.0, "weights": "8", "activations": "int8"}
    path = tmp_path / "r.json"
    result = compress(model, **common, **wanted, save_recipe=path, simplify=False)
    monkeypatch.setattr(prepare, "saturates", lambda: False)
    again = compress(model, **common, recipe=path)
    assert ir.to_proto(again.model).SerializeToString() == (
        ir.to_proto(result.model).SerializeToString()
    )
    signed = compress(model, **common, **wanted, simplify=False)
    assert set(formats(signed).values()) == {"8 bits per channel, inputs in 8 bits"}
    assert any("stored with a sign" in note for note in signed.report.notes)
    assert not any("stored with a sign" in note for note in again.report.notes)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"block": 32}, "expected 8 bits, a block of 0"),
        ({"correction": 4}, "expected a correction|a block of 0"),
        ({"bits": 4}, "expected 8 bits"),
        ({"bits": 6}, "6 bits are for tables"),
        ({"activations": "float"}, "signed integers in blocks"),
        ({"activations": "static"}, "ranges of static inputs come from samples"),
        ({"activations": "no"}, "expected float or dynamic or static"),
        ({"signed": 1}, "signed: expected"),
        ({"zeros": True}, "zero points are for 4 bits"),
        ({"zeros": 1}, "zeros: expected"),
    ],
)
def test_formats_of_a_recipe_that_cannot_be(
    change: dict[str, Any], why: str, rng: np.random.Generator, tmp_path: Path
) -> None:
    model, path = three(rng), tmp_path / "r.json"
    common: dict[str, Any] = {"bench": False, "check": False, "calibrate": False}
    common["simplify"] = False
    compress(model, **common, energy=1.0, weights="8", activations="int8", save_recipe=path)
    recipe = json.loads(path.read_text())
    recipe["layers"][0]["format"] |= change
    path.write_text(json.dumps(recipe))
    with pytest.raises(InputError, match=why):
        compress(model, bench=False, check=False, recipe=path)


def test_an_old_opset_is_enough(rng: np.random.Generator) -> None:
    samples = feeds(rng)
    common: dict[str, Any] = {"calibration": samples, "bench": False, "simplify": False}
    result = compress(three(rng, 11), **common, energy=1.0, weights="8", activations="int8")
    assert set(formats(result).values()) == {FORMAT}
    assert result.model.opset_imports[""] == 11
    assert error(result) < 0.03
    older = compress(three(rng, 10), **common, energy=1.0, weights="8", activations="int8")
    assert older.model.opset_imports[""] == 11
    fixed = parse(
        '<ir_version: 6, opset_import: ["" : 11]> g (float[N,96] x) => (float[N,80] y) {'
        ' a = Resize <coordinate_transformation_mode="tf_half_pixel_for_nn"> (x, E, S)'
        " y = MatMul (a, W) }",
        {
            "W": weight(rng, 96, 80),
            "E": np.zeros(0, np.float32),
            "S": np.ones(2, np.float32),
        },
    )
    chosen = compress(fixed, **common, keep=0.3, weights="auto", activations="int8")
    assert {form for form in formats(chosen).values() if form} == {FORMAT}
    assert any("are left out: node" in note for note in chosen.report.notes)
    with pytest.raises(InputError, match="Resize of opset 11 has coordinate_transformation_mode"):
        compress(fixed, **common, energy=1.0, weights="4")


def test_a_goal_raises_an_old_model_before_it_measures(rng: np.random.Generator) -> None:
    common: dict[str, Any] = {"calibration": feeds(rng), "bench": False, "simplify": False}
    result = compress(three(rng, 8), **common, keep=0.2, weights="8", activations="int8")
    assert None not in formats(result).values()
    assert error(result) < 0.2


def test_what_does_not_round_its_inputs_has_blocks(rng: np.random.Generator) -> None:
    model = parse(
        f"{HEAD} g (float[N,96] x) => (float[N,80] y) {{ y = Gemm <alpha = 0.5> (x, W) }}",
        {"W": weight(rng, 96, 80)},
    )
    result = compress(model, energy=1.0, weights="8", activations="int8", bench=False)
    assert set(formats(result).values()) == {"8 bits, blocks of 64"}


def test_healing_goes_on_beside_rounded_inputs(rng: np.random.Generator) -> None:
    model, samples = three(rng), feeds(rng, 60)
    common: dict[str, Any] = {"calibration": samples, "bench": False, "simplify": False}
    first = compress(model, **common, keep=0.2, weights="auto", activations="int8")
    recipe = first.recipe
    assert recipe is not None
    dynamic = Format(8, 0, activations="dynamic", signed=False)
    mixed = [(dynamic, None), (dynamic, 24), (Format(4, 32, 8), None)]
    layers = [
        dataclasses.replace(own, format=form, rank=rank)
        for own, (form, rank) in zip(recipe.layers, mixed, strict=True)
    ]
    settings = {**recipe.settings, "heal": 8}
    own = dataclasses.replace(recipe, layers=tuple(layers), settings=settings)
    result = compress(model, calibration=samples, bench=False, recipe=own)
    assert result.report.healing is not None
    assert operators(result).count("MatMulInteger") == 3
    assert error(result) < 0.2


def test_the_command(rng: np.random.Generator, tmp_path: Path, capsys: Any) -> None:
    onnx.save(three(rng), tmp_path / "in.onnx")
    np.savez(tmp_path / "data.npz", x=np.concatenate([feed["x"] for feed in feeds(rng)]))
    files = [str(tmp_path / name) for name in ("in.onnx", "out.onnx")]
    options = [*files, "--data", str(tmp_path / "data.npz"), "--no-bench", "--energy", "1"]
    assert exit_code([*options, "--weights", "8", "--activations", "int8"]) == 0
    assert "inputs in 8 bits" in capsys.readouterr().out
    assert exit_code([*options, "--weights", "4", "--activations", "int8", "--force"]) == 2
    assert "--activations int8 needs 8 among --weights" in capsys.readouterr().err
    assert exit_code([*options, "--activations", "int8", "--force"]) == 2
    with pytest.raises(UsageError, match="target webgpu multiplies no integers"):
        compress(three(rng), weights="8", activations="int8", shape_for="webgpu")
