"""Products with weights in blocks as MatMulNBits, on request."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnx_lowrank import compress
from onnx_lowrank.errors import InputError, UsageError
from tests.helpers.formats import LOST, error, feeds, operators, two, weight
from tests.helpers.models import parse, run_ort

OWN: dict[str, Any] = {"operators": "microsoft", "bench": False}


def old(rng: np.random.Generator) -> onnx.ModelProto:
    """A model of an opset that nothing newer is needed of."""
    model = two(rng)
    model.opset_import[0].version = 11
    return model


@pytest.mark.parametrize("bits", ["8", "4"])
@pytest.mark.parametrize("goal", [{"energy": 1.0}, {"keep": 0.7, "uniform": True}])
def test_the_opset_stays(bits: str, goal: dict[str, Any], rng: np.random.Generator) -> None:
    model, samples = old(rng), feeds(rng)
    result = compress(model, weights=bits, data=samples, **goal, **OWN)
    plain = compress(model, data=samples, bench=False, **goal)
    assert result.model.opset_imports == {"": 11, "com.microsoft": 1}
    assert "DequantizeLinear" not in operators(result)
    assert operators(result).count("MatMulNBits") == (2 if "energy" in goal else 4)
    assert error(result) < error(plain) + LOST[bits]
    assert all("MatMulNBits" in layer.reason for layer in result.report.layers if layer.reason)


def test_it_is_what_the_standard_form_becomes(rng: np.random.Generator) -> None:
    model, data = two(rng), feeds(rng)
    own = compress(model, energy=1.0, weights="4", data=data, **OWN)
    plain = compress(model, energy=1.0, weights="4", data=data, bench=False)
    one, other = (run_ort(result.model, data[0])["y"] for result in (own, plain))
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-3)


def test_a_budget_counts_whole_blocks_and_wide_scales(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    model = old(rng)
    result = compress(model, max_size=9_500, weights="8,4", data=feeds(rng), **OWN)
    path = tmp_path / "small.onnx"
    result.save(path)
    assert path.stat().st_size <= 9_500
    again = compress(model, recipe=result.recipe, data=feeds(rng), bench=False)
    assert operators(again) == operators(result)


@pytest.mark.parametrize("heal", [0, 4])
def test_corrections(heal: int, rng: np.random.Generator) -> None:
    model = old(rng)
    samples = feeds(rng)
    first = compress(model, energy=1.0, weights="4", data=samples, **OWN)
    recipe = first.recipe
    assert recipe is not None
    layers = [
        dataclasses.replace(own, format=dataclasses.replace(own.format, correction=8))
        for own in recipe.layers
        if own.format is not None
    ]
    settings = {**recipe.settings, "heal": heal}
    recipe = dataclasses.replace(recipe, layers=tuple(layers), settings=settings)
    result = compress(model, recipe=recipe, data=samples, bench=False)
    assert operators(result).count("MatMulNBits") == 6
    assert result.model.opset_imports[""] == 11
    assert error(result) < error(first)


def test_what_cannot_be_one_node_has_the_standard_form(rng: np.random.Generator) -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N,96] x) => (float[N,48] y) {
            [one] h = MatMul (x, W1)
            [other] y = Gemm <alpha=0.5> (h, W2)
        }""",
        {"W1": weight(rng, 96, 80), "W2": weight(rng, 80, 48)},
    )
    result = compress(model, energy=1.0, weights="4", data=feeds(rng), **OWN)
    assert [name for name in operators(result) if name != "Cast"] == [
        *("DequantizeLinear", "MatMulNBits", "Gemm")
    ]
    assert result.model.opset_imports[""] == 21


def test_a_target_without_blocks(rng: np.random.Generator) -> None:
    with pytest.raises(UsageError, match="MatMulNBits"):
        compress(two(rng), energy=1.0, weights="auto", shape_for="qnn", **OWN)


def test_a_recipe_names_what_a_layer_can_be(rng: np.random.Generator, tmp_path: Path) -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N,96] x) => (float[N,48] y) { [one] y = Gemm <alpha=0.5> (x, W) }""",
        {"W": weight(rng, 96, 48)},
    )
    path = tmp_path / "recipe.json"
    compress(model, energy=1.0, weights="4", save_recipe=path, bench=False)
    recipe = json.loads(path.read_text())
    recipe["layers"][0]["format"]["fused"] = True
    path.write_text(json.dumps(recipe))
    with pytest.raises(InputError, match="fused"):
        compress(model, recipe=path, bench=False)


def test_scales_are_healed_as_those_of_the_standard_form(rng: np.random.Generator) -> None:
    """Codes of 24 rows: the last block is not full."""
    model, data = two(rng), feeds(rng, 120)
    options: dict[str, Any] = {"rank": 24, "weights": "4", "data": data, "samples": 40}
    standard = compress(model, heal=60, bench=False, **options)
    own = compress(model, heal=60, **OWN, **options)
    for result in (standard, own):
        healing = result.report.healing
        assert healing is not None
        assert healing.trained == 5  # four scales and a bias, after the pairs
        # What the rounding between both adds is no healing's doing.
        assert healing.error_after < healing.error_before
        assert any(n.startswith("healing before weights were") for n in result.report.notes)
    assert error(own) == pytest.approx(error(standard), rel=2e-3)
    plain = compress(model, **OWN, **options)
    assert operators(own) == operators(plain)
    assert set(own.model.graph.initializers) == set(plain.model.graph.initializers)
    assert error(own) < error(plain)


def test_scales_of_columns_are_healed(rng: np.random.Generator) -> None:
    model, data = two(rng), feeds(rng, 120)
    options: dict[str, Any] = {"rank": 24, "weights": "8", "activations": "int8", "bench": False}
    plain, healed = (
        compress(model, data=data, samples=40, heal=steps, **options) for steps in (0, 60)
    )
    assert healed.report.healing is not None
    assert healed.report.healing.trained == 5  # four scales and a bias, after the pairs
    assert operators(healed) == operators(plain)
    assert error(healed) < error(plain)
    assert not any(".open" in name for name in healed.model.graph.initializers)
