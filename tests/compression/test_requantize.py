"""``requantize``: models that are quantized already become smaller ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_lowrank import Result, compress
from onnx_lowrank.cli.program import exit_code
from onnx_lowrank.errors import GateError
from tests.helpers.models import parse
from tests.helpers.quantized import WAYS, float_model, images, quantized


def error(result: Result) -> float:
    assert result.report.check is not None
    return result.report.check.providers[0].outputs[0].relative_l2


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_quantizing(way: str, rng: np.random.Generator, tmp_path: Path) -> None:
    feeds = images(rng)
    path = quantized(float_model(rng), way, feeds, tmp_path)
    made: dict[str, Any] = {"calibration": feeds, "bench": False, "rank": 16}
    if way in ("qdq", "shifted"):
        left = compress(path, **made)
        assert all(layer.rank is None for layer in left.report.layers)
        assert all("see requantize=True" in layer.reason for layer in left.report.layers)
    result = compress(path, requantize=True, **made)
    assert result.report.input.bytes is not None
    assert result.report.output.bytes < result.report.input.bytes
    assert 0.0 < error(result) < 0.1
    onnx.checker.check_model(ir.to_proto(result.model), full_check=True)
    bits = "4" if way == "nbits" else "8"
    product = next(layer for layer in result.report.layers if layer.shape == (128, 160))
    assert product.rank == 16
    assert product.format is not None
    assert product.format.startswith(f"{bits} bits")
    if way.startswith("nbits"):  # what IN holds as floats stays floats
        assert [layer.format for layer in result.report.layers].count(None) == 2
    if way not in ("unsigned", "nbits"):
        return
    again = compress(path, recipe=result.recipe, calibration=feeds, bench=False)
    assert ir.to_proto(again.model) == ir.to_proto(result.model)


@pytest.mark.parametrize("bits", [8, 4])
def test_what_this_tool_has_written(bits: int, rng: np.random.Generator) -> None:
    """Blocks behind a DequantizeLinear, and a convolution whose blocks a runtime makes floats."""
    feeds = images(rng)
    own = compress(
        float_model(rng), energy=1.0, weights=f"{bits}", calibration=feeds, bench=False, check=False
    )
    before = ir.to_proto(own.model)
    result = compress(
        before, requantize=True, rank=16, ops=["default", "conv"], calibration=feeds, bench=False
    )
    assert result.report.input.bytes is not None
    assert result.report.output.bytes < 0.7 * result.report.input.bytes
    assert {layer.rank for layer in result.report.layers} == {16}
    text = f"{bits} bits"
    assert all((layer.format or "").startswith(text) for layer in result.report.layers)
    assert 0.0 < error(result) < 0.1


def test_a_share_is_of_the_bytes_of_the_input(rng: np.random.Generator, tmp_path: Path) -> None:
    feeds = images(rng, 24)
    path = quantized(float_model(rng), "dynamic", feeds, tmp_path)
    result = compress(
        path, requantize=True, keep=0.5, weights="8,4", calibration=feeds, bench=False
    )
    size = result.report.input.bytes
    assert size is not None
    weights = 128 * 144 + 128 * 160 + 160 * 96
    assert result.report.output.bytes < size - 0.4 * weights
    assert error(result) < 0.1


def test_what_would_be_larger_is_not_written(rng: np.random.Generator, tmp_path: Path) -> None:
    path = quantized(float_model(rng), "nbits", images(rng, 4), tmp_path)
    own: dict[str, Any] = {"weights": "8", "quantize_ops": ["matmul"], "ops": ["matmul"]}
    with pytest.raises(GateError, match="the result would take"):
        compress(path, requantize=True, energy=1.0, bench=False, calibrate=False, **own)
    out = tmp_path / "out.onnx"
    words = "--requantize --weights 8 --quantize-ops matmul --ops matmul --energy 1 --no-bench"
    assert exit_code([str(path), str(out), *words.split()]) == 3
    assert not out.exists()


def test_a_model_of_floats_is_told_so(rng: np.random.Generator) -> None:
    result = compress(
        float_model(rng), requantize=True, rank=8, calibration=images(rng, 4), bench=False
    )
    assert any("no weight is quantized" in note for note in result.report.notes)
    assert all(layer.format is None for layer in result.report.layers)
    assert result.report.layers[1].rank == 8


def test_weights_inside_of_branches_are_named(rng: np.random.Generator) -> None:
    """As in decoders that are merged with and without a cache."""
    proto = parse(
        """<ir_version: 8, opset_import: ["" : 17]> g (float[4,64] x, bool c) => (float[4,64] y) {
            y = If (c) <
                then_branch = a () => (float[4,64] p) {
                    q, s, z = DynamicQuantizeLinear (x)
                    [map] i = MatMulInteger (q, w, z)
                    t = Transpose (q)
                    [scores] j = MatMulInteger (q, t, z, z)
                    f = Cast <to=1> (i)
                    p = Mul (f, s)
                },
                else_branch = b () => (float[4,64] r) { r = Identity (x) }
            >
        }""",
        {"w": rng.integers(-127, 128, (64, 64)).astype(np.int8)},
    )
    result = compress(proto, requantize=True, energy=0.9, bench=False)
    assert result.report.layers[0].rank is None
    option = "requantize=True: weights that stay as they are"
    assert f"{option}: map: it is inside a subgraph or function" in result.report.notes
