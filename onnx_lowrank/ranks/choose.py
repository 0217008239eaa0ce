"""Choose: what becomes of every linear map, decided once, with the reason."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from onnx_lowrank.maps.choice import STAYS, Choice, Decision, Spectrum
from onnx_lowrank.maps.find import Factorable, Finding, Group, Refused
from onnx_lowrank.maps.forms import Site
from onnx_lowrank.maps.selection import Selection
from onnx_lowrank.numerics.ranks import (
    break_even,
    rounded,
)
from onnx_lowrank.phrases import listed
from onnx_lowrank.ranks.goals import Goal

__all__ = [
    "Wanted",
    "choose",
    "decide",
    "settle",
    "wanted",
    "worth_measuring",
]


def worth_measuring(group: Group, goal: Goal, selection: Selection) -> Choice | None:
    """A choice that needs no look at the numbers; None where they decide."""
    slices, m, n = group.shape
    if slices * m * n == 0:
        return Choice(None, f"{m}×{n} is empty")
    for member in group.members:
        left_out = selection.reason(member.site.node)
        if left_out is not None:
            if len(group.members) > 1:
                left_out += "; the layers that share its weight stay too"
            return Choice(None, left_out, excluded=True)
    for head in group.heads:
        if (left_out := selection.excluded(head.node)) is not None:
            why = f"{left_out}, the first map of the pair whose second one this is"
            return Choice(None, why, excluded=True)
    if group.others and goal.min_gain >= 0:
        return Choice(
            None,
            f"{group.matrix.name} is also read by {listed(group.others, 2)}: the weight would stay "
            "beside the pair",
        )
    limit = goal.largest(group)
    if group.heads and limit < (1 if goal.rank is None else min(goal.rank, _most(group))):
        there = f"is a pair of rank {m} already" if group.inner is None else f"its width is {m}"
        return Choice(None, f"{there}; a lower one has to save {_percent(goal.min_gain)}")
    if limit == 0:
        return Choice(
            None,
            f"not even rank 1 of {m}×{n} saves {_percent(goal.min_gain)} "
            f"(break-even {break_even(m, n):.1f})",
        )
    if goal.rank is not None and min(goal.rank, _most(group)) > limit:
        return Choice(
            None,
            f"rank {goal.rank} is above {limit}, the largest that saves "
            f"{_percent(goal.min_gain)} (break-even {break_even(m, n):.1f})",
        )
    return None


def choose(group: Group, measured: Spectrum, goal: Goal) -> Choice:
    """The rank of a group that was measured."""
    _, m, n = group.shape
    if not measured.finite:
        return Choice(None, f"{group.matrix.name} holds NaN or Inf")
    limit = goal.largest(group)
    if goal.rank is not None:
        needed = rank = min(goal.rank, _most(group))
        why = f"rank {goal.rank} was given"
        if rank < goal.rank:
            why += f", {rank} is full rank"
    elif goal.energy is not None:
        needed = measured.needed(goal.energy)
        if needed > limit:
            even = f"break-even ({group.break_even:.1f})"
            if group.heads:
                what = "rank of the pair that it is already" if group.inner is None else "width"
                even = f"the {what} ({m})"
            return Choice(
                None,
                f"energy {goal.energy:g} needs rank {needed}, "
                f"{needed / group.break_even:.2f} of {even}; "
                f"{limit} is the largest that saves {_percent(goal.min_gain)}",
                needed=needed,
                of=measured.of,
            )
        rank = Wanted(limit, goal.energy, goal.rank_multiple)(measured) or 0
        why = f"energy {goal.energy:g} needs rank {needed}"
    else:
        assert goal.keep is not None
        needed = group.largest(goal.keep)
        if needed == 0:
            return Choice(None, f"not even rank 1 of {m}×{n} keeps within {goal.keep:g}", needed=0)
        why = f"rank {needed} keeps {goal.keep:g} of the parameters"
        if needed > limit:
            needed = limit
            why = f"rank {limit} is the largest that saves {_percent(goal.min_gain)}"
        rank = rounded(needed, goal.rank_multiple, limit, up=False)
    if rank != needed:
        why += f", rounded to {rank}"
    if measured.squares is None:
        return Choice(rank, why, None, needed, measured.of)
    if not measured.squares.any():
        why += "; the weight is all zeros"
    return Choice(rank, why, measured.held(rank), needed, measured.of)


@dataclass(frozen=True)
class Wanted:
    """Of how many components of a layer factors may be made, by its spectrum; picklable.

    Attributes:
        limit: the largest rank that is allowed.
        energy: the share of the energy that the rank has to hold; None takes the limit itself.
        multiple: of which the rank is, where the limit allows that.
    """

    limit: int
    energy: float | None = None
    multiple: int = 1

    def __call__(self, measured: Spectrum) -> int | None:
        """So many; None where no allowed rank holds the energy."""
        if self.energy is None or not measured.finite:
            return self.limit if measured.finite else None
        needed = measured.needed(self.energy)
        if needed > self.limit:
            return None
        return rounded(needed, self.multiple, self.limit, up=True)


def wanted(group: Group, goal: Goal) -> Wanted:
    """What `choose`, or a budget at most, will want of a group that is measured."""
    limit = goal.largest(group)
    if goal.energy is not None:
        return Wanted(limit, goal.energy, goal.rank_multiple)
    if goal.budget:
        return Wanted(limit)
    return Wanted(choose(group, Spectrum(None, True), goal).rank or 0)  # the numbers do not decide


def _most(group: Group) -> int:
    """The rank at which nothing is lost."""
    _, m, n = group.shape
    return m if group.selects else min(m, n)


def settle(finding: Finding, choices: Mapping[Group, Choice], goal: Goal) -> dict[Group, Choice]:
    """The choices without the ways of factoring a node that lose against a better one."""
    group_of = _group_of(finding)
    settled = dict(choices)
    for entry in finding.entries:
        if isinstance(entry, Factorable) and len(entry.sites) > 1:
            ways = [group_of[site] for site in entry.sites if group_of[site] in settled]
            best = min(ways, key=lambda group: _preference(group, choices[group], goal))
            for group in ways:
                if group is not best:
                    del settled[group]
    return settled


def _preference(group: Group, choice: Choice, goal: Goal) -> tuple[bool, float]:
    """What is chosen among several ways: the smallest pair; at a fixed size, the closest."""
    if choice.rank is None:
        return True, 0.0
    if goal.keep is not None:
        return False, -(choice.energy or 0.0)
    return False, float(group.pair_elements(choice.rank))


def _group_of(finding: Finding) -> dict[Site, Group]:
    return {member.site: group for group in finding.groups for member in group.members}


def decide(finding: Finding, choices: Mapping[Group, Choice]) -> tuple[Decision, ...]:
    """One decision for every linear map, in the order of the nodes.

    Args:
        finding: the linear maps.
        choices: what becomes of their groups, one for each node (see `settle`), and of tables and
            layers of forms that are off.
    """
    group_of = _group_of(finding)
    tables = {m.site: g for g in choices for m in g.members if m.site not in group_of}
    decisions = []
    for entry in finding.entries:
        if isinstance(entry, Refused):
            table = None if entry.site is None else tables.get(entry.site)
            refused = _refused(entry)
            if table is not None:  # of a form that is off, and yet in a format
                refused = replace(refused, group=table, choice=_of_table(refused, choices[table]))
            decisions.append(refused)
            continue
        site = next(site for site in entry.sites if group_of[site] in choices)
        group = group_of[site]
        decisions.append(
            Decision(
                node=entry.node,
                form=site.form.name,
                site=site,
                group=group,
                choice=choices[group],
                weight=site.operand.name,
                size=group.elements if group.heads else site.operand.size,
                shape=group.mapped if group.heads else (site.m, site.n),
                slices=site.slices,
            )
        )
    return tuple(decisions)


def _of_table(refused: Decision, choice: Choice) -> Choice:
    if choice.format is None and not choice.reason.startswith(STAYS):
        return refused.choice
    return replace(choice, reason=f"{refused.choice.reason}; {choice.reason}")


def _refused(entry: Refused) -> Decision:
    refusal, site = entry.refusal, entry.site
    slices, shape = 1, refusal.shape
    if site is not None:
        slices, shape = site.slices, (site.m, site.n)
    elif refusal.shape is not None and len(refusal.shape) > 1:
        slices, shape = math.prod(refusal.shape[:-2]), refusal.shape[-2:]
    else:
        shape = None
    return Decision(
        node=entry.node,
        form=entry.form.name,
        site=site,
        group=None,
        choice=Choice(None, refusal.reason, excluded=entry.paired == "half"),
        weight=refusal.weight,
        size=0 if entry.paired == "head" else refusal.size,
        shape=shape if shape is None else (shape[0], shape[1]),
        slices=slices,
        off=entry.off,
    )


def _percent(share: float) -> str:
    return f"{100 * share:g} %"
