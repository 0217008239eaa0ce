"""Guard: a result that is slower than the input model is not written.

The whole model is timed against the original.  Where it is slower, the layers whose pairs or
integers do not pay on that provider, by the cost table, are again as they were; at last all of
them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from onnx_lowrank.graph.walk import node_name
from onnx_lowrank.maps.choice import Choice
from onnx_lowrank.maps.find import Group
from onnx_lowrank.maps.formats import Variant, folded
from onnx_lowrank.ranks.costs import CostTable
from onnx_lowrank.ranks.strategy import Plan
from onnx_lowrank.schema.measures import Latency

__all__ = ["ROUNDS", "put_back", "slower"]

ROUNDS = 3
"""How often layers are put back before all of them are."""


def slower(latency: Latency) -> bool:
    """Whether the result is slower by more than the noise: see `measures.verdict_of`."""
    return latency.speedup.verdict == "slower"


def put_back(plan: Plan, table: CostTable, *, last: bool) -> tuple[Plan, tuple[str, ...]]:
    """The plan with fewer pairs and formats, and the names of the layers that are as they were.

    Args:
        plan: the plan that was slower.
        table: times of its layers, dense and as pairs.
        last: put all of them back.
    """
    ranked = [group for group, choice in plan.choices.items() if choice.changed]
    gains = {group: _gain(table, group, plan.choices[group]) for group in ranked}
    timed = [group for group in ranked if not _as_floats(group, plan.choices[group])]
    losers = ranked if last else [group for group in timed if gains[group] <= 0.0]
    if not losers:  # each alone pays, all together do not: the half that pays least
        known = timed or ranked
        losers = sorted(known, key=lambda group: gains[group])[: (len(known) + 1) // 2]
    together = {other for group in losers for other in _together(plan.choices[group], group)}
    losers = [group for group in ranked if group in together]
    choices = dict(plan.choices)
    for group in losers:
        choices[group] = _dense(table, group, choices[group])
    damage = None if plan.damage is None or len(losers) < len(ranked) else 0.0
    following = dataclasses.replace(plan, choices=choices, damage=damage, summed=damage, error=None)
    return following, _names(losers)


def _as_floats(group: Group, choice: Choice) -> bool:
    """Whether a layer runs as it did: only its file is smaller."""
    integers = choice.format is not None and choice.format.integers
    return choice.rank is None and folded(group) and not integers


def _together(choice: Choice, group: Group) -> tuple[Group, ...]:
    """The groups that share its first factor: one cannot be dense without the others."""
    return (group,) if choice.joint is None else choice.joint.groups


def _gain(table: CostTable, group: Group, choice: Choice) -> float:
    """Nanoseconds that a layer saves as it was chosen; 0 where that is not known."""
    dense, chosen = _times(table, group, choice)
    return 0.0 if dense is None or chosen is None else dense - chosen


def _times(table: CostTable, group: Group, choice: Choice) -> tuple[float | None, float | None]:
    """Nanoseconds as it was, and as it was chosen."""
    chosen = table.time(group, Variant(choice.rank, choice.format), choice.leads)
    return table.time(group, Variant()), chosen


def _dense(table: CostTable, group: Group, choice: Choice) -> Choice:
    dense, chosen = _times(table, group, choice)
    what = [] if choice.rank is None else [f"a pair of rank {choice.rank}"]
    what += [] if choice.format is None else [f"weights in {choice.format}"]
    why = f"put back: the model was slower with {' and '.join(what)} here"
    if dense is not None and chosen is not None:
        how = "as a pair" if choice.format is None else "so"
        why += f" (alone {dense / 1e3:.3g} µs dense, {chosen / 1e3:.3g} µs {how})"
    return Choice(None, why, needed=choice.needed, of=choice.of)


def _names(groups: Sequence[Group]) -> tuple[str, ...]:
    return tuple(node_name(group.members[0].site.node) for group in groups)
