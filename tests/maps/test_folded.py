"""Weights that runtimes make floats of: every form reads what the codes stand for."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import onnxruntime as ort
import pytest

from onnx_lowrank.graph.constant import Unusable
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.graph.opset import raise_opset
from onnx_lowrank.graph.spool import Spool
from onnx_lowrank.graph.walk import stored_bytes, tensors
from onnx_lowrank.maps.find import Finding, Group, Refused, find
from onnx_lowrank.maps.folded import FOLDED
from onnx_lowrank.maps.format_writer import FormatWriter
from onnx_lowrank.maps.formats import OPSET, folded, no_format
from onnx_lowrank.maps.forms import all_forms
from onnx_lowrank.numerics.arrays import Array, Feed
from onnx_lowrank.numerics.blocks import Bits, round_blocks
from onnx_lowrank.runtime.session import open_session, run
from tests.helpers.models import parse

HEAD = '<ir_version: 8, opset_import: ["" : 17]>'
# Form -> the body, the shape of its weight W, and the shape of x.
BODIES: Mapping[str, tuple[str, tuple[int, ...], tuple[int, ...]]] = {
    "conv": ("y = Conv <pads=[1,1,1,1]> (x, W)", (40, 6, 3, 3), (2, 6, 5, 4)),
    "conv of a line": ("y = Conv (x, W)", (40, 33, 1), (2, 33, 5)),
    "conv of groups": ("y = Conv <group=3> (x, W)", (48, 6, 3, 3), (2, 18, 5, 4)),
    "conv of each channel": ("y = Conv <group=80> (x, W)", (80, 1, 3, 3), (2, 80, 5, 4)),
    "lstm": ("y, h, c = LSTM <hidden_size=8> (x, W, R)", (1, 32, 48), (3, 2, 48)),
    "gru": ("y, h = GRU <hidden_size=8> (x, W, R)", (1, 24, 48), (3, 2, 48)),
    "rnn": ("y, h = RNN <hidden_size=40> (x, W, R)", (1, 40, 48), (3, 2, 48)),
    "einsum": ('y = Einsum <equation="bsd,dhk->bshk"> (x, W)', (48, 5, 8), (2, 3, 48)),
    "turned einsum": ('y = Einsum <equation="bsd,hdk->bshk"> (x, W)', (5, 48, 8), (2, 3, 48)),
    "matmul": ("y = MatMul (W, x)", (40, 50), (50, 3)),
    "gemm": ("y = Gemm (W, x)", (40, 50), (50, 3)),
    "turned gemm": ("y = Gemm <transA=1> (W, x)", (50, 40), (50, 3)),
}


def model(name: str, rng: np.random.Generator, *, nodes: bool = False) -> onnx.ModelProto:
    body, shape, x = BODIES[name]
    weights = {"W": (rng.standard_normal(shape) / 4).astype(np.float32)}
    if "R" in body:
        hidden = shape[1] // {"lstm": 4, "gru": 3, "rnn": 1}[name]
        weights["R"] = (rng.standard_normal((1, shape[1], hidden)) / 4).astype(np.float32)
    sizes = ",".join(map(str, x))
    proto = parse(f"{HEAD} g (float[{sizes}] x) => (float y) {{ {body} }}", weights)
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    if nodes:
        for tensor in proto.graph.initializer:
            node = onnx.helper.make_node("Constant", [], [tensor.name], value=tensor)
            proto.graph.node.insert(0, node)
        del proto.graph.initializer[:]
    return onnx.shape_inference.infer_shapes(proto)


def found_in(model: ir.Model) -> Finding:
    return find(model, Constants(model), all_forms())


def first(model: ir.Model) -> Group:
    found = found_in(model)
    groups = (*found.groups, *found.off)
    return next(group for group in groups if group.members[0].site.form.name in FOLDED)


def rounded(
    model: ir.Model, bits: Bits, block: int, *, symmetric: bool = True
) -> tuple[Array, Array]:
    """Round the first map of a model; its matrix, and what the codes stand for."""
    group = first(model)
    assert no_format(group, model) is None
    raise_opset(model, OPSET)
    nodes = [member.site.node for member in group.members]
    with Spool() as spool:
        writer = FormatWriter(model, spool)
        matrix = np.array(writer.weight(nodes[0]).numpy())
        codes = round_blocks(matrix, bits, block, symmetric=symmetric)
        writer.put(nodes, codes)
    return matrix, codes.values()


def referred(proto: onnx.ModelProto, feed: Feed) -> Array:
    found = onnx.reference.ReferenceEvaluator(proto).run(["y"], dict(feed))
    assert isinstance(found, list)
    return np.asarray(found[0])


def outputs(proto: onnx.ModelProto, feed: Feed) -> Array:
    return run(open_session(proto.SerializeToString()), feed, "a model")["y"]


@pytest.mark.parametrize("nodes", [False, True])
@pytest.mark.parametrize(
    ("bits", "block", "symmetric"),
    [
        *((8, 16, True), (8, 32, True), (8, 1024, True), (8, 32, False), (4, 32, True)),
        *((4, 16, False), (4, 32, False), (4, 1024, False)),
    ],
)
@pytest.mark.parametrize("name", BODIES)
def test_nodes_read_what_codes_stand_for(
    name: str, bits: Bits, block: int, symmetric: bool, nodes: bool, rng: np.random.Generator
) -> None:
    proto = model(name, rng, nodes=nodes)
    changed = ir.from_proto(proto)
    matrix, values = rounded(changed, bits, block, symmetric=symmetric)
    result = ir.to_proto(changed)
    onnx.checker.check_model(result, full_check=True)
    # The same model with the values as floats.
    plain = ir.from_proto(proto)
    group = first(plain)
    site = group.members[0].site
    floats = site.matrix.layout.inverse().apply(values[None])
    value = site.operand.root
    if nodes:
        producer = value.producer()
        assert producer is not None
        producer.attributes["value"] = ir.AttrTensor("value", ir.Tensor(floats))
    else:
        value.const_value = ir.Tensor(floats, name=value.name)
    x = rng.standard_normal(BODIES[name][2]).astype(np.float32)
    expected = outputs(ir.to_proto(plain), {"x": x})
    np.testing.assert_allclose(outputs(result, {"x": x}), expected, rtol=1e-4, atol=1e-5)
    assert np.abs(values - matrix).max() > 0.0
    if bits == 8 and not nodes:
        again = referred(result, {"x": x})
        np.testing.assert_allclose(again, expected, rtol=1e-3, atol=1e-4)
    # Nothing of the floats is left, and what is there is recognized.
    assert stored_bytes(changed) < stored_bytes(plain) - matrix.nbytes / 2
    entry = next(e for e in found_in(changed).entries if e.node.op_type == site.node.op_type)
    assert isinstance(entry, Refused)
    assert "is quantized (Cast and Mul)" in entry.refusal.reason


@pytest.mark.parametrize(("bits", "symmetric"), [(8, True), (4, True), (4, False)])
def test_a_runtime_makes_floats_while_it_loads(
    bits: Bits, symmetric: bool, rng: np.random.Generator, tmp_path: object
) -> None:
    changed = ir.from_proto(model("conv", rng))
    rounded(changed, bits, 16, symmetric=symmetric)
    options = ort.SessionOptions()
    options.optimized_model_filepath = f"{tmp_path}/optimized.onnx"
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    ort.InferenceSession(
        ir.to_proto(changed).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    kinds = {node.op_type for node in onnx.load(f"{tmp_path}/optimized.onnx").graph.node}
    assert kinds == {"Conv"}


def test_one_weight_of_two_nodes_is_stored_once(rng: np.random.Generator) -> None:
    proto = parse(
        f"{HEAD} g (float[1,6,5,4] x) => (float[1,40,3,2] y, float[1,40,5,4] z) "
        "{ y = Conv (x, W)\n z = Conv <pads=[1,1,1,1]> (x, W) }",
        {"W": rng.standard_normal((40, 6, 3, 3)).astype(np.float32)},
    )
    changed = ir.from_proto(proto)
    rounded(changed, 8, 1024)
    integers = [t for t in tensors(changed) if t.dtype is ir.DataType.INT8]
    assert len(integers) == 1
    first, second = (node for node in changed.graph if node.op_type == "Conv")
    assert first.inputs[1] is second.inputs[1]


def test_a_product_weight_of_two_nodes_is_made_floats_once(rng: np.random.Generator) -> None:
    """ONNX Runtime fuses a DequantizeLinear with one product, not with two."""
    proto = parse(
        f"{HEAD} g (float[3,40] x) => (float[3,48] y, float[3,48] z) "
        "{ y = MatMul (x, W)\n n = Neg (x)\n z = Gemm (n, W, b) }",
        {
            "W": rng.standard_normal((40, 48)).astype(np.float32),
            "b": rng.standard_normal(48).astype(np.float32),
        },
    )
    changed = ir.from_proto(proto)
    (group,) = found_in(changed).groups
    assert folded(group)
    raise_opset(changed, OPSET)
    nodes = [member.site.node for member in group.members]
    with Spool() as spool:
        codes = round_blocks(group.matrix.numpy()[0], 8, 16)
        FormatWriter(changed, spool).put(nodes, codes)
    assert "DequantizeLinear" not in {node.op_type for node in changed.graph}
    x = rng.standard_normal((3, 40)).astype(np.float32)
    got = run(open_session(ir.to_proto(changed).SerializeToString()), {"x": x}, "a model")
    np.testing.assert_allclose(got["y"], x @ codes.values(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("body", "shape", "word"),
    [
        ("y = Conv (x, W)", (40, 6, 1, 1), "so small"),
        ("y = Conv (x, W)", (4, 6, 3, 3), "so small"),
    ],
)
def test_weights_that_stay_floats(
    body: str, shape: tuple[int, ...], word: str, rng: np.random.Generator
) -> None:
    proto = parse(
        f"{HEAD} g (float[1,6,5,4] x) => (float y) {{ {body} }}",
        {"W": rng.standard_normal(shape).astype(np.float32)},
    )
    plain = ir.from_proto(proto)
    reason = no_format(found_in(plain).groups[0], plain)
    assert reason is not None
    assert word in reason


def test_products_with_integers_in_the_activation_are_no_weights(
    rng: np.random.Generator,
) -> None:
    """A Cast of constant integers times something computed is no constant."""
    proto = parse(
        f"{HEAD} g (float[4,4] x) => (float[4,4] y) {{ f = Cast <to=1> (q)\n y = Mul (f, x) }}",
        {"q": rng.integers(-9, 9, (4, 4)).astype(np.int8)},
    )
    plain = ir.from_proto(proto)
    constants = Constants(plain)
    assert constants.resolve(plain.graph.outputs[0]) is None
    known = ir.from_proto(
        parse(
            f"{HEAD} g (float[4,4] x) => (float[4,4] y) "
            "{ f = Cast <to=1> (q)\n w = Mul (s, f)\n y = Add (w, x) }",
            {"q": np.ones((4, 4), np.int8), "s": np.ones((4, 1), np.float32)},
        )
    )
    product = next(node for node in known.graph if node.op_type == "Mul").outputs[0]
    assert isinstance(Constants(known).resolve(product), Unusable)
