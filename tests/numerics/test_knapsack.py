"""The choice among options of many layers, against trying all of them."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.optimize
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
@settings(max_examples=60, deadline=None)
def test_few_items_are_solved_exactly(options: list[list[tuple[int, int]]], budget: int) -> None:
    found, best = solve(items_of(options), budget), brute(options, budget)
    assert (found is None) == (best is None)
    if found is not None:
        assert found.damage == best
        assert found.cost <= budget
        taken = [own[pick] for own, pick in zip(options, found.picks, strict=True)]
        assert (found.cost, found.damage) == tuple(map(sum, zip(*taken, strict=True)))


def test_where_the_program_finds_nothing_the_lagrangian_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = [[(0, 9), (3, 4), (8, 0)], [(1, 7), (2, 2), (9, 1)]]
    steps = path(items_of(options))

    def nothing(*_: object, **__: object) -> SimpleNamespace:
        return SimpleNamespace(x=None)

    monkeypatch.setattr(scipy.optimize, "milp", nothing)
    for budget in range(18):
        found = solve(items_of(options), budget)
        within = [step for step in steps if step.cost <= budget]
        assert found == (within[0] if within else None)


def test_what_is_not_finite_is_not_taken() -> None:
    items = [Item(np.array([1.0, 2.0, 4.0]), np.array([np.inf, 3.0, 0.0])) for _ in range(2)]
    found = solve(items, 6.0)
    assert found is not None
    assert (found.cost, found.damage) == (6.0, 3.0)


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
