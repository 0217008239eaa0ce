"""Products with weights in blocks as one node, run with and without optimizations."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_lowrank.graph.spool import Spool
from onnx_lowrank.maps.format_writer import FormatWriter
from onnx_lowrank.maps.formats import Format
from onnx_lowrank.maps.nbits import in_one_node
from onnx_lowrank.numerics.blocks import Bits, round_blocks
from tests.helpers.models import parse, run_ort

NODES = {
    "matmul": ("x", "y = MatMul (x, W)"),
    "gemm": ("x", "y = Gemm (x, W, c)"),
    "transposed": ("x", "y = Gemm <transB = 1> (x, V, c)"),
    "without C": ("x", "y = Gemm <beta = 2.0> (x, W)"),
}


def model_of(text: str, constants: dict[str, np.ndarray], opset: int, rows: str) -> ir.Model:
    proto = parse(
        f"""<ir_version: 7, opset_import: ["" : {opset}]>
        g (float[{rows}] x) => (float y) {{ [it] {text} }}""",
        {name: own for name, own in constants.items() if f", {name}" in text},
    )
    proto = onnx.shape_inference.infer_shapes(proto)
    return ir.from_proto(proto)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", NODES)
def test_a_product(
    kind: str, bits: Bits, block: int, symmetric: bool, rng: np.random.Generator
) -> None:
    m, n = 100, 48  # the last block is not full
    exact = (rng.standard_normal((m, n)) / 10).astype(np.float32)
    found = round_blocks(exact, bits, block, symmetric=symmetric)
    matrix, bias = found.values(), rng.standard_normal(n).astype(np.float32)
    constants = {"W": matrix, "V": matrix.T.copy(), "c": bias}
    text = NODES[kind][1]
    model = model_of(text, constants, 9, f"N,{m}")
    node = next(node for node in model.graph if node.name == "it")
    assert in_one_node([node], n)
    form = Format(bits, block, fused=True)
    with Spool() as spool:
        FormatWriter(model, spool).put([node], found, form)
        assert model.opset_imports == {"": 9, "com.microsoft": 1}
        x = rng.uniform(-1, 1, (7, m)).astype(np.float32)
        wanted = x @ matrix + (bias if ", c" in text else 0.0)
        for optimized in (True, False):
            # The kernel rounds what it multiplies to 8 bits.
            got = run_ort(model, {"x": x}, optimize=optimized)["y"]
            np.testing.assert_allclose(got, wanted, rtol=0, atol=0.03)
        stored = sum(
            value.const_value.nbytes
            for name, value in model.graph.initializers.items()
            if value.const_value is not None and name != "c"
        )
    assert stored == form.stored(found)
    if symmetric and block <= m:
        assert stored == form.bytes(m, n)
    assert (node.name, node.op_type) == ("it", "MatMulNBits")
    assert [value.name for value in model.graph.outputs] == ["y"]


@pytest.mark.parametrize("rows", ["64", "3,64", "2,3,64", "2,0,64"])
def test_a_matmul_of_any_shape(rows: str, rng: np.random.Generator) -> None:
    found = round_blocks(rng.standard_normal((64, 24)).astype(np.float32), 8, 64)
    model = model_of("y = MatMul (x, W)", {"W": found.values()}, 13, rows)
    with Spool() as spool:
        FormatWriter(model, spool).put([model.graph[0]], found, Format(8, 64, fused=True))
        x = rng.uniform(-1, 1, [int(n) for n in rows.split(",")]).astype(np.float32)
        got = run_ort(model, {"x": x})["y"]
    wanted = x @ found.values()
    assert got.shape == wanted.shape
    np.testing.assert_allclose(got, wanted, rtol=0, atol=0.3)


@pytest.mark.parametrize(
    "text",
    [
        "y = Gemm <alpha = 2.0> (x, W)",
        "y = Gemm <transA = 1> (x, W)",
        "y = Gemm <beta = 2.0> (x, W, c)",
        "y = Gemm (x, W, d)",
        "y = Gemm (x, W, e)",
    ],
)
def test_what_is_no_such_node(text: str) -> None:
    zeros = {"W": (48, 48), "c": (48,), "d": (48, 48), "e": (1,)}
    constants = {name: np.zeros(shape, np.float32) for name, shape in zeros.items()}
    model = model_of(text, constants, 13, "48,48")
    assert not in_one_node([model.graph[0]], 48)
