"""Chains of nodes between a weight and its node, judged by onnx.reference."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_lowrank.graph.constant import Constant, Unusable
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.graph.layout import Layout
from onnx_lowrank.numerics.arrays import Array
from tests.helpers.models import parse, run_reference, uniform


def resolve(
    body: str,
    weight: Array,
    others: Mapping[str, Array] | None = None,
    *,
    opset: int = 17,
    name: str = "v",
    kind: str = "float",
) -> tuple[Constant | Unusable | None, Array]:
    """What value v is found to be, and its elements as onnx.reference computes them."""
    model = parse(
        f"""<ir_version: 8, opset_import: ["": {opset}]>
        chain (float[2] x) => ({kind} {name}) {{
            {body}
        }}""",
        {"W": weight, **(others or {})},
    )
    graph = ir.from_proto(model)
    expected = run_reference(model, {"x": np.zeros(2, np.float32)})[name]
    return Constants(graph).resolve(graph.graph.outputs[0]), expected


def vector(*values: int) -> Array:
    return np.array(values, np.int64)


WEIGHT = uniform((4, 6), np.random.default_rng(1))
CUBE = uniform((1, 4, 6), np.random.default_rng(2))
EMPTY = np.zeros((0, 3), np.float32)


@pytest.mark.parametrize(
    ("body", "opset", "weight", "others"),
    [
        ("v = Identity(W)", 17, WEIGHT, {}),
        ("v = Transpose(W)", 17, WEIGHT, {}),
        ("v = Transpose <perm = [1, 0]> (W)", 7, WEIGHT, {}),
        ("v = Transpose <perm = [2, 0, 1]> (W)", 17, CUBE, {}),
        ("v = Transpose(W)", 17, CUBE, {}),
        ("t = Transpose(W)\n u = Identity(t)\n v = Transpose(u)", 17, WEIGHT, {}),
        ("v = Reshape(W, s)", 7, WEIGHT, {"s": vector(8, 3)}),
        ("v = Reshape(W, s)", 13, WEIGHT, {"s": vector(0, 2, -1)}),
        ("v = Reshape(W, s)", 13, WEIGHT, {"s": vector(-1)}),
        ("v = Reshape <allowzero = 1> (W, s)", 14, EMPTY, {"s": vector(3, 0)}),
        ("v = Reshape(W, s)", 14, EMPTY, {"s": vector(0, 3, 1)}),
        ("s = Constant <value_ints = [3, 8]> ()\n v = Reshape(W, s)", 13, WEIGHT, {}),
        ("s = Constant <value_int = -1> ()\n v = Reshape(W, t)", 13, WEIGHT, {"t": vector(-1)}),
        ("v = Flatten(W)", 13, CUBE, {}),
        ("v = Flatten <axis = 2> (W)", 13, CUBE, {}),
        ("v = Flatten <axis = 0> (W)", 13, CUBE, {}),
        ("v = Flatten <axis = 3> (W)", 13, CUBE, {}),
        ("v = Flatten <axis = -1> (W)", 13, CUBE, {}),
        ("v = Squeeze <axes = [0]> (W)", 11, CUBE, {}),
        ("v = Squeeze <axes = [-3]> (W)", 11, CUBE, {}),
        ("v = Squeeze(W, a)", 13, CUBE, {"a": vector(0)}),
        ("v = Squeeze(W, a)", 13, CUBE, {"a": vector(-3)}),
        ("v = Squeeze(W)", 13, CUBE, {}),
        ("v = Unsqueeze <axes = [0, 3]> (W)", 11, WEIGHT, {}),
        ("v = Unsqueeze(W, a)", 13, WEIGHT, {"a": vector(1)}),
        ("v = Unsqueeze(W, a)", 13, WEIGHT, {"a": vector(-1, 0)}),
        ("a = Identity(b)\n v = Unsqueeze(W, a)", 13, WEIGHT, {"b": vector(1)}),
        ("v = Cast <to = 11> (W)", 13, WEIGHT, {}),
        (
            "t = Transpose(W)\n u = Unsqueeze(t, a)\n r = Reshape(u, s)\n v = Transpose(r)",
            13,
            WEIGHT,
            {"a": vector(0), "s": vector(2, 3, -1)},
        ),
    ],
)
def test_chains(body: str, opset: int, weight: Array, others: dict[str, Array]) -> None:
    found, expected = resolve(body, weight, others, opset=opset)
    assert isinstance(found, Constant)
    assert found.name == "W"
    assert found.shape == expected.shape
    assert found.size == expected.size
    np.testing.assert_array_equal(found.numpy(), expected)
    assert found.dtype.numpy() == expected.dtype


@st.composite
def random_chains(draw: st.DrawFn) -> list[str]:
    rank, lines, value = 3, [], "W"
    for index in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from(["Transpose", "Unsqueeze", "Squeeze", "Flatten", "Merge"]))
        after = f"v{index}"
        if kind == "Transpose":
            perm = list(draw(st.permutations(range(rank))))
            lines.append(f"{after} = Transpose <perm = {perm}> ({value})")
        elif kind == "Unsqueeze":
            axis = draw(st.integers(-rank - 1, rank))
            lines.append(f"{after} = Unsqueeze <axes = [{axis}]> ({value})")
            rank += 1
        elif kind == "Squeeze":
            lines.append(f"{after} = Squeeze({value})")
            # Which axes are 1 is not followed here: two steps back to a known rank.
            lines.append(f"{after}f = Flatten({after})")
            after, rank = f"{after}f", 2
        elif kind == "Flatten":
            lines.append(f"{after} = Flatten <axis = {draw(st.integers(-rank, rank))}> ({value})")
            rank = 2
        else:
            shape = "{0, -1, 1}" if rank > 1 else "{-1, 1, 1}"
            lines.append(f"s{index} = Constant <value = int64[3] {shape}> ()")
            lines.append(f"{after} = Reshape({value}, s{index})")
            rank = 3
        value = after
    return [*lines, f"v = Identity({value})"]


@given(random_chains())
def test_random_chains(lines: list[str]) -> None:
    found, expected = resolve(
        "\n".join(lines), uniform((2, 3, 4), np.random.default_rng(3)), opset=11
    )
    assert isinstance(found, Constant)
    np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_casts_between_floats_keep_the_stored_type(dtype: type) -> None:
    weight = uniform((4, 6), np.random.default_rng(1), dtype)
    found, expected = resolve("v = Cast <to = 1> (W)", weight)
    assert isinstance(found, Constant)
    assert found.dtype == ir.DataType.FLOAT
    assert found.numpy().dtype == dtype
    np.testing.assert_array_equal(found.numpy().astype(np.float32), expected)


def test_a_constant_node_is_a_constant() -> None:
    found, expected = resolve(
        "c = Constant <value = float[1, 2] {3, 4}> ()\n v = Transpose(c)", WEIGHT
    )
    assert isinstance(found, Constant)
    assert found.name == "c"
    np.testing.assert_array_equal(found.numpy(), expected)


def test_cast_from_integers_is_refused_with_both_types() -> None:
    found, _ = resolve("v = Cast <to = 1> (W)", np.ones((4, 6), np.int8))
    assert isinstance(found, Unusable)
    assert (found.name, found.size, found.shape) == ("W", 24, (4, 6))
    assert found.reason == "is stored as int8 and cast to float"


def test_dequantized_is_refused_with_advice() -> None:
    found, _ = resolve(
        "d = DequantizeLinear(W, s)\n v = Transpose(d)",
        np.ones((4, 6), np.int8),
        {"s": np.array(0.5, np.float32)},
        opset=19,
    )
    assert isinstance(found, Unusable)
    assert found.size == 24
    assert "factor the float model first" in found.reason


@pytest.mark.parametrize(
    "body",
    [
        "v = Identity(x)",
        "v = Mul(W, W)",
        "u = Reshape(W, n)\n v = Add(u, x)",
        "s = Shape(x)\n m = Min(s, n)\n v = Reshape(W, m)",
    ],
)
def test_what_is_computed_is_no_constant(body: str) -> None:
    found, _ = resolve(body, np.ones(2, np.float32), {"n": vector(2)})
    assert found is None


def test_operators_of_other_domains_are_not_followed() -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["": 17, "custom": 1]>
        chain (float[2] x) => (float[6, 4] v) {
            v = custom.Transpose(W)
        }""",
        {"W": WEIGHT},
    )
    graph = ir.from_proto(model)
    assert Constants(graph).resolve(graph.graph.outputs[0]) is None
    assert Constants(graph).resolve(None) is None


