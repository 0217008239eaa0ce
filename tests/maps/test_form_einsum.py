"""Einsum: the nodes that it becomes, and the same outputs."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.helper
import pytest

from tests.helpers.cases import (
    OPSETS,
    RANK,
    check,
    declared,
)
from tests.helpers.form_cases import EINSUM
from tests.helpers.models import (
    as_proto,
    assert_same,
    factored,
    known_rank,
    op_types,
    parse,
    uniform,
)


@pytest.mark.parametrize("name", EINSUM)
def test_einsum(name: str, rng: np.random.Generator) -> None:
    case = EINSUM[name]
    before = case.model(rng)
    after = check(case, rng)
    if case.ops[0] == "MatMul":
        assert after.graph.node[-1].attribute == before.graph.node[-1].attribute


REFUSED_EINSUM = {
    "a diagonal of the weight": ("bd,ddf->bf", (3, 16), (16, 16, 12), (3, 12), "diagonal"),
    "a diagonal of the activation": ("dd,df->f", (16, 16), (16, 12), (12,), "diagonal"),
    "a sum over the activation": ("bsd,df->bf", (3, 5, 16), (16, 12), (3, 12), "sums an axis"),
    "a sum over the weight": ("bd,dfk->bf", (3, 16), (16, 12, 6), (3, 12), "sums an axis"),
    "nothing contracted": ("bd,df->bdf", (3, 16), (16, 12), (3, 16, 12), "no matrix product"),
    "nothing new": ("bd,d->b", (3, 16), (16,), (3,), "no matrix product"),
    "dots in the weight": ("bd,d...->b...", (3, 16), (16, 12), (3, 12), "dots in its constant"),
}


@pytest.mark.parametrize("name", REFUSED_EINSUM)
def test_einsum_refused(name: str, rng: np.random.Generator) -> None:
    equation, x, shape, y, reason = REFUSED_EINSUM[name]
    model = parse(
        f"""<ir_version: 8, opset_import: {OPSETS}>
        one ({declared({"x": x})}) => ({declared({"y": y})})
        {{ y = Einsum <equation = "{equation}"> (x, W) }}""",
        {"W": uniform(shape, rng)},
    )
    result = factored(model, rank=1)
    (layer,) = result.report.layers
    assert (layer.status, layer.form, layer.off) == ("dense", "einsum", False)
    assert reason in layer.reason
    assert equation in layer.reason
    assert op_types(result.model) == ["Einsum"]


def test_einsum_of_three_is_refused(rng: np.random.Generator) -> None:
    model = parse(
        f"""<ir_version: 8, opset_import: {OPSETS}>
        one (float[3, 16] x, float[12, 5] z) => (float[3, 5] y)
        {{ y = Einsum <equation = "bd,df,fs->bs"> (x, W, z) }}""",
        {"W": known_rank(16, 12, RANK, rng)},
    )
    (layer,) = factored(model, rank=1).report.layers
    assert "has 3 operands; two are handled" in layer.reason


def test_einsum_with_too_few_letters_for_its_constant(rng: np.random.Generator) -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["": 17]>
        one (float[3, 16] x) => (float y) { y = Einsum <equation = "bd,df->bf"> (x, W) }""",
        {"W": uniform((16, 12, 2), rng)},
    )
    (layer,) = factored(model, rank=1).report.layers
    assert "'df' for a constant of 3 axes" in layer.reason


def test_einsum_with_an_axis_that_is_stretched(rng: np.random.Generator) -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["": 17]>
        one (float[1, 5, 16] x) => (float[3, 5, 12] y)
        { y = Einsum <equation = "ebd,edf->ebf"> (x, W) }""",
        {"W": known_rank(16, 12, RANK, rng, batch=(3,))},
    )
    after = as_proto(factored(model, rank=RANK).model)
    assert op_types(after) == ["Einsum", "Einsum"]
    onnx.checker.check_model(after)
    assert_same(model, after, {"x": uniform((1, 5, 16), rng)})
