"""Allocate: ranks and formats for all layers together, least damage for what they cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from onnx_lowrank.errors import InputError, named
from onnx_lowrank.graph.walk import node_name
from onnx_lowrank.maps.choice import Choice, Joint, Spectrum
from onnx_lowrank.maps.find import Factorable, Finding, Group
from onnx_lowrank.maps.formats import Format, Variant
from onnx_lowrank.numerics.knapsack import Item, Solution
from onnx_lowrank.numerics.ranks import largest_rank
from onnx_lowrank.phrases import listed
from onnx_lowrank.ranks.damage import DamageCurve, DamageFrom
from onnx_lowrank.ranks.formats import ONLY_FLOATS, Formats
from onnx_lowrank.ranks.goals import Goal
from onnx_lowrank.ranks.rounding_damage import RoundingDamage

__all__ = ["CostOf", "Ladders", "Priced", "bytes_of", "parameters_of"]

# Points of a front of several layers together that are kept.
_MERGED = 200
_KNOWN_FROM: dict[DamageFrom, str] = {
    "outputs": "predicted damage {:.3g}",
    "other layers": "predicted damage {:.3g} (guessed from other layers)",
    "own error": "damage not measured (taken to be {:.3g}, its own relative square error)",
}
# Why a layer stays dense.
_MET = "dense: the input model meets the goal as it is"
_NONE = "dense: no rank saves anything here"
_ODD = "dense: a pair here makes NaN or Inf of outputs that are numbers in the original"
_DEAR = "dense: a pair here has more damage for what it saves than elsewhere"


class CostOf(Protocol):
    """What a group costs as a variant; None where that is not known.

    ``leads`` is False for a pair whose first factor is counted with another group.
    """

    def __call__(self, group: Group, variant: Variant, leads: bool = True) -> float | None:
        """The cost."""


def parameters_of(group: Group, variant: Variant, leads: bool = True) -> float:
    """Parameters that a group leaves in the model."""
    rank = variant.rank
    pair = Choice(rank, "", leads=leads).parameters(group)
    return float(pair + (group.elements if group.others and rank is not None else 0))


def bytes_of(group: Group, variant: Variant, leads: bool = True) -> float:
    """Bytes that a group leaves in the file."""
    return float(Choice(variant.rank, "", leads=leads, format=variant.format).bytes(group))


@dataclass(frozen=True, eq=False)
class _Part:
    """What becomes of groups that are decided together: one alone, or those of a joint.

    Attributes:
        variants: by group; groups of ways that were not chosen are left out.
        damage: of the part.
        joint: set where they share their first factor.
    """

    variants: Mapping[Group, Variant]
    damage: float
    joint: Joint | None = None

    def cost(self, cost: CostOf) -> float | None:
        """Of all its groups; None where one is not known."""
        total = 0.0
        for index, (group, variant) in enumerate(self.variants.items()):
            own = cost(group, variant, self.joint is None or index == 0)
            if own is None:
                return None
            total += own
        return total


Rung = tuple[_Part, ...]
"""One option of an item."""


@dataclass(frozen=True, eq=False)
class Priced:
    """The options of every layer with their costs.

    Attributes:
        items: option 0 of each leaves its layers dense, as floats unless the user forbids it.
        ladders: what they are the options of.
    """

    items: tuple[Item, ...]
    rungs: tuple[tuple[Rung, ...], ...]
    ladders: Ladders

    @property
    def dense(self) -> float:
        """What all layers cost dense."""
        return sum(float(item.costs[0]) for item in self.items)

    def choices(self, solution: Solution) -> dict[Group, Choice]:
        """What becomes of every group with options; ways that were not taken are left out."""
        choices: dict[Group, Choice] = {}
        met = not any(solution.picks)
        for rungs, pick in zip(self.rungs, solution.picks, strict=True):
            for part in rungs[pick]:
                only = self.ladders.without(part) if len(rungs) == 1 else None
                choices |= self.ladders.chosen(part, only or (_MET if met else _DEAR))
        return choices


class Ladders:
    """The options of every layer, and what becomes of a choice among them.

    Layers that can be factored in several ways (a convolution) have the options of all ways.

    Attributes:
        groups: those with options.
        ways: the same, those together that exclude each other.
        floats: bytes of the weights of all layers with options as they are.
    """

    def __init__(
        self,
        finding: Finding,
        curves: Mapping[Group, DamageCurve],
        measured: Mapping[Group, Spectrum],
        goal: Goal,
        multiple: Callable[[Group], int | None] | None = None,
        joints: Mapping[Joint, DamageCurve] | None = None,
        formats: Mapping[Group, Formats] | None = None,
        rounding: Mapping[Group, RoundingDamage] | None = None,
    ) -> None:
        """Options of the groups with a curve or a format; others keep what was decided before.

        Args:
            finding: the linear maps.
            curves: damage by rank.
            measured: the spectra, for the energy that a rank holds.
            goal: limits and rounds the ranks.
            multiple: on which multiple a group's rank should be, None for the goal's.
            joints: damage of groups that share their first factor; each has other groups.
            formats: in which groups may be stored; the others stay floats.
            rounding: what that does to the outputs.

        Raises:
            InputError: a layer may not stay floats, and no format leaves the outputs finite.
        """
        self._formats, self._rounding = formats or {}, rounding or {}
        self._odd: dict[str, None] = {}
        self._multiple = multiple
        self._curves, self._measured, self._goal = curves, measured, goal
        self._joints = joints or {}
        ways = _ways(finding, [*curves, *self._formats])
        sets = _overlapping(self._joints)
        taken = {group for own in sets for group in own}
        self._alone = [self._ladder(own) for own in ways if not taken.intersection(own)]
        # The layers of a set each alone, and for every joint its groups together, the rest alone.
        self._together: list[list[list[list[_Part]]]] = []
        for groups, joints_of in sets.items():
            alone = {group: self._ladder((group,)) for group in groups}
            splits = [list(alone.values())]
            for joint in joints_of:
                rest = [alone[group] for group in groups if group not in joint.groups]
                splits.append([self._joint_ladder(joint), *rest])
            self._together.append(splits)
        self.groups = [group for own in ways for group in own]
        self.ways = ways
        self.floats = sum(bytes_of(own[0], Variant()) for own in ways)

    def priced(self, cost: CostOf) -> Priced:
        """The options with their costs; one whose cost is not known is none."""
        items, rungs = [], []
        priced: list[tuple[Rung, float]]
        for ladder in self._alone:
            priced = [((part,), own) for part in ladder if (own := part.cost(cost)) is not None]
            if not priced or priced[0][0][0] is not ladder[0]:
                priced = [((ladder[0],), 0.0)]  # dense has no known cost: nothing to choose
            items.append(_item(priced))
            rungs.append(tuple(rung for rung, _ in priced))
        for splits in self._together:
            merged = [_merged(split, cost) for split in splits]
            priced = [merged[0][0], *(entry for split in merged for entry in split[1:])]
            items.append(_item(priced))
            rungs.append(tuple(rung for rung, _ in priced))
        return Priced(tuple(items), tuple(rungs), self)

    def chosen(self, part: _Part, dense: str) -> dict[Group, Choice]:
        """What becomes of the groups of a part.

        Args:
            part: the part.
            dense: why a group of it has no rank.
        """
        choices = {}
        for index, (group, variant) in enumerate(part.variants.items()):
            rank, form = variant.rank, variant.format
            of = self._measured[group].of if group in self._measured else "weight"
            stored = "" if form is None else f"; weights in {form}"
            damage = part.damage if part.joint is not None else self._damage(group, variant)
            known = self._known(group, variant).format(damage)
            if rank is None:
                why = dense if form is None else f"weights in {form}, {known}"
                choices[group] = Choice(None, why, of=of, format=form)
                continue
            why = f"rank {rank} of the budget, {known}"
            energy = self._measured[group].held(rank)
            if part.joint is not None:
                names = [node_name(g.members[0].site.node) for g in part.variants if g is not group]
                why += f" together with {', '.join(names)}, whose first factor it shares"
                energy = None  # the components are those of all of them
            leads = part.joint is None or index == 0
            choices[group] = Choice(
                rank, why + stored, energy, rank, of, part.joint, leads, format=form
            )
        return choices

    def lost_by_inputs(self, choices: Mapping[Group, Choice]) -> float:
        """Damage of kernels that round what they multiply, as far as exchanged weights hide it."""
        return sum(
            self._rounding[group].unseen(
                Variant(choice.rank, choice.format), self._curves.get(group)
            )
            for group, choice in choices.items()
            if group in self._rounding
        )

    def _known(self, group: Group, variant: Variant) -> str:
        """The text of a damage."""
        known_from: DamageFrom = "outputs"
        if variant.rank is not None:
            known_from = self._curves[group].known_from
        elif group in self._rounding:
            known_from = self._rounding[group].known_from
        return _KNOWN_FROM[known_from]

    def _damage(self, group: Group, variant: Variant) -> float:
        """The damage of a group alone: of its rank, and of its format."""
        curve = self._curves.get(group)
        damage = 0.0 if variant.rank is None or curve is None else curve.at(variant.rank)
        if variant.format is not None:
            damage += self._rounding[group].at(variant, curve)
        return damage

    def _ladder(self, ways: Sequence[Group]) -> list[_Part]:
        variants = [(ways[0], Variant(None, form)) for form in self._of(ways[0]).dense]
        for group in ways:
            if group in self._curves:
                for rank in self._ranks(group, self._goal.largest(group)):
                    variants += [(group, Variant(rank, form)) for form in self._of(group).pairs]
        return self._finite([_Part({g: own}, self._damage(g, own)) for g, own in variants])

    def _joint_ladder(self, joint: Joint) -> list[_Part]:
        curve = self._joints[joint]
        m, n = joint.groups[0].shape[1], sum(group.shape[2] for group in joint.groups)
        limit = largest_rank(m, n, 1.0 - self._goal.min_gain)
        base = {group: Variant(None, self._of(group).dense[0]) for group in joint.groups}
        parts = [_Part(base, sum(self._damage(group, own) for group, own in base.items()))]
        shared = [f for f in self._of(joint.groups[0]).pairs if self._all_in(joint, f)]
        for rank in self._ranks(joint.groups[0], min(limit, *(g.shape[2] for g in joint.groups))):
            for variant in (Variant(rank, form) for form in shared):
                damage = curve.at(rank)
                if variant.format is not None:
                    damage += sum(
                        self._rounding[group].at(variant, self._curves[group])
                        for group in joint.groups
                    )
                parts.append(_Part(dict.fromkeys(joint.groups, variant), damage, joint))
        return self._finite(parts)

    def _finite(self, parts: Sequence[_Part]) -> list[_Part]:
        """Options after which the outputs hold no NaN or Inf that the original has not."""
        found = [part for part in parts if np.isfinite(part.damage)]
        if len(found) < len(parts):
            names = (node_name(group.members[0].site.node) for group in parts[0].variants)
            self._odd |= dict.fromkeys(names)
        if not found:
            raise InputError(
                f"layer {next(iter(self._odd))!r}: in every format of {named('weights')} the "
                "outputs hold NaN or Inf that the original has not; expected fp32 among them"
            )
        return found

    def without(self, part: _Part) -> str:
        """Why a part has no other option."""
        names = (node_name(group.members[0].site.node) for group in part.variants)
        return _ODD if any(name in self._odd for name in names) else _NONE

    @property
    def left_out(self) -> str:
        """The end of a sentence on options that are none, because outputs hold NaN or Inf then."""
        if not self._odd:
            return ""
        return (
            f"; a pair or format at {listed(list(self._odd), 4)} makes NaN or Inf of outputs that "
            "are numbers in the original, or the other way round"
        )

    def _all_in(self, joint: Joint, form: Format | None) -> bool:
        return all(form in self._of(group).pairs for group in joint.groups)

    def _of(self, group: Group) -> Formats:
        return self._formats.get(group, ONLY_FLOATS)

    def _ranks(self, group: Group, limit: int) -> list[int]:
        """The ranks to choose from: multiples, and below the first of them powers of two."""
        own = None if self._multiple is None else self._multiple(group)
        multiple = own or self._goal.rank_multiple
        if group.inner is not None:  # of all heads together it is the width that is a multiple
            multiple //= math.gcd(multiple, group.shape[0])
        small = [2**power for power in range(16) if 2**power < min(multiple, limit + 1)]
        return [*small, *range(multiple, limit + 1, multiple)]


def _item(priced: Sequence[tuple[Rung, float]]) -> Item:
    costs = np.array([cost for _, cost in priced], np.float64)
    damages = [sum(part.damage for part in rung) for rung, _ in priced]
    return Item(costs, np.array(damages, np.float64))


def _merged(ladders: Sequence[Sequence[_Part]], cost: CostOf) -> list[tuple[Rung, float]]:
    """Options of several ladders as those of one: the sums that nothing cheaper beats.

    The first one is all of them dense.
    """
    costs, damages = np.zeros(1), np.zeros(1)
    picks: list[Rung] = [()]
    dense = 0.0
    for ladder in ladders:
        known = ((part, part.cost(cost)) for part in ladder[1:])
        priced = [(ladder[0], ladder[0].cost(cost) or 0.0)]
        dense += priced[0][1]
        priced += [(part, own) for part, own in known if own is not None]
        all_costs = (costs[:, None] + np.array([own for _, own in priced])).ravel()
        all_damages = (damages[:, None] + np.array([part.damage for part, _ in priced])).ravel()
        order = np.lexsort((all_damages, all_costs))
        falling = np.minimum.accumulate(all_damages[order])
        kept = order[np.concatenate([[True], falling[1:] < falling[:-1]])]
        if len(kept) > _MERGED:
            kept = kept[np.unique(np.linspace(0, len(kept) - 1, _MERGED).astype(int))]
        costs, damages = all_costs[kept], all_damages[kept]
        picks = [(*picks[i // len(priced)], priced[i % len(priced)][0]) for i in kept]
    rungs = [(tuple(ladder[0] for ladder in ladders), dense)]
    for picked, own in zip(picks, costs, strict=True):
        if any(part is not ladder[0] for part, ladder in zip(picked, ladders, strict=True)):
            rungs.append((picked, float(own)))
    return rungs


def _overlapping(joints: Iterable[Joint]) -> dict[tuple[Group, ...], list[Joint]]:
    """Joints by the groups that they and those that overlap with them have."""
    sets: list[tuple[dict[Group, None], list[Joint]]] = []
    for joint in joints:
        groups, members = dict.fromkeys(joint.groups), [joint]
        for other in [own for own in sets if own[0].keys() & groups.keys()]:
            sets.remove(other)
            groups, members = {**other[0], **groups}, [*other[1], *members]
        sets.append((groups, members))
    return {tuple(groups): members for groups, members in sets}


def _ways(finding: Finding, known: Iterable[Group]) -> list[tuple[Group, ...]]:
    """Known groups, and those together that exclude each other: they factor the same nodes."""
    group_of = {member.site: group for group in finding.groups for member in group.members}
    waiting = dict.fromkeys(known)
    ways: dict[Group, tuple[Group, ...]] = {}
    for entry in finding.entries:
        if isinstance(entry, Factorable):
            own = [group_of[site] for site in entry.sites if group_of[site] in waiting]
            taken = next((ways[group] for group in own if group in ways), None)
            if own and taken is None:
                ways[own[0]] = tuple(dict.fromkeys(own))
                for group in own[1:]:
                    ways[group] = ways[own[0]]
    tables = [(group,) for group in waiting if group not in ways]  # of forms that are off
    return [*dict.fromkeys(ways.values()), *tables]
