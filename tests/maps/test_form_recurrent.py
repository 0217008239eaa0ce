"""Recurrent cells: the nodes that they become, and the same outputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.helpers.cases import RANK, Case, check
from tests.helpers.models import (
    assert_same,
    assert_valid,
    factored,
    known_rank,
    op_types,
)

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
STEPS, BATCH, HIDDEN = 5, 3, 8


def recurrent(
    op: str,
    *,
    directions: int = 1,
    bias: bool = False,
    lengths: bool = False,
    initial: bool = False,
    batch_first: bool = False,
    settings: str = "",
    reference: bool = True,
) -> Case:
    gates = GATES[op] * (HIDDEN if op != "RNN" else 16)
    hidden = HIDDEN if op != "RNN" else 16
    names = ["x", "W", "R", "B" if bias else "", "lengths" if lengths else ""]
    more: dict[str, tuple[int, ...]] = {"R": (directions, gates, hidden)}
    if bias:
        more["B"] = (directions, 2 * gates)
    if initial:
        names.append("h0")
        more["h0"] = (BATCH, directions, hidden) if batch_first else (directions, BATCH, hidden)
        if op == "LSTM":
            names.append("c0")
            more["c0"] = more["h0"]
    while names[-1] == "":
        names.pop()
    direction = "bidirectional" if directions == 2 else "forward"
    text = f'hidden_size = {hidden}, direction = "{direction}", layout = {int(batch_first)}'
    head = (BATCH, STEPS) if batch_first else (STEPS, BATCH)
    y = (*head, directions, hidden) if batch_first else (STEPS, directions, BATCH, hidden)
    arguments = ", ".join(name or '""' for name in names)
    return Case(
        f"y = {op} <{text}{', ' * bool(settings)}{settings}> ({arguments})",
        (*head, 16),
        y,
        lambda rng: known_rank(16, directions * gates, RANK, rng).T.reshape(directions, gates, 16),
        ("MatMul", op),
        op.lower(),
        (16, directions * gates),
        STEPS * BATCH * directions * gates * (16 + hidden),
        more=more,
        inputs={"lengths": f"int32[{BATCH}]"} if lengths else {},
        feeds={"lengths": np.array([5, 2, 3], np.int32)} if lengths else {},
        arguments=(op.lower(),),
        reference=reference,
    )


# onnx.reference ignores sequence_lens, and its cells run one way only.
CELLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "bidirectional": {"directions": 2, "bias": True, "reference": False},
    "sequence_lens": {"lengths": True, "reference": False},
    "initial states": {"bias": True, "initial": True},
    "everything": {
        "directions": 2,
        "bias": True,
        "lengths": True,
        "initial": True,
        "reference": False,
    },
}
RECURRENT = {
    f"{op}, {name}": recurrent(op, **options) for op in GATES for name, options in CELLS.items()
}
RECURRENT["GRU, linear_before_reset"] = recurrent(
    "GRU", bias=True, settings="linear_before_reset = 1"
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
