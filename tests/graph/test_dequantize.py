"""Maps of integers as maps of floats: the outputs stay but for the rounding of activations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_lowrank.graph.dequantize import dequantize, holds_integers
from onnx_lowrank.graph.opset import raise_opset
from onnx_lowrank.graph.spool import Spool
from onnx_lowrank.graph.walk import tensors
from onnx_lowrank.numerics.arrays import Array, Feed
from onnx_lowrank.runtime.session import open_session, run
from tests.helpers.models import parse
from tests.helpers.quantized import WAYS, float_model, images, quantized

HEAD = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>'


def outputs(proto: onnx.ModelProto, feed: Feed) -> Feed:
    return run(open_session(proto.SerializeToString()), feed, "a model")


def relative(got: Array, wanted: Array) -> float:
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_quantizing(way: str, rng: np.random.Generator, tmp_path: Path) -> None:
    feeds = images(rng)
    before = onnx.load(quantized(float_model(rng), way, feeds, tmp_path))
    model = ir.from_proto(before)
    found = dequantize(model, Spool())
    after = ir.to_proto(model)
    onnx.checker.check_model(after, full_check=True)
    maps = 1 if way.startswith("nbits") else 3
    assert len(found.nodes) == len(found.bits) == len(found.bytes) == maps
    assert set(found.bits.values()) == {4 if way == "nbits" else 8}
    assert not found.left
    kinds = [node.op_type for node in model.graph]
    assert not {kind for kind in kinds if "Integer" in kind or "NBits" in kind}
    assert "DynamicQuantizeLinear" not in kinds
    assert kinds.count("Conv") == 1
    for name, size in found.bytes.items():
        floats = model.graph.initializers[name].const_value
        assert floats is not None
        assert floats.nbytes * found.bits[name] / 32 <= size < 0.36 * floats.nbytes
    # As near to what the quantized model gives as its rounding of activations allows.
    wanted, got = outputs(before, feeds[0])["y"], outputs(after, feeds[0])["y"]
    exact = way.startswith("nbits") or way == "shifted"
    assert 0.0 <= relative(got, wanted) < (1e-5 if exact else 0.05)
    if way.startswith("nbits"):
        return
    # Nothing of the integers is left, and the float model is nearer than the quantized one.
    assert all(tensor.dtype is not ir.DataType.INT8 or tensor.size < 2 for tensor in tensors(model))
    plain = outputs(float_model(np.random.default_rng(0)), feeds[0])["y"]
    assert plain.shape == got.shape


def test_what_a_pair_cuts_off_stays_cut_off(rng: np.random.Generator) -> None:
    """A quantizer leaves out a Relu where a range begins at 0."""
    proto = parse(
        f"""{HEAD} g (float[4,24] x) => (float[4,16] y) {{
            w = DequantizeLinear <axis=1> (q, sw)
            [map] h = MatMul (x, w)
            a = QuantizeLinear (h, s, z)
            b = DequantizeLinear (a, s, z)
            [second] y = MatMul (b, w2)
        }}""",
        {
            "q": rng.integers(-127, 128, (24, 16)).astype(np.int8),
            "sw": np.full(16, 0.01, np.float32),
            "s": np.array(0.02, np.float32),
            "z": np.array(-128, np.int8),
            "w2": np.eye(16, dtype=np.float32),
        },
    )
    model = ir.from_proto(proto)
    found = dequantize(model, Spool())
    assert found.nodes == ["map"]
    assert [node.op_type for node in model.graph] == ["MatMul", "Clip", "MatMul"]
    x = rng.standard_normal((4, 24)).astype(np.float32)
    before, after = outputs(proto, {"x": x})["y"], outputs(ir.to_proto(model), {"x": x})["y"]
    assert after.min() == 0.0
    assert after.max() == pytest.approx(255 * 0.02)
    assert 0.0 < np.abs(after - before).max() <= 0.0101  # half a step


@pytest.mark.parametrize(
    ("attributes", "zero", "low"),
    [("", "", 0.0), ("<output_dtype=3>", "", -128.0), ("", "z", -128.0)],
)
def test_the_range_is_that_of_the_type(attributes: str, zero: str, low: float) -> None:
    """Without a zero point a QuantizeLinear says in an attribute whether it has a sign."""
    last = f", {zero}" if zero else ""
    known: dict[str, Array] = {"s": np.array(1.0, np.float32), "z": np.array(0, np.int8)}
    proto = parse(
        f"{HEAD} g (float[1,4] x) => (float[1,4] y) "
        f"{{ a = QuantizeLinear {attributes} (x, s{last})\n y = DequantizeLinear (a, s{last}) }}",
        {name: array for name, array in known.items() if name == "s" or zero},
    )
    model = ir.from_proto(proto)
    dequantize(model, Spool())
    assert [node.op_type for node in model.graph] == ["Clip"]
    feed: Feed = {"x": np.array([[-900.0, -7.0, 7.0, 900.0]], np.float32)}
    got = outputs(ir.to_proto(model), feed)["y"]
    np.testing.assert_array_equal(got, outputs(proto, feed)["y"])
    assert got.min() == low


def test_integers_that_are_read_with_two_scales(rng: np.random.Generator) -> None:
    proto = parse(
        f"""{HEAD} g (float[4,8] x) => (float[4,8] y) {{
            a = DequantizeLinear <axis=1> (q, s)
            b = DequantizeLinear <axis=1> (q, t)
            c = DequantizeLinear <axis=0> (q, t)
            d = DequantizeLinear <axis=0> (q, t)
            e = MatMul (x, a)
            f = MatMul (e, b)
            h = MatMul (f, c)
            y = MatMul (h, d)
        }}""",
        {
            "q": rng.integers(-9, 9, (8, 8)).astype(np.int8),
            "s": rng.random(8).astype(np.float32),
            "t": rng.random(8).astype(np.float32),
        },
    )
    model = ir.from_proto(proto)
    found = dequantize(model, Spool())
    assert len(found.nodes) == 4
    assert len(found.bits) == 3  # the last two are one
    feed: Feed = {"x": rng.standard_normal((4, 8)).astype(np.float32)}
    got, wanted = outputs(ir.to_proto(model), feed)["y"], outputs(proto, feed)["y"]
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_blocks_and_zero_points(rng: np.random.Generator) -> None:
    proto = parse(
        f"{HEAD} g (float[4,24] x) => (float[4,16] y) "
        "{ w = DequantizeLinear <axis=0, block_size=16> (q, s, z)\n y = MatMul (x, w) }",
        {
            "q": rng.integers(0, 256, (24, 16)).astype(np.uint8),
            "s": (rng.random((2, 16)) / 100).astype(np.float32),
            "z": rng.integers(100, 150, (2, 16)).astype(np.uint8),
        },
    )
    model = ir.from_proto(proto)
    dequantize(model, Spool())
    assert [node.op_type for node in model.graph] == ["MatMul"]
    x = rng.standard_normal((4, 24)).astype(np.float32)
    evaluated = onnx.reference.ReferenceEvaluator(proto).run(["y"], {"x": x})
    assert isinstance(evaluated, list)
    floats = np.asarray(evaluated[0])
    np.testing.assert_allclose(outputs(ir.to_proto(model), {"x": x})["y"], floats, rtol=1e-4)


@pytest.mark.parametrize(
    ("body", "kind", "reason"),
    [
        (
            "a, s, z = DynamicQuantizeLinear (x)\n b = ConvInteger (a, q, z)\n y = Cast <to=1> (b)",
            (4, 4, 1, 1),
            "its sums not scaled",
        ),
        ("a = Cast <to=2> (x)\n b = ConvInteger (a, q)\n y = Cast <to=1> (b)", (4, 4, 1, 1), ""),
        (
            "a, s, z = DynamicQuantizeLinear (x)\n b = MatMulInteger (a, q)\n c = Cast <to=1> (b)\n"
            " d = Mul (s, w)\n y = Mul (c, d)",
            (3, 3),
            "another zero point",
        ),
        (
            "a, s, z = DynamicQuantizeLinear (x)\n"
            " y = com.microsoft.MatMulIntegerToFloat (a, q, s, w)",
            (3, 3),
            "another scale or zero point",
        ),
    ],
)
def test_what_stays(
    body: str, kind: tuple[int, ...], reason: str, rng: np.random.Generator
) -> None:
    known: dict[str, Array] = {
        "q": rng.integers(0, 9, kind).astype(np.uint8),
        "w": np.array(0.1, np.float32),
    }
    proto = parse(
        f"{HEAD} g (float[1,4,3,3] x) => (float[1,4,3,3] y) {{ {body} }}",
        {name: array for name, array in known.items() if f" {name})" in body or name == "q"},
    )
    model = ir.from_proto(proto)
    found = dequantize(model, Spool())
    assert not found.bits
    (why,) = found.left.values()
    assert reason in why
    assert ir.to_proto(model) == ir.to_proto(ir.from_proto(proto))


def test_others_keep_their_pairs(rng: np.random.Generator) -> None:
    """A weight that stays as integers, and what stands around its node."""
    proto = parse(
        f"""{HEAD} g (float[1,4,3,3] x) => (float[1,4,3,3] y) {{
            w = DequantizeLinear <axis=0> (q, sw)
            a = QuantizeLinear (x, s, z)
            b = DequantizeLinear (a, s, z)
            c = ConvTranspose <group=4> (b, w)
            d = QuantizeLinear (c, s, z)
            y = DequantizeLinear (d, s, z)
        }}""",
        {
            "q": rng.integers(-9, 9, (4, 1, 1, 1)).astype(np.int8),
            "sw": np.full(4, 0.01, np.float32),
            "s": np.array(0.02, np.float32),
            "z": np.array(3, np.int8),
        },
    )
    model = ir.from_proto(proto)
    assert not dequantize(model, Spool()).bits
    assert ir.to_proto(model) == ir.to_proto(ir.from_proto(proto))


FUSED = {
    "with a bias": "y = com.microsoft.DynamicQuantizeMatMul (x, q, s, z, b)",
    "without": "y = com.microsoft.DynamicQuantizeMatMul (x, q, s, z)",
    "to floats": (
        "a, t, u = DynamicQuantizeLinear (x)\n"
        " y = com.microsoft.MatMulIntegerToFloat (a, q, t, s, u, z, b)"
    ),
    "scales the other way round": (
        "a, t, u = DynamicQuantizeLinear (x)\n c = MatMulInteger (a, q, u, z)\n"
        " d = Cast <to=1> (c)\n e = Mul (s, t)\n y = Mul (e, d)"
    ),
}


@pytest.mark.parametrize("name", FUSED)
def test_fused_operators(name: str, rng: np.random.Generator) -> None:
    known: dict[str, Array] = {
        "q": rng.integers(0, 256, (40, 24)).astype(np.uint8),
        "s": (rng.random(24) / 500).astype(np.float32),
        "z": rng.integers(100, 150, 24).astype(np.uint8),
        "b": rng.standard_normal(24).astype(np.float32),
    }
    body = FUSED[name]
    if ", b)" not in body:
        del known["b"]
    proto = parse(f"{HEAD} g (float[5,40] x) => (float[5,24] y) {{ {body} }}", known)
    model = ir.from_proto(proto)
    found = dequantize(model, Spool())
    assert list(found.bits.values()) == [8]
    kinds = [node.op_type for node in model.graph]
    assert kinds == (["MatMul", "Add"] if "b" in known else ["MatMul"])
    x = rng.standard_normal((5, 40)).astype(np.float32)
    codes, zeros = known["q"].astype(np.float32), known["z"].astype(np.float32)
    floats = (codes - zeros) * known["s"]
    got = outputs(ir.to_proto(model), {"x": x})["y"]
    np.testing.assert_allclose(got, x @ floats + known.get("b", 0.0), rtol=1e-4, atol=1e-4)
    assert relative(got, outputs(proto, {"x": x})["y"]) < 0.02


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_a_bias_is_scaled_as_the_product(alpha: float, rng: np.random.Generator) -> None:
    proto = parse(
        f"""{HEAD} g (float[6,8] x) => (float[6,5] y) {{
            a = QuantizeLinear (x, s, z)
            y = com.microsoft.QGemm <alpha={alpha}, transB=1> (a, s, z, q, t, u, b)
        }}""",
        {
            "s": np.array(0.03, np.float32),
            "z": np.array(3, np.int8),
            "q": rng.integers(-127, 128, (5, 8)).astype(np.int8),
            "t": np.array(0.01, np.float32),
            "u": np.array(0, np.int8),
            "b": rng.integers(-9000, 9000, 5).astype(np.int32),
        },
    )
    model = ir.from_proto(proto)
    assert dequantize(model, Spool()).bits
    feed: Feed = {"x": rng.standard_normal((6, 8)).astype(np.float32)}
    got, wanted = outputs(ir.to_proto(model), feed)["y"], outputs(proto, feed)["y"]
    assert relative(got, wanted) < 0.05


def test_a_weight_that_is_asked_for_its_sizes(rng: np.random.Generator) -> None:
    """As tf2onnx writes an einsum: the matrix is reshaped to what is computed of its own shape."""
    known: dict[str, Array] = {
        "q": rng.integers(-127, 128, (2, 3, 8)).astype(np.int8),
        "s": np.array(0.01, np.float32),
        "last": np.array([2], np.int64),
        "rest": np.array([-1], np.int64),
    }
    proto = parse(
        f"""{HEAD} g (float[5,6] x) => (float[5,8] y) {{
            w = DequantizeLinear (q, s)
            a = Shape (w)
            b = Gather (a, last)
            c = Concat <axis=0> (rest, b)
            m = Reshape (w, c)
            [map] y = Gemm (x, m)
        }}""",
        known,
    )
    model = ir.from_proto(proto)
    found = dequantize(model, Spool())
    assert list(found.bits.values()) == [8]
    assert found.nodes == ["map"]
    assert [node.op_type for node in model.graph] == ["Reshape", "Gemm"]
    feed: Feed = {"x": rng.standard_normal((5, 6)).astype(np.float32)}
    got, wanted = outputs(ir.to_proto(model), feed)["y"], outputs(proto, feed)["y"]
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    (target,) = (node for node in model.graph if node.op_type == "Reshape")
    assert target.inputs[1] is not None
    assert target.inputs[1].is_initializer()


def test_a_weight_that_something_else_reads_says_so(rng: np.random.Generator) -> None:
    proto = parse(
        f"""{HEAD} g (float[5,6] x) => (float[5,8] y, float[6,8] z) {{
            w = DequantizeLinear (q, s)
            [map] y = MatMul (x, w)
            z = Relu (w)
        }}""",
        {
            "q": rng.integers(-127, 128, (6, 8)).astype(np.int8),
            "s": np.array(0.01, np.float32),
        },
    )
    model = ir.from_proto(proto)
    found = dequantize(model, Spool())
    assert list(found.left.values()) == ["something else than linear maps reads it too"]
    assert ir.to_proto(model) == ir.to_proto(ir.from_proto(proto))


ODD = {
    "has scales of rows": (
        "float[4,4] x",
        "a, s, z = DynamicQuantizeLinear (x)\n b = MatMulInteger (a, q, z)\n c = Cast <to=1> (b)\n"
        " d = Mul (s, w)\n y = Mul (c, d)",
        (4, 4),
        "its scales are not those of its outputs",
    ),
    "has channels last": (
        "float[1,3,3,4] x",
        "a = QuantizeLinear (x, s, z)\n"
        " y = com.microsoft.QLinearConv <channels_last=1> (a, s, z, q, s, o, s, z)",
        (4, 4, 1, 1),
        "its channels are the last axis",
    ),
    "is of half precision": (
        "float16[1,4,3,3] x",
        "c = Cast <to=10> (q)\n v = Mul (c, h)\n y = Conv (x, v)",
        (4, 4, 1, 1),
        "it is made float16; float32 is read",
    ),
    "is added to a product of constants": (
        "float[1,4,3,3] x",
        "c = Cast <to=1> (q)\n e = Mul (c, s)\n p = Sub (w, w)\n f = Add (e, p)\n y = Conv (x, f)",
        (4, 4, 1, 1),
        "what is added to it is computed",
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_what_has_no_plain_float_map_stays(name: str, rng: np.random.Generator) -> None:
    given, body, shape, reason = ODD[name]
    known: dict[str, Array] = {
        "q": rng.integers(-9, 9, shape).astype(np.int8),
        "w": rng.random((4, 1)).astype(np.float32),
        "h": rng.random((4, 1, 1, 1)).astype(np.float16),
        "s": np.array(0.1, np.float32),
        "o": np.array(0, np.int8),
        "z": np.array(3, np.uint8),
    }
    made = body.split("=")[0]
    used = {k: v for k, v in known.items() if f"{k}," in body or f"{k})" in body}
    proto = parse(
        f"{HEAD} g ({given}) => (y) {{ {body} }}",
        {k: v for k, v in used.items() if f" {k}" not in made and f", {k}" not in made},
    )
    model = ir.from_proto(proto)
    found = dequantize(model, Spool())
    assert not found.bits
    assert list(found.left.values()) == [reason]
    assert ir.to_proto(model) == ir.to_proto(ir.from_proto(proto))


def test_products_of_what_is_computed_are_no_maps() -> None:
    proto = parse(
        f"""{HEAD} g (float[4,4] x) => (float[4,4] y) {{
            a, s, z = DynamicQuantizeLinear (x)
            b = MatMulInteger (a, a, z, z)
            c = Cast <to=1> (b)
            d = Mul (s, s)
            y = Mul (c, d)
        }}""",
        {},
    )
    model = ir.from_proto(proto)
    found = dequantize(model, Spool())
    assert not found.left
    assert ir.to_proto(model) == ir.to_proto(ir.from_proto(proto))


def test_a_bias_added_to_what_is_computed_is_no_weight(rng: np.random.Generator) -> None:
    proto = parse(
        f"""{HEAD} g (float[4,4] x) => (float[4,4] y) {{
            c = Cast <to=1> (x)
            d = Mul (c, s)
            y = Add (d, b)
        }}""",
        {"s": np.array(0.1, np.float32), "b": np.ones(4, np.float32)},
    )
    model = ir.from_proto(proto)
    assert not holds_integers(model)
    assert not dequantize(model, Spool()).left
    assert ir.to_proto(model) == ir.to_proto(ir.from_proto(proto))


def test_old_operators_are_raised_first(rng: np.random.Generator, tmp_path: Path) -> None:
    plain = float_model(rng)
    plain.opset_import[0].version = 11
    feeds = images(rng, 4)
    before = onnx.load(quantized(plain, "dynamic", feeds, tmp_path))
    model = ir.from_proto(before)
    raise_opset(model, 13)
    assert len(dequantize(model, Spool()).nodes) == 3
    wanted = outputs(before, feeds[0])["y"]
    assert relative(outputs(ir.to_proto(model), feeds[0])["y"], wanted) < 0.05
