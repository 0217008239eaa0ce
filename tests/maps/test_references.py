"""Every form inside a function whose nodes take their attributes from the call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import onnx.parser
import pytest

from tests.helpers.form_cases import CONV, EINSUM, FUSED_MATMUL, GATHER, RECURRENT
from tests.helpers.functions import by_reference
from tests.helpers.models import (
    as_proto,
    assert_same,
    assert_valid,
    factored,
    known_rank,
    parse,
    uniform,
)
from tests.helpers.products import GEMM

RANK = 4
FORMS: Mapping[str, Any] = {
    **{f"conv {name}": case for name, case in CONV.items()},
    **{f"einsum {name}": case for name, case in EINSUM.items()},
    **{f"gather {name}": case for name, case in GATHER.items()},
    # Inside a function the number of axes is not known, which a batch of weights needs.
    **{f"fused {name}": case for name, case in FUSED_MATMUL.items() if "batch ()" in name},
    **{f"recurrent {name}": case for name, case in RECURRENT.items()},
}
WITH_ATTRIBUTES = [name for name, case in FORMS.items() if "<" in case.node]


@pytest.mark.parametrize("nested", [False, True], ids=["called", "nested"])
@pytest.mark.parametrize("name", WITH_ATTRIBUTES)
def test_a_form_with_attributes_by_reference(
    name: str, nested: bool, rng: np.random.Generator
) -> None:
    case = FORMS[name]
    model = case.model(rng)
    wrapped = by_reference(model, nested=nested)
    dims = {axis: 3 for axis in case.x if isinstance(axis, str)}
    result = factored(wrapped, rank=RANK, ops=case.arguments, dims=dims)
    (layer,) = [layer for layer in result.report.layers if layer.shape is not None]
    assert (layer.status, layer.form) == ("factored", case.form), layer.reason
    assert_valid(result.model)
    assert_same(model, result.model, case.fed(rng), in_reference=False, within=case.within)


@pytest.mark.parametrize("name", [name for name in GEMM if "no C" in name])
def test_gemm_with_attributes_by_reference(name: str, rng: np.random.Generator) -> None:
    case = GEMM[name]
    model = case.model(rng)
    result = factored(by_reference(model), rank=RANK)
    (layer,) = result.report.layers
    assert layer.status == "factored", layer.reason
    assert_same(model, result.model, case.feeds(rng), in_reference=False)


def differing(text: str) -> onnx.ModelProto:
    model = onnx.parser.parse_model(text)
    onnx.checker.check_model(model)
    return model


TWO_CALLS = """<ir_version: 10, opset_import: ["": 18, "own": 1]>
main (float[8, 8] x) => (float[8, 8] y) {
    h = own.linear <t = %d> (x)
    y = own.linear <t = %d> (h)
}
<domain: "own", opset_import: ["": 18]>
linear <t> (x) => (y) {
    W = Constant <value = float[8, 8] {%s}> ()
    %s
}"""
BODIES = {
    "gemm": "y = Gemm <transB: int = @t> (x, W)",
    "flatten": "V = Flatten <axis: int = @t> (W)  s = Shape (W)  U = Reshape (V, s)"
    "  y = MatMul (x, U)",
    "cast": "V = Cast <to: int = @t> (W)  F = Cast <to = 1> (V)  y = MatMul (x, F)",
}


@pytest.mark.parametrize("body", ["gemm", "cast"])
def test_calls_that_differ_leave_the_node(body: str, rng: np.random.Generator) -> None:
    numbers = ", ".join(f"{value:.4f}" for value in uniform((64,), rng))
    values = (0, 1) if body == "gemm" else (1, 10)
    model = differing(TWO_CALLS % (*values, numbers, BODIES[body]))
    result = factored(model, rank=2)
    (layer,) = result.report.layers
    assert layer.status == "dense"
    assert "depends on the call of the function around it" in layer.reason
    assert_same(model, result.model, {"x": uniform((8, 8), rng)}, in_reference=False)


def test_references_are_written_as_references(rng: np.random.Generator) -> None:
    numbers = ", ".join(f"{value:.4f}" for value in uniform((64,), rng))
    model = differing(TWO_CALLS % (1, 1, numbers, BODIES["gemm"]))
    result = factored(model, rank=8, exclude=["*"], simplify=False)
    (function,) = as_proto(result.model).functions
    (gemm,) = [node for node in function.node if node.op_type == "Gemm"]
    assert [(item.name, item.ref_attr_name) for item in gemm.attribute] == [("transB", "t")]


@pytest.mark.parametrize("opset", [17, 16])
def test_a_weight_that_a_call_gives_as_attribute(opset: int, rng: np.random.Generator) -> None:
    """The call is inlined, unless the function is of another opset."""
    model = onnx.parser.parse_model(
        f"""<ir_version: 9, opset_import: ["": 17, "own": 1]>
        main (float[n, 8] x) => (float[n, 8] y) {{ y = own.linear (x) }}
        <domain: "own", opset_import: ["": {opset}]>
        linear <w> (x) => (z) {{
            k = Constant <value: tensor = @w> ()
            z = MatMul (x, k)
        }}"""
    )
    given = model.graph.node[0].attribute.add()
    given.name, given.type = "w", onnx.AttributeProto.TENSOR
    given.t.CopyFrom(onnx.numpy_helper.from_array(known_rank(8, 8, 2, rng), "W"))
    onnx.checker.check_model(model)
    result = factored(model, rank=2)
    (layer,) = result.report.layers
    assert layer.shape == (8, 8)
    assert layer.status == ("factored" if opset == 17 else "dense")
    if opset != 17:
        assert "attribute 'w' of a call of function 'linear'" in layer.reason
    assert result.report.totals.parameters_before == 64
    assert_same(model, result.model, {"x": uniform((3, 8), rng)}, in_reference=False)


def test_a_weight_of_quantization_aware_training(rng: np.random.Generator) -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["": 17]>
        trained (float[n, 8] x) => (float[n, 8] y) {
            q = QuantizeLinear (W, scale, zero)
            d = DequantizeLinear (q, scale, zero)
            y = MatMul (x, d)
        }""",
        {
            "W": uniform((8, 8), rng),
            "scale": np.asarray(0.01, np.float32),
            "zero": np.asarray(0, np.int8),
        },
    )
    result = factored(model, rank=2)
    (layer,) = result.report.layers
    assert (layer.status, layer.weight, layer.shape) == ("dense", "W", (8, 8))
    assert "quantization-aware" in layer.reason
