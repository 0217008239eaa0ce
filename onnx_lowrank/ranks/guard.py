"""Guard: a result that is slower than the input model is not written.

The whole model is timed against the original.  Where it is slower, the layers whose pairs do not
pay on that provider, by the cost table, are dense again; at last all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from onnx_lowrank.graph.walk import node_name
from onnx_lowrank.maps.choice import Choice
from onnx_lowrank.maps.find import Group
from onnx_lowrank.measures import Latency
from onnx_lowrank.ranks.costs import CostTable
from onnx_lowrank.ranks.strategy import Plan

__all__ = ["ROUNDS", "put_back", "slower"]

ROUNDS = 3
"""How often layers are put back before all of them are."""


def slower(latency: Latency) -> bool:
    """Whether the result is slower by more than the noise: see `measures.verdict_of`."""
    return latency.speedup.verdict == "slower"


def put_back(plan: Plan, table: CostTable, *, last: bool) -> tuple[Plan, tuple[str, ...]]:
    """The plan with fewer pairs, and the names of the layers that are dense again.

    Args:
        plan: the plan that was slower.
        table: times of its layers, dense and as pairs.
        last: put all of them back.
    """
    ranked = [group for group, choice in plan.choices.items() if choice.rank is not None]
    gains = {group: _gain(table, group, plan.choices[group]) for group in ranked}
    losers = ranked if last else [group for group in ranked if gains[group] <= 0.0]
    if not losers:  # each alone pays, all together do not: the half that pays least
        losers = sorted(ranked, key=lambda group: gains[group])[: (len(ranked) + 1) // 2]
    together = {other for group in losers for other in _together(plan.choices[group], group)}
    losers = [group for group in ranked if group in together]
    choices = dict(plan.choices)
    for group in losers:
        choices[group] = _dense(table, group, choices[group])
    damage = None if plan.damage is None or len(losers) < len(ranked) else 0.0
    following = dataclasses.replace(plan, choices=choices, damage=damage, summed=damage)
    return following, _names(losers)


def _together(choice: Choice, group: Group) -> tuple[Group, ...]:
    """The groups that share its first factor: one cannot be dense without the others."""
    return (group,) if choice.joint is None else choice.joint.groups


def _gain(table: CostTable, group: Group, choice: Choice) -> float:
    """Nanoseconds that a pair saves; 0 where that is not known."""
    dense, pair = table.dense(group), table.pair(group, choice.rank or 0, choice.leads)
    return 0.0 if dense is None or pair is None else dense - pair


def _dense(table: CostTable, group: Group, choice: Choice) -> Choice:
    rank = choice.rank or 0
    dense, pair = table.dense(group), table.pair(group, rank, choice.leads)
    why = f"put back: the model was slower with a pair of rank {rank} here"
    if dense is not None and pair is not None:
        why += f" (alone {dense / 1e3:.3g} µs dense, {pair / 1e3:.3g} µs as a pair)"
    return Choice(None, why, needed=choice.needed, of=choice.of)


def _names(groups: Sequence[Group]) -> tuple[str, ...]:
    return tuple(node_name(group.members[0].site.node) for group in groups)
