"""Multiple-choice knapsack: one option of every item, least damage within a budget.

Every item (a layer) has options (dense, or a pair of some rank), each with a cost and a damage.
The Lagrangian relaxation, minimize Σ damage + λ·cost, only ever takes options on the lower convex
hull of each item; sweeping λ gives a path of solutions from the dearest to the cheapest, each the
best at its own cost (Everett, Operations Research 11, 1963).  Between two steps of that path the
best choice takes options off the hull: an integer program.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.optimize
import scipy.sparse

__all__ = ["Item", "Solution", "path", "solve"]

Float64 = npt.NDArray[np.float64]

# Relative gap to the bound at which the integer program stops, and nodes of its search.
_GAP, _NODES = 1e-5, 2_000


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
    """Least damage at a cost of at most the budget; None where even the cheapest costs more.

    The integer program goes to HiGHS (`scipy.optimize.milp`), which stops at a gap of 1e-5 or
    after a number of nodes, so that the answer is the same on any machine.  Where the best step of
    the Lagrangian path within the budget is better, that is the answer.
    """
    if not items:
        return Solution((), 0.0, 0.0) if budget >= 0 else None
    within = next((found for found in path(items) if found.cost <= budget), None)
    if within is None:
        return None
    # Its constraints hold to 1e-6: where that is too much, once more with a margin.
    for share in (1.0, 1.0 - 1e-5):
        found = _program(items, budget, share)
        if found is not None and found.cost <= budget:
            return min(within, found, key=lambda solution: solution.damage)
    return within


def _program(items: Sequence[Item], budget: float, share: float) -> Solution | None:
    """Solve min dᵀx, one x of every item being 1, costs within a share of the budget."""
    counts = [len(item.costs) for item in items]
    costs = np.concatenate([item.costs for item in items])
    damages = np.concatenate([item.damages for item in items])
    usable = np.isfinite(costs) & np.isfinite(damages)
    costs, damages = (np.where(usable, values, 0.0) for values in (costs, damages))
    unit, scale = max(float(costs.max()), 1e-300), max(float(np.abs(damages).max()), 1e-300)
    rows = np.repeat(np.arange(len(items)), counts)
    one_each = scipy.sparse.csr_array((np.ones(len(costs)), (rows, np.arange(len(costs)))))
    answer = scipy.optimize.milp(
        damages / scale,
        integrality=np.ones(len(costs), np.int64),
        bounds=scipy.optimize.Bounds(0.0, usable.astype(float)),
        constraints=[
            scipy.optimize.LinearConstraint(one_each, 1.0, 1.0),
            scipy.optimize.LinearConstraint(costs[None] / unit, -np.inf, share * budget / unit),
        ],
        options={"mip_rel_gap": _GAP, "node_limit": _NODES},
    )
    if answer.x is None:
        return None
    ends = np.cumsum(counts)[:-1]
    return _solution(items, [int(np.argmax(part)) for part in np.split(answer.x, ends)])


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
