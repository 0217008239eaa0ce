"""The choice among options of many layers, against trying all of them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_lowrank.numerics import knapsack
from onnx_lowrank.numerics.knapsack import Item, path, solve

option = st.tuples(st.integers(0, 20), st.integers(0, 20))
problem = st.lists(st.lists(option, min_size=1, max_size=5), min_size=1, max_size=5)


def items_of(options: list[list[tuple[int, int]]]) -> list[Item]:
    return [
        Item(np.array([c for c, _ in own], float), np.array([d for _, d in own], float))
        for own in options
    ]


def brute(options: list[list[tuple[int, int]]], budget: float) -> float | None:
    found = [
        sum(d for _, d in taken)
        for taken in itertools.product(*options)
        if sum(c for c, _ in taken) <= budget
    ]
    return min(found, default=None)


@given(problem, st.integers(0, 80))
@settings(max_examples=200, deadline=None)
def test_few_items_are_solved_exactly(options: list[list[tuple[int, int]]], budget: int) -> None:
    found, best = solve(items_of(options), budget), brute(options, budget)
    assert (found is None) == (best is None)
    if found is not None:
        assert found.damage == best
        assert found.cost <= budget
        taken = [own[pick] for own, pick in zip(options, found.picks, strict=True)]
        assert (found.cost, found.damage) == tuple(map(sum, zip(*taken, strict=True)))


@given(problem, st.integers(0, 80))
@settings(max_examples=200, deadline=None)
def test_the_lagrangian_is_feasible_and_bounded(
    options: list[list[tuple[int, int]]], budget: int
) -> None:
    items = items_of(options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knapsack, "EXACT", 0)
        found = solve(items, budget)
    best = brute(options, budget)
    assert (found is None) == (best is None)
    if found is None or best is None:
        return
    assert found.cost <= budget
    assert found.damage >= best
    # At worst it is off by one step of its path.
    steps = path(items)
    jumps = [after.damage - before.damage for before, after in itertools.pairwise(steps)]
    assert found.damage <= best + max(jumps, default=0.0) + 1e-9


@given(problem)
@settings(max_examples=100, deadline=None)
def test_every_step_of_the_path_is_the_best_at_its_cost(
    options: list[list[tuple[int, int]]],
) -> None:
    steps = path(items_of(options))
    assert steps[-1].cost == sum(min(c for c, _ in own) for own in options)
    assert steps[0].damage == sum(min(d for _, d in own) for own in options)
    slopes = []
    for before, after in itertools.pairwise(steps):
        assert after.cost < before.cost
        slopes.append((after.damage - before.damage) / (before.cost - after.cost))
    assert slopes == sorted(slopes)
    for step in steps:
        assert step.damage == brute(options, step.cost)


def test_many_items_stay_near_the_bound() -> None:
    rng = np.random.default_rng(0)
    items = []
    for _ in range(60):
        ranks = np.arange(0, 25) * 8.0
        tail = np.exp(-ranks / rng.uniform(10, 200)) * rng.uniform(0.1, 10)
        items.append(Item(np.append(ranks[1:], 200.0), np.append(tail[1:], 0.0)))
    budget = 0.5 * 60 * 200.0
    found = solve(items, budget)
    assert found is not None
    assert found.cost <= budget
    steps = path(items)
    bound = max(  # the Lagrangian dual is below every solution
        step.damage + slope * (step.cost - budget)
        for step, after in itertools.pairwise(steps)
        for slope in [(after.damage - step.damage) / (step.cost - after.cost)]
    )
    assert bound <= found.damage <= 1.001 * bound


def test_no_items_cost_nothing() -> None:
    assert solve([], 0.0) == knapsack.Solution((), 0.0, 0.0)
    assert solve([], -1.0) is None
