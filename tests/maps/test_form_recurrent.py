"""Recurrent cells: the nodes that they become, and the same outputs."""

from __future__ import annotations

import numpy as np
import pytest

from tests.helpers.cases import RANK, Case, check
from tests.helpers.form_cases import GATES, RECURRENT, recurrent
from tests.helpers.models import (
    assert_same,
    assert_valid,
    factored,
    op_types,
)


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent(name: str, rng: np.random.Generator) -> None:
    case = RECURRENT[name]
    after = check(Case(**{**vars(case), "within": 1e-5}), rng)
    before = case.model(rng)
    assert after.graph.node[-1].attribute == before.graph.node[-1].attribute
    assert after.graph.node[-1].input[2:] == before.graph.node[-1].input[2:]


@pytest.mark.parametrize("op", GATES)
def test_batch_first(op: str, rng: np.random.Generator) -> None:
    # ONNX Runtime has no layout = 1; onnx.reference has, for one direction.
    case = recurrent(op, batch_first=True, bias=True)
    model = case.model(rng)
    result = factored(model, rank=RANK, ops=(op.lower(),))
    assert op_types(result.model) == ["MatMul", op]
    assert_valid(result.model)
    assert_same(model, result.model, case.fed(rng), in_ort=False, within=1e-5)
