"""Multiple-choice knapsack: one option of every item, least damage within a budget.

Every item (a layer) has options (dense, or a pair of some rank), each with a cost and a damage.
The Lagrangian relaxation, minimize Σ damage + λ·cost, only ever takes options on the lower convex
hull of each item; sweeping λ gives a path of solutions from the dearest to the cheapest, each the
best at its own cost (Everett, Operations Research 11, 1963).  Between two steps of that path what
is left of the budget is spent on options off the hull; where the items are few, the exact Pareto
front of all of them is computed instead.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["EXACT", "Item", "Solution", "path", "solve"]

Float64 = npt.NDArray[np.float64]

# Points of an exact Pareto front beyond which the Lagrangian path is taken.
EXACT = 20_000


@dataclass(frozen=True, eq=False)
class Item:
    """Options of one item, in any order.

    Attributes:
        costs: shape [options].
        damages: shape [options], from 0.
    """

    costs: Float64
    damages: Float64


@dataclass(frozen=True)
class Solution:
    """One option of every item.

    Attributes:
        picks: index of the option taken, by item.
        cost: sum of their costs.
        damage: sum of their damages.
    """

    picks: tuple[int, ...]
    cost: float
    damage: float


def path(items: Sequence[Item]) -> list[Solution]:
    """The solutions of the Lagrangian, from least damage to least cost.

    Along it the cost falls and the damage grows, each step dearer than the one before in damage
    for what it saves.
    """
    hulls = [_hull(item) for item in items]
    picks = [hull[0] for hull in hulls]
    steps = []
    for index, (item, hull) in enumerate(zip(items, hulls, strict=True)):
        for before, after in itertools.pairwise(hull):
            saved = item.costs[before] - item.costs[after]
            hurt = item.damages[after] - item.damages[before]
            steps.append((float(hurt / saved), index, after))
    steps.sort()
    solutions = [_solution(items, picks)]
    cost, damage = solutions[0].cost, solutions[0].damage
    for _, index, after in steps:
        item, before = items[index], picks[index]
        cost += float(item.costs[after] - item.costs[before])
        damage += float(item.damages[after] - item.damages[before])
        picks[index] = after
        solutions.append(Solution(tuple(picks), cost, damage))
    return solutions


def solve(items: Sequence[Item], budget: float) -> Solution | None:
    """Least damage at a cost of at most the budget; None where even the cheapest costs more."""
    if not items:
        return Solution((), 0.0, 0.0) if budget >= 0 else None
    exact = _exact(items, budget)
    if exact is not None:
        return exact[0] if exact else None
    solutions = path(items)
    within = next((solution for solution in solutions if solution.cost <= budget), None)
    return None if within is None else _filled(items, within, budget)


def _solution(items: Sequence[Item], picks: Sequence[int]) -> Solution:
    cost = sum(float(item.costs[pick]) for item, pick in zip(items, picks, strict=True))
    damage = sum(float(item.damages[pick]) for item, pick in zip(items, picks, strict=True))
    return Solution(tuple(picks), cost, damage)


def _hull(item: Item) -> list[int]:
    """Options on the lower convex hull of (cost, damage), from least damage to least cost."""
    order = sorted(range(len(item.costs)), key=lambda j: (item.damages[j], item.costs[j]))
    hull: list[int] = []
    for option in order:
        if hull and item.costs[option] >= item.costs[hull[-1]]:
            continue  # no cheaper, and no better
        while len(hull) > 1 and _slope(item, hull[-2], option) <= _slope(item, hull[-2], hull[-1]):
            hull.pop()
        hull.append(option)
    return hull


def _slope(item: Item, before: int, after: int) -> float:
    saved = item.costs[before] - item.costs[after]
    return float((item.damages[after] - item.damages[before]) / saved)


def _filled(items: Sequence[Item], solution: Solution, budget: float) -> Solution:
    """Spend what is left of the budget where it heals most."""
    picks, left = list(solution.picks), budget - solution.cost
    while True:
        best: tuple[float, int, int] | None = None
        for index, item in enumerate(items):
            extra = item.costs - item.costs[picks[index]]
            healed = item.damages[picks[index]] - item.damages
            healed = np.where(extra <= left, healed, 0.0)
            option = int(np.argmax(healed))
            if healed[option] > 0.0 and (best is None or healed[option] > best[0]):
                best = float(healed[option]), index, option
        if best is None:
            return _solution(items, picks)
        _, index, option = best
        left -= float(items[index].costs[option] - items[index].costs[picks[index]])
        picks[index] = option


def _exact(items: Sequence[Item], budget: float) -> list[Solution] | None:
    """The best solution of all, as the only element; empty if there is none; None if too many."""
    least = np.cumsum([item.costs.min() for item in reversed(items)])[::-1]
    rest = [*least[1:], 0.0]
    costs, damages = np.zeros(1), np.zeros(1)
    backs: list[tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]] = []
    for item, needed in zip(items, rest, strict=True):
        all_costs = (costs[:, None] + item.costs).ravel()
        all_damages = (damages[:, None] + item.damages).ravel()
        # By cost, of equal cost the better one; what is no better than something cheaper goes.
        order = np.lexsort((all_damages, all_costs))
        order = order[all_costs[order] + needed <= budget * (1.0 + 1e-12)]
        if not len(order):
            return []
        falling = np.minimum.accumulate(all_damages[order])
        better = np.concatenate([[True], falling[1:] < falling[:-1]])
        kept = order[better]
        if len(kept) > EXACT:
            return None
        backs.append((kept // len(item.costs), kept % len(item.costs)))
        costs, damages = all_costs[kept], all_damages[kept]
    state = int(np.argmin(damages))
    picks = []
    for origins, options in reversed(backs):
        picks.append(int(options[state]))
        state = int(origins[state])
    return [_solution(items, picks[::-1])]
