"""Where the weight of a form may come from: chains, Constant nodes, casts."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx.defs
import pytest

from onnx_lowrank.numerics.arrays import Array
from tests.helpers.models import (
    as_proto,
    assert_same,
    assert_valid,
    factored,
    known_rank,
    linear_model,
    op_types,
    parameters,
    parse,
    uniform,
)

RANK = 4
M, N = 16, 12


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)


INT64 = "Constant <value = int64[{count}] {{{values}}}> ()"

# (opset, stored shape or stored as the transpose, nodes that make V of the weight's shape)
CHAINS: dict[str, tuple[int, tuple[int, ...] | None, str]] = {
    "Transpose": (7, None, "V = Transpose(W)"),
    "Transpose with perm": (17, None, "V = Transpose <perm = [1, 0]> (W)"),
    "Identity": (7, (M, N), "V = Identity(W)"),
    "Identity, Transpose": (17, None, "I = Identity(W)\n V = Transpose(I)"),
    "Reshape": (
        7,
        (M * N,),
        f"s = {INT64.format(count=2, values=f'{M}, {N}')}\n V = Reshape(W, s)",
    ),
    "Reshape -1": (
        17,
        (4, M * N // 4),
        f"s = {INT64.format(count=2, values=f'{M}, -1')}\n V = Reshape(W, s)",
    ),
    "Squeeze attribute": (11, (1, M, N), "V = Squeeze <axes = [0]> (W)"),
    "Squeeze input": (13, (1, M, N), "V = Squeeze(W, zero)"),
    "Squeeze all": (13, (1, M, 1, N), "V = Squeeze(W)"),
    "Unsqueeze, Squeeze attribute": (
        11,
        (M, N),
        "U = Unsqueeze <axes = [1]> (W)\n V = Squeeze <axes = [1]> (U)",
    ),
    "Unsqueeze, Squeeze input": (13, (M, N), "U = Unsqueeze(W, zero)\n V = Squeeze(U, zero)"),
    "Flatten": (13, (M, 2, N // 2), "V = Flatten(W)"),
    "Flatten axis 2": (9, (4, M // 4, N), "V = Flatten <axis = 2> (W)"),
    "Unsqueeze, Transpose, Reshape": (
        13,
        None,
        "U = Unsqueeze(W, zero)\n T = Transpose <perm = [2, 0, 1]> (U)\n"
        f"s = {INT64.format(count=2, values=f'{M}, {N}')}\n V = Reshape(T, s)",
    ),
}


def chain_model(name: str, weight: Array) -> onnx.ModelProto:
    opset, stored, nodes = CHAINS[name]
    array = np.ascontiguousarray(weight.T) if stored is None else weight.reshape(stored)
    return parse(
        f"""<ir_version: 8, opset_import: ["": {opset}]>
        one (float[B, {M}] x) => (float[B, {N}] y) {{
            {nodes}
            y = MatMul(x, V)
        }}""",
        {"W": array, "zero": np.zeros(1, np.int64)},
    )


@pytest.mark.parametrize("name", CHAINS)
def test_a_weight_behind_a_chain(name: str, rng: np.random.Generator) -> None:
    model = chain_model(name, known_rank(M, N, RANK, rng))
    result = factored(model, rank=RANK)
    after = as_proto(result.model)
    assert op_types(after) == ["MatMul", "MatMul"]
    assert not [node for node in after.graph.node if node.op_type == "Constant"]
    assert parameters(after) == RANK * (M + N)
    assert "W" not in {tensor.name for tensor in after.graph.initializer}
    assert_valid(after)
    assert_same(model, after, {"x": uniform((3, M), rng)})


def test_a_weight_in_a_constant_node(rng: np.random.Generator) -> None:
    model = linear_model(known_rank(M, N, RANK, rng))
    weight = model.graph.initializer.pop()
    model.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["W"], value=weight))
    after = as_proto(factored(model, rank=RANK).model)
    assert op_types(after) == ["MatMul", "MatMul"]
    assert not after.graph.initializer, "a factor stands as its weight stood"
    assert parameters(after) == RANK * (M + N)
    assert_valid(after)
    assert_same(model, after, {"x": uniform((3, M), rng)})


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_a_cast_weight_keeps_its_stored_type(stored: type, rng: np.random.Generator) -> None:
    model = parse(
        f"""<ir_version: 8, opset_import: ["": 17]>
        one (float[B, {M}] x) => (float[B, {N}] y) {{
            V = Cast <to = 1> (W)
            y = MatMul(x, V)
        }}""",
        {"W": known_rank(M, N, RANK, rng, stored)},
    )
    after = as_proto(factored(model, rank=RANK).model)
    assert op_types(after) == ["Cast", "Cast", "MatMul", "MatMul"]
    kind = model.graph.initializer[0].data_type
    assert [tensor.data_type for tensor in after.graph.initializer] == [kind, kind]
    assert parameters(after) == RANK * (M + N)
    assert_valid(after)
    within = {np.float16: 2e-3, ml_dtypes.bfloat16: 2e-2, np.float64: 2e-6}[stored]
    assert_same(model, after, {"x": uniform((3, M), rng)}, within=within)
