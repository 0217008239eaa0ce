"""Tables that one node of ONNX Runtime gathers, and whose integers a tied head multiplies with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from onnx_lowrank import compress
from onnx_lowrank.maps.formats import Format
from onnx_lowrank.maps.tables import table_formats
from onnx_lowrank.numerics.arrays import Array, Feed
from onnx_lowrank.numerics.blocks import Bits
from tests.helpers.formats import BITS, LOST, error, operators
from tests.helpers.models import parse

WORDS, WIDTH = 200, 96
OWN: dict[str, Any] = {"operators": "microsoft", "bench": False, "simplify": False}
HEADS = {
    "product": "t = Transpose <perm = [1, 0]> (E)  y = MatMul (a, t)",
    "gemm": "f = Reshape (a, flat)  y = Gemm <transB = 1> (f, E, c)",
    "none": "y = Relu (a)",
}


def decoder(head: str, rng: np.random.Generator, opset: int = 13) -> onnx.ModelProto:
    """A small decoder whose head reads its table too."""
    size = "float[M,200]" if head == "gemm" else "float[B,T,K]"
    arrays = {
        "E": rng.standard_normal((WORDS, WIDTH)).astype(np.float32) / 10,
        "W": rng.standard_normal((WIDTH, WIDTH)).astype(np.float32) / 10,
    }
    if head == "gemm":
        arrays |= {
            "c": rng.standard_normal(WORDS).astype(np.float32),
            "flat": np.array([-1, WIDTH]),
        }
    return parse(
        f"""<ir_version: 8, opset_import: ["" : {opset}]>
        g (int64[B,T] i) => ({size} y) {{
            h = Gather (E, i)
            m = MatMul (h, W)
            r = Relu (m)
            a = Add (r, h)
            {HEADS[head]}
        }}""",
        arrays,
    )


def samples(rng: np.random.Generator) -> list[Feed]:
    return [{"i": rng.integers(-WORDS, WORDS, (2, 9))} for _ in range(12)]


def outputs(model: ir.Model | onnx.ModelProto, feed: Feed, *, plain: bool = False) -> Array:
    options = ort.SessionOptions()
    if plain:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    proto = ir.to_proto(model) if isinstance(model, ir.Model) else model
    session = ort.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return np.asarray(session.run(["y"], feed)[0])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("head", HEADS)
def test_one_node_each_and_stored_once(head: str, bits: str, rng: np.random.Generator) -> None:
    model, data = decoder(head, rng), samples(rng)
    result = compress(model, energy=1.0, weights=bits, data=data, **OWN)
    assert error(result) < LOST[bits]
    nodes = operators(result)
    assert nodes.count("GatherBlockQuantized") == 1
    assert nodes.count("MatMulNBits") == (1 if head == "none" else 2)
    assert result.model.opset_imports == {"": 13, "com.microsoft": 1}  # the opset stays
    assert "E" not in result.model.graph.initializers
    row = next(layer for layer in result.report.layers if layer.weight == "E")
    assert row.format is not None
    assert row.format.endswith("GatherBlockQuantized")
    values = result.model.graph.initializers
    stored = [values[name].const_value for name in ("E.codes", "E.scales")]
    assert row.bytes_after == sum(tensor.nbytes for tensor in stored if tensor is not None)
    # What it computes does not hang on optimizations, but for how kernels round their inputs.
    one, other = (outputs(result.model, data[0], plain=plain) for plain in (False, True))
    np.testing.assert_allclose(one, other, atol=0.02 * np.abs(other).max())


def test_no_rows(rng: np.random.Generator) -> None:
    result = compress(decoder("product", rng), energy=1.0, weights="4", data=samples(rng), **OWN)
    for shape in ((2, 0), (0, 3)):
        feed = {"i": np.zeros(shape, np.int64)}
        assert outputs(result.model, feed).shape == (*shape, WORDS)


def test_a_size_and_a_recipe(tmp_path: Path, rng: np.random.Generator) -> None:
    model, data, recipe = decoder("product", rng), samples(rng), tmp_path / "recipe.json"
    own = {"data": data, **OWN}
    result = compress(model, max_size=26_000, weights="8,4", save_recipe=recipe, **own)
    assert result.report.output.bytes <= 26_000
    assert "GatherBlockQuantized" in operators(result)
    again = compress(model, recipe=recipe, data=data, bench=False)
    assert again.report.output.bytes == result.report.output.bytes


def test_healing_goes_on_beside_it(rng: np.random.Generator) -> None:
    model, data = decoder("product", rng), samples(rng)
    result = compress(model, rank=24, weights="4", heal=20, data=data, **OWN)
    assert result.report.healing is not None
    assert operators(result).count("GatherBlockQuantized") == 1
    assert operators(result).count("MatMulNBits") == 3


@pytest.mark.parametrize(
    "line",
    [
        "t = Transpose <perm = [1, 0]> (E)  z = Relu (t)  y = MatMul (a, z)",
        "t = Transpose <perm = [1, 0]> (E)  y = MatMul (a, t)  q = MatMul (t, E)",
    ],
)
def test_what_else_reads_it_keeps_the_standard_form(line: str, rng: np.random.Generator) -> None:
    HEADS["other"] = line
    model = decoder("other", rng, opset=18)
    del HEADS["other"]
    result = compress(model, energy=1.0, weights="8", data=samples(rng), **OWN)
    assert "GatherBlockQuantized" not in operators(result)
    assert error(result) < LOST["8"]


def test_blocks_fill_the_rows() -> None:
    def form(bits: Bits, block: int) -> Format:
        return Format(bits, block, table=True, fused=True)

    assert table_formats(96, 4, fused=True) == (form(4, 32), form(4, 16))
    assert table_formats(384, 8, fused=True) == (form(8, 128),)
    assert table_formats(40, 4, fused=True) == table_formats(96, 6, fused=True) == ()