def test_a_reshape_that_cannot_be_is_refused_not_raised() -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["": 17]>
        chain (float[2] x) => (float[5, 5] v) {
            v = Reshape(W, s)
        }""",
        {"W": WEIGHT, "s": vector(5, 5)},
    )
    graph = ir.from_proto(model)
    found = Constants(graph).resolve(graph.graph.outputs[0])
    assert isinstance(found, Unusable)
    assert "(5, 5)" in found.reason


OVERRIDABLE = """<ir_version: {version}, opset_import: ["": 17]>
chain (float[2] x, float[4, 6] W) => (float[4, 6] v) {{
    v = Identity(W)
}}"""


@pytest.mark.parametrize("version", [3, 8])
@pytest.mark.parametrize("force", [False, True])
def test_initializers_that_are_inputs(version: int, force: bool) -> None:
    graph = ir.from_proto(parse(OVERRIDABLE.format(version=version), {"W": WEIGHT}))
    found = Constants(graph, force_inputs=force).resolve(graph.graph.outputs[0])
    if force:
        assert isinstance(found, Constant)
    else:
        assert isinstance(found, Unusable)
        assert "constant_inputs=True" in found.reason
        assert found.size == 24


def test_an_input_without_a_value_is_no_constant() -> None:
    graph = ir.from_proto(parse(OVERRIDABLE.format(version=8)))
    assert Constants(graph, force_inputs=True).resolve(graph.graph.outputs[0]) is None


def test_readers_are_found_through_chains() -> None:
    model = ir.from_proto(
        parse(
            """<ir_version: 8, opset_import: ["": 17]>
            chain (float[3, 4] x, int64[2] i) => (float[3, 6] y, float[2, 6] g, float[6, 4] t) {
                y = MatMul(x, W)
                g = Gather(W, i)
                t = Transpose(W)
            }""",
            {"W": WEIGHT},
        )
    )
    root = model.graph.initializers["W"]
    found = {
        (None if node is None else node.op_type, index)
        for node, index in Constants(model).readers(root)
    }
    assert found == {("MatMul", 1), ("Gather", 0), (None, 0)}


def test_the_shape_of_a_reshape_is_read_by_it_not_through_it() -> None:
    model = ir.from_proto(
        parse(
            """<ir_version: 8, opset_import: ["": 17]>
            chain (float[3, 4] x) => (float[12] y) { y = Reshape(x, s) }""",
            {"s": vector(12)},
        )
    )
    ((node, index),) = Constants(model).readers(model.graph.initializers["s"])
    assert node is not None
    assert (node.op_type, index) == ("Reshape", 1)


def test_a_file_is_mapped_no_longer_than_its_elements_are_used(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(bytes(8) + WEIGHT.tobytes())
    stored = ir.ExternalTensor(
        "data", 8, WEIGHT.nbytes, ir.DataType.FLOAT, shape=ir.Shape(WEIGHT.shape), name="W",
        base_dir=tmp_path,
    )  # fmt: skip
    root = ir.Value(name="W", const_value=stored)
    constant = Constant(root, stored, Layout.of(WEIGHT.shape), stored.dtype)
    one, other = constant.numpy(), constant.transpose(1, 0).numpy()
    np.testing.assert_array_equal(one, WEIGHT)
    np.testing.assert_array_equal(other, WEIGHT.T)
    assert stored.raw is None, "the tensor itself would hold it"
    assert not one.flags.owndata
