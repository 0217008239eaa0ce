"""MACs of operators that have no form, or that stand where they cannot be counted."""

from __future__ import annotations

import numpy as np
import pytest

from tests.helpers.cases import OPSETS, RANK
from tests.helpers.models import (
    factored,
    known_rank,
    parse,
    uniform,
)

COUNTS = {
    "ConvTranspose": (
        "float[2, 3, 4, 5] x",
        "y = ConvTranspose(x, W)",
        (3, 6, 2, 2),
        2 * 3 * 4 * 5 * 6 * 2 * 2,
    ),
    "grouped ConvTranspose": (
        "float[2, 4, 4, 5] x",
        "y = ConvTranspose <group = 2> (x, W)",
        (4, 3, 2, 2),
        2 * 4 * 4 * 5 * 3 * 2 * 2,
    ),
    "grouped Conv": (
        "float[2, 4, 4, 5] x",
        "y = Conv <group = 2> (x, W)",
        (6, 2, 2, 2),
        2 * 6 * 3 * 4 * 2 * 2 * 2,
    ),
    "FusedConv": (
        "float[2, 4, 4, 5] x",
        'y = com.microsoft.FusedConv <activation = "Relu"> (x, W)',
        (6, 4, 2, 2),
        2 * 6 * 3 * 4 * 4 * 2 * 2,
    ),
    "a MatMul of two activations": ("float[2, 3, 4] x", "t = Transpose <perm = [0, 2, 1]> (x)\n"
                                    "y = MatMul(x, t)", (1,), 2 * 3 * 4 * 3),
    "an Einsum of three": (
        "float[3, 4] x",
        'y = Einsum <equation = "ab,bc,ad->cd"> (x, W, x)',
        (4, 5),
        3 * 4 * 5 * 4,
    ),
    "an Einsum of one": ("float[3, 4] x", 'y = Einsum <equation = "ab->ba"> (x)', (1,), 0),
    "nothing": ("float[3, 4] x", "y = Relu(x)", (1,), 0),
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_macs(name: str, rng: np.random.Generator) -> None:
    x, nodes, shape, macs = COUNTS[name]
    model = parse(
        f"""<ir_version: 8, opset_import: {OPSETS}>
        one ({x}) => (float y) {{ {nodes} }}""",
        {"W": uniform(shape, rng)},
    )
    model.graph.output[0].type.tensor_type.ClearField("shape")
    result = factored(model, rank=1, exclude=(), check=True, samples=1)
    assert result.report.totals.macs_before == macs


def test_macs_within_a_function_of_a_function_are_not_guessed(rng: np.random.Generator) -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["": 17, "f": 1]>
        one (float[3, 16] x) => (float[3, 12] y) { z = f.outer(x)  y = MatMul(z, W) }
        <domain: "f", opset_import: ["": 17, "f": 1]>
        outer (a) => (b) { b = f.inner(a) }
        <domain: "f", opset_import: ["": 17]>
        inner (a) => (b) { t = Transpose(a)  g = MatMul(a, t)  b = MatMul(g, a) }""",
        {"W": known_rank(16, 12, RANK, rng)},
    )
    result = factored(model, rank=RANK, check=True, samples=1)
    assert result.report.totals.macs_before is None
    assert result.report.layers[0].macs_before == 3 * 16 * 12
    assert result.report.layers[0].macs_after == 3 * RANK * (16 + 12)
    assert any("MACs not counted" in note for note in result.report.notes)


def test_a_weight_that_one_node_refuses_is_no_part_of_a_share(rng: np.random.Generator) -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["": 17]>
        one (float[3, 16] x) => (float[3, 12] y, float[3, 12] z) {
            y = MatMul(x, W)
            z = Einsum <equation = "bd,df,bd->bf"> (x, W, x)
        }""",
        {"W": known_rank(16, 12, RANK, rng)},
    )
    result = factored(model, rank=RANK)
    assert [layer.status for layer in result.report.layers] == ["dense", "dense"]
    # It stays for the other node's sake, so that there is nothing of it to take out.
    assert result.report.totals.linear_parameters_before == 0
    assert result.report.totals.parameters_before == 16 * 12
