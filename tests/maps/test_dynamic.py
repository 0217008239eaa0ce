"""Products of integers whose inputs are quantized in every run, judged by two runtimes."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_lowrank.graph.spool import Spool
from onnx_lowrank.maps.dynamic import rounds_inputs
from onnx_lowrank.maps.format_writer import FormatWriter
from onnx_lowrank.maps.formats import Format
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.blocks import Blocks, round_blocks
from tests.helpers.models import parse, run_ort, run_reference

SIGNS = [True, False]


def codes(rng: np.random.Generator, m: int, n: int) -> Blocks:
    return round_blocks((rng.standard_normal((m, n)) / np.sqrt(m)).astype(np.float32), 8, m)


def rounded(x: Array) -> Array:
    """An input as DynamicQuantizeLinear has it."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale = (high - low) / 255.0
    zero = np.clip(np.rint(-low / scale), 0, 255)
    return np.asarray((np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale, np.float32)


NODES = {
    "matmul": ("x", "y = MatMul (x, W)"),
    "gemm": ("x", "y = Gemm (x, W, c)"),
    "transposed": ("x", "y = Gemm <transB = 1> (x, V, c)"),
    "without C": ("x", "y = Gemm <beta = 2.0> (x, W)"),
    "constant node": ("x", "y = MatMul (x, K)"),
}


@pytest.mark.parametrize("opset", [11, 21])
@pytest.mark.parametrize("signed", SIGNS)
@pytest.mark.parametrize("kind", NODES)
def test_a_product(kind: str, signed: bool, opset: int, rng: np.random.Generator) -> None:
    found = codes(rng, 64, 48)
    matrix, bias = found.values(), rng.standard_normal(48).astype(np.float32)
    constants = {"W": matrix, "V": matrix.T.copy(), "c": bias}
    text = NODES[kind][1]
    read = {name: own for name, own in constants.items() if f", {name}" in text}
    proto = parse(
        f"""<ir_version: 6, opset_import: ["" : {opset}]>
        g (float[N,64] x) => (float[N,48] y) {{ [it] {text} }}""",
        read,
    )
    if "K" in text:
        tensor = onnx.numpy_helper.from_array(matrix, "K")
        proto.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["K"], value=tensor))
    model = ir.from_proto(proto)
    node = next(node for node in model.graph if node.name == "it")
    assert rounds_inputs([node])
    form = Format(8, 0, activations="dynamic", signed=signed)
    with Spool() as spool:
        FormatWriter(model, spool).put([node], found, form)
        onnx.checker.check_model(ir.to_proto(model), full_check=True)
        for rows in (1, 7):
            # Small enough for kernels that saturate.
            x = rng.uniform(-1, 3, (rows, 64)).astype(np.float32)
            wanted = rounded(x) @ matrix + (bias if "c" in read else 0.0)
            runs = [run_reference] if signed else [run_reference, run_ort]
            for run in runs:
                np.testing.assert_allclose(run(model, {"x": x})["y"], wanted, rtol=0, atol=2e-3)
    stored = [v.const_value for v in model.graph.initializers.values()]
    stored += [n.attributes["value"].as_tensor() for n in model.graph if n.op_type == "Constant"]
    kinds = {tensor.dtype for tensor in stored if tensor is not None and tensor.size == 64 * 48}
    assert kinds == {ir.DataType.INT8 if signed else ir.DataType.UINT8}
    assert node.name == "it"
    assert [value.name for value in model.graph.outputs] == ["y"]


@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 3, 64), (2, 0, 64)])
def test_inputs_of_any_rank(shape: tuple[int, ...], rng: np.random.Generator) -> None:
    found, axes = codes(rng, 64, 16), ",".join(map(str, shape))
    wide = ",".join(map(str, (*shape[:-1], 16)))
    model = ir.from_proto(
        parse(
            f"""<ir_version: 8, opset_import: ["" : 17]>
            g (float[{axes}] x) => (float[{wide}] y) {{ y = MatMul (x, W) }}""",
            {"W": found.values()},
        )
    )
    with Spool() as spool:
        form = Format(8, 0, activations="dynamic", signed=False)
        FormatWriter(model, spool).put([model.graph[0]], found, form)
        x = rng.standard_normal(shape).astype(np.float32)
        got = run_ort(model, {"x": x})["y"]
        assert got.shape == (*shape[:-1], 16)
        if x.size:
            np.testing.assert_allclose(got, rounded(x) @ found.values(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("signed", SIGNS)
def test_readers_of_one_value_share_its_integers(signed: bool, rng: np.random.Generator) -> None:
    parts = [codes(rng, 32, n) for n in (16, 24)]
    model = ir.from_proto(
        parse(
            """<ir_version: 8, opset_import: ["" : 17]>
            g (float[N,32] x) => (float[N,24] z, float[N,16] y) {
                [second] z = MatMul (x, V)
                [first] y = MatMul (x, W)
            }""",
            {"W": parts[0].values(), "V": parts[1].values()},
        )
    )
    by_name = {node.name: node for node in model.graph}
    with Spool() as spool:
        writer = FormatWriter(model, spool)
        for name, part in zip(("first", "second"), parts, strict=True):  # not in their order
            form = Format(8, 0, activations="dynamic", signed=signed)
            writer.put([by_name[name]], part, form)
        onnx.checker.check_model(ir.to_proto(model), full_check=True)
        operators = [node.op_type for node in model.graph]
        assert operators.count("DynamicQuantizeLinear") == 1
        assert operators.count("MatMulInteger") == 2
        x = rng.standard_normal((5, 32)).astype(np.float32)
        found = run_reference(model, {"x": x})
        for name, part in zip("yz", parts, strict=True):
            np.testing.assert_allclose(found[name], rounded(x) @ part.values(), rtol=0, atol=1e-4)
    assert len(model.graph.initializers) == 4 + (not signed)


@pytest.mark.parametrize(
    "text", ["Gemm <alpha = 0.5> (x, W)", "Gemm <transA = 1> (x, W)", "Gemm <beta = 2.0> (x, W, c)"]
)
def test_products_that_scale_or_transpose_do_not_round_their_inputs(text: str) -> None:
    ones = {"W": np.ones((4, 4), np.float32), "c": np.ones(4, np.float32)}
    model = parse(
        f"""<ir_version: 8, opset_import: ["" : 17]>
        g (float[4,4] x) => (float[4,4] y) {{ y = {text} }}""",
        {name: own for name, own in ones.items() if f", {name}" in text},
    )
    assert not rounds_inputs([ir.from_proto(model).graph[0]])
