"""Products of integers between QuantizeLinear and DequantizeLinear, judged by two runtimes."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_lowrank.graph.spool import Spool
from onnx_lowrank.maps.format_writer import FormatWriter
from onnx_lowrank.maps.formats import Format
from onnx_lowrank.maps.static import ByteStep, rounded_values
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.blocks import round_blocks
from tests.helpers.models import parse, run_ort, run_reference

STEPS = {
    "x": ByteStep(4.0 / 128.0, 128),
    "h": ByteStep(6.0 / 128.0, 128),
    "k": ByteStep(6.0 / 255.0, 0),
    "y": ByteStep(0.05, 100),
}


def rounded(value: Array, name: str) -> Array:
    """What integers of 8 bits make of a value."""
    step = STEPS[name]
    q = np.clip(np.rint(value / np.float32(step.scale)) + step.zero, 0, 255)
    return np.asarray((q - step.zero) * np.float32(step.scale), np.float32)


def weight(rng: np.random.Generator, m: int, n: int) -> Array:
    return np.asarray(rng.standard_normal((m, n)) / np.sqrt(m), np.float32)


@pytest.mark.parametrize("channels", [True, False])
@pytest.mark.parametrize("opset", [13, 21])
def test_products_that_share_an_input_and_follow_each_other(
    opset: int, channels: bool, rng: np.random.Generator
) -> None:
    """Each value is rounded once, and floats go on to all that is no product."""
    matrices = {"H": weight(rng, 32, 24), "K": weight(rng, 32, 24), "Y": weight(rng, 24, 16)}
    bias = rng.standard_normal(16).astype(np.float32)
    proto = parse(
        f"""<ir_version: 8, opset_import: ["" : {opset}]>
        g (float[N,32] x) => (float[N,16] y, float[N,24] both, float[N,32] free) {{
            [h] h = MatMul (x, H)
            [k] k = MatMul (x, K)
            [y] y = Gemm <transB = 1> (h, Y, b)
            both = Add (h, k)
            free = Neg (x)
        }}""",
        {**matrices, "Y": matrices["Y"].T.copy(), "b": bias},
    )
    model = ir.from_proto(proto)
    nodes = [node for node in model.graph if node.op_type in ("MatMul", "Gemm")]
    assert rounded_values(nodes) == ["x", "h", "k", "y"]
    form = Format(8, 0, activations="static", channels=channels)
    values = {}
    with Spool() as spool:
        writer = FormatWriter(model, spool)
        for node in nodes:
            name = node.name or ""
            codes = round_blocks(matrices[name.upper()], 8, 32, one=not channels)
            values[name] = codes.values()
            writer.put([node], codes, form)
        writer.surround(nodes, STEPS)
        found = ir.to_proto(model)
    onnx.checker.check_model(found, full_check=True)
    assert [output.name for output in found.graph.output] == ["y", "both", "free"]
    operators = [node.op_type for node in found.graph.node]
    assert operators.count("QuantizeLinear") == 4
    assert operators.count("DequantizeLinear") == 7
    assert "FLOAT" not in {t.data_type for t in found.graph.initializer if len(t.dims) == 2}
    x = (rng.standard_normal((5, 32)) * 2).astype(np.float32)
    inner = rounded(x, "x")
    h, k = (rounded(inner @ values[name], name) for name in ("h", "k"))
    expected = {"y": rounded(h @ values["y"] + bias, "y"), "both": h + k, "free": -x}
    runs = [run_ort, run_reference] if opset > 13 else [run_ort]  # the reference knows no older one
    for run in runs:
        outputs = run(found, {"x": x})
        for name, array in expected.items():
            # Sums in another order may end on the other side of a rounding.
            step = STEPS["y"].scale if name == "y" else STEPS["h"].scale + STEPS["k"].scale
            off = np.abs(outputs[name] - array)
            assert off.max() <= 1.01 * step
            assert np.mean(off > 1e-5) < 0.1


def test_what_is_stored(rng: np.random.Generator) -> None:
    matrix = weight(rng, 32, 24)
    for channels in (True, False):
        model = ir.from_proto(
            parse(
                """<ir_version: 8, opset_import: ["" : 13]>
                g (float[N,32] x) => (float[N,24] y) { [it] y = MatMul (x, W) }""",
                {"W": matrix},
            )
        )
        form = Format(8, 0, activations="static", channels=channels)
        codes = round_blocks(matrix, 8, 32, one=not channels)
        with Spool() as spool:
            FormatWriter(model, spool).put([next(iter(model.graph))], codes, form)
        shapes = {
            (value.dtype, tuple(value.shape or ())) for value in model.graph.initializers.values()
        }
        scales = (24,) if channels else ()
        assert shapes == {(ir.DataType.INT8, (32, 24)), (ir.DataType.FLOAT, scales)}
