"""ONNX Runtime's own operators: the nodes that they become, and the same outputs."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_lowrank.numerics.arrays import Array
from tests.helpers.cases import (
    OPSETS,
    RANK,
    Case,
    attributes,
    check,
)
from tests.helpers.form_cases import FUSED_MATMUL
from tests.helpers.models import factored, known_rank, parse


@pytest.mark.parametrize("name", FUSED_MATMUL)
def test_fused_matmul(name: str, rng: np.random.Generator) -> None:
    after = check(FUSED_MATMUL[name], rng)
    first, second = after.graph.node
    assert attributes(second)["alpha"] == 0.5
    assert "alpha" not in attributes(first)


@pytest.mark.parametrize("name", ["transBatchA", "transBatchB"])
def test_fused_matmul_that_reorders_batches_is_refused(name: str, rng: np.random.Generator) -> None:
    model = parse(
        f"""<ir_version: 8, opset_import: {OPSETS}>
        one (float[3, 5, 16] x) => (float y)
        {{ y = com.microsoft.FusedMatMul <{name} = 1> (x, W) }}""",
        {"W": known_rank(16, 12, RANK, rng, batch=(3,))},
    )
    (layer,) = factored(model, rank=RANK).report.layers
    assert (layer.status, layer.reason) == ("dense", "transBatchA or transBatchB is set")


@pytest.mark.parametrize("activation", ["Relu", "LeakyRelu", "Tanh", "Sigmoid"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("turned", [0, 1])
def test_fused_gemm(activation: str, side: str, turned: int, rng: np.random.Generator) -> None:
    # Both operands are given transposed, or neither is.
    m, n, rows = 16, 12, 5
    left = side == "left"
    x, y = ((m, rows), (n, rows)) if left else ((rows, m), (rows, n))
    x = x[::-1] if turned else x
    slope = ", activation_alpha = 0.25" if activation == "LeakyRelu" else ""

    def weight(rng: np.random.Generator) -> Array:
        array = known_rank(m, n, RANK, rng)
        return np.ascontiguousarray(array if left == bool(turned) else array.T)

    case = Case(
        f"y = com.microsoft.FusedGemm <alpha = 0.5, beta = 2.0, transA = {turned}, "
        f'transB = {turned}, activation = "{activation}"{slope}> '
        f"({'W, x' if left else 'x, W'}, C)",
        x,
        y,
        weight,
        ("Transpose", "MatMul", "FusedGemm") if turned else ("MatMul", "FusedGemm"),
        f"fused-gemm-{side}",
        (m, n),
        rows * m * n,
        more={"C": (y[1],)},
        reference=False,
    )
    after = check(case, rng)
    kept = attributes(after.graph.node[-1])
    assert kept["activation"] == activation.encode()
    assert (kept["alpha"], kept["beta"]) == (0.5, 2.0)


@pytest.mark.parametrize("mask", ["", "int32[2]", "int32[2, 5]"])
@pytest.mark.parametrize("sizes", [None, (8, 8, 16)])
def test_attention(mask: str, sizes: tuple[int, int, int] | None, rng: np.random.Generator) -> None:
    queries, keys, values = sizes or (16, 16, 16)
    packed = queries + keys + values
    split = "" if sizes is None else f", qkv_hidden_sizes = [{queries}, {keys}, {values}]"
    lengths = np.array([5, 3], np.int32)
    case = Case(
        f"y = com.microsoft.Attention <num_heads = 4{split}> (x, W, b{', mask' * bool(mask)})",
        (2, 5, 16),
        (2, 5, values),
        lambda rng: known_rank(16, packed, RANK, rng),
        ("MatMul", "Attention"),
        "attention",
        (16, packed),
        2 * 5 * 16 * packed + 2 * 5 * 5 * (queries + values),
        more={"b": (packed,)},
        inputs={"mask": mask} if mask else {},
        feeds={
            "mask": lengths
            if mask == "int32[2]"
            else (np.arange(5) < lengths[:, None]).astype(np.int32)
        }
        if mask
        else {},
        reference=False,
        within=1e-5,
    )
    after = check(case, rng)
    before = case.model(rng)
    assert after.graph.node[-1].attribute == before.graph.node[-1].attribute
    assert after.graph.node[-1].input[2:] == before.graph.node[-1].input[2:]
