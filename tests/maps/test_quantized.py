"""Quantized weights are named, and left alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from onnx_lowrank.numerics.arrays import Array
from tests.helpers.cases import (
    OPSETS,
    node_protos,
)
from tests.helpers.models import as_proto, factored, parse


def integers(*shape: int) -> Callable[[np.random.Generator], Array]:
    return lambda rng: rng.integers(-4, 5, shape).astype(np.int8)


QUANTIZED: dict[str, tuple[str, str, Callable[[np.random.Generator], Array]]] = {
    "MatMulInteger": ("int8[3, 16] x", "y = MatMulInteger(x, W)", integers(16, 12)),
    "QLinearMatMul": (
        "int8[3, 16] x",
        "y = QLinearMatMul(x, one, zero, W, one, zero, one, zero)",
        integers(16, 12),
    ),
    "ConvInteger": ("int8[1, 16, 5, 5] x", "y = ConvInteger(x, W)", integers(12, 16, 3, 3)),
    "QLinearConv": (
        "int8[1, 16, 5, 5] x",
        "y = QLinearConv(x, one, zero, W, one, zero, one, zero)",
        integers(12, 16, 3, 3),
    ),
    "DequantizeLinear": (
        "float[3, 16] x",
        "w = DequantizeLinear(W, one, zero)\n y = MatMul(x, w)",
        integers(16, 12),
    ),
    "DequantizeLinear, Transpose": (
        "float[3, 16] x",
        "w = DequantizeLinear(W, one, zero)\n t = Transpose(w)\n y = MatMul(x, t)",
        integers(12, 16),
    ),
    "DequantizeLinear, Gemm": (
        "float[3, 16] x",
        "w = DequantizeLinear(W, one, zero)\n y = Gemm <transB = 1> (x, w)",
        integers(12, 16),
    ),
    "DequantizeLinear, Conv": (
        "float[1, 16, 5, 5] x",
        "w = DequantizeLinear(W, one, zero)\n y = Conv(x, w)",
        integers(12, 16, 3, 3),
    ),
    "DequantizeLinear, Einsum": (
        "float[3, 16] x",
        'w = DequantizeLinear(W, one, zero)\n y = Einsum <equation = "bd,df->bf"> (x, w)',
        integers(16, 12),
    ),
    "MatMulNBits": (
        "float[3, 32] x",
        "y = com.microsoft.MatMulNBits <K = 32, N = 12, bits = 4, block_size = 32> (x, W, scale)",
        lambda rng: rng.integers(0, 256, (12, 1, 16)).astype(np.uint8),
    ),
    "DynamicQuantizeMatMul": (
        "float[3, 16] x",
        "y = com.microsoft.DynamicQuantizeMatMul(x, W, one, zero)",
        integers(16, 12),
    ),
    "MatMulIntegerToFloat": (
        "int8[3, 16] x",
        "y = com.microsoft.MatMulIntegerToFloat(x, W, one, one, zero, zero)",
        integers(16, 12),
    ),
    "QGemm": (
        "int8[3, 16] x",
        "y = com.microsoft.QGemm(x, one, zero, W, one, zero, none, one, zero)",
        integers(16, 12),
    ),
}


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_weights_are_left_alone(name: str, rng: np.random.Generator) -> None:
    x, nodes, weight = QUANTIZED[name]
    result_type = "int32" if "Integer(" in nodes else "int8" if "QLinear" in nodes else "float"
    result_type = "int8" if "QGemm" in nodes else result_type
    nodes = nodes.replace("none", '""')
    model = parse(
        f"""<ir_version: 8, opset_import: {OPSETS}>
        one ({x}) => ({result_type} y) {{ {nodes} }}""",
        {
            "W": weight(rng),
            "one": np.array(0.5, np.float32),
            "zero": np.array(0, np.int8),
            "scale": np.ones(12, np.float32),
        },
    )
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    model.graph.output[0].type.tensor_type.ClearField("shape")
    result = factored(model, rank=1, ops=("all",), check=True, samples=1)
    (layer,) = result.report.layers
    assert (layer.status, layer.weight) == ("dense", "W")
    assert "W is quantized" in layer.reason
    assert "factor the float model first, then quantize" in layer.reason
    (note,) = [note for note in result.report.notes if note.startswith("nothing was replaced")]
    advice = layer.reason.partition("; ")[2]
    assert advice.startswith("factor the float model first, then quantize")
    assert note == f"nothing was replaced: 1 of 1 linear maps have quantized weights; {advice}"
    after = as_proto(result.model)
    assert node_protos(after) == node_protos(model)
    assert after.graph.initializer == model.graph.initializer
    if name == "MatMulNBits":
        assert note.endswith(", or see requantize=True")
        assert layer.shape == (32, 12)
    if "Conv" not in name:
        assert result.report.totals.macs_before in (3 * 16 * 12, 3 * 32 * 12)
    assert not any("MACs not counted" in note for note in result.report.notes)


def test_linear_models_of_classical_machine_learning(rng: np.random.Generator) -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["": 17, "ai.onnx.ml": 3]>
        one (float[3, 4] x) => (int64[3] y, float[3, 3] scores) {
            y, scores = ai.onnx.ml.LinearClassifier <
                coefficients = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 1.0, 2.0, 3.0],
                intercepts = [0.0, 1.0, 2.0], classlabels_ints = [0, 1, 2]> (x)
        }"""
    )
    model.graph.node[0].name = "classifier"
    result = factored(model, rank=1)
    (layer,) = result.report.layers
    assert (layer.status, layer.form) == ("dense", "ml-linear")
    assert layer.weight == "classifier.coefficients"
    assert "its 12 coefficients are an attribute of the node" in layer.reason
    assert result.report.totals.linear_parameters_before == 0 == result.report.input.parameters
    assert node_protos(result.model) == node_protos(model)
