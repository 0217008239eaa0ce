"""The bisection along steps of rising loss."""

from __future__ import annotations

import pytest

from onnx_lowrank.numerics.knapsack import Solution
from onnx_lowrank.ranks.furthest import furthest


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_search_finds_the_last_step_within_the_limit(power: float) -> None:
    steps = [Solution((), 1000.0 - i, float(i * i)) for i in range(1000)]
    calls = []

    def loss(step: Solution) -> float:
        calls.append(step)
        return float(0.003 * step.damage ** (power / 2))

    limit = 0.003 * 400**power
    index, known = furthest(steps, loss, limit, lambda step: step.damage**0.5, {})
    assert 395 <= index <= 400
    assert known[index] <= limit
    assert len(calls) <= 12


def test_a_loss_that_is_known_is_not_asked_for_again() -> None:
    steps = [Solution((), 10.0 - i, float(i)) for i in range(10)]
    calls = []

    def loss(step: Solution) -> float:
        calls.append(step.damage)
        return step.damage

    known = {4: 4.0, 6: 6.0}
    index, found = furthest(steps, loss, 5.0, lambda step: step.damage, known)
    assert index == 5
    assert calls == [5.0]
    assert found == {0: 0.0, **known, 5: 5.0}


def test_without_a_step_within_the_limit_nothing_is_taken() -> None:
    steps = [Solution((), 10.0 - i, float(i)) for i in range(10)]
    index, _ = furthest(steps, lambda step: step.damage + 1.0, 0.5, lambda step: step.damage, {})
    assert index == 0
