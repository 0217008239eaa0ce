"""Damage: what factoring a layer does to the model's outputs, as a function of its rank.

The shape of the curve comes from second moments, for all ranks at once: what a pair of rank r loses
of the layer's outputs on samples that it was not fitted to, weighed by what the model's outputs
feel of errors there (`onnx_lowrank.numerics.felt`).  Its scale is measured end to end: the layer
alone is given a pair of a reference rank, the model is run, and the distance of its outputs is the
damage d, so that ``d(r) = d(r₀) · tail(r) / tail(r₀)``.  Where it is not known what the outputs
feel, there are two reference ranks, between which the damage follows a power of the energy.  Layers
that share a first factor have the sum of their damages, each on its own scale.

A damage of exactly 0 is no finding: no sample reaches the layer (a branch that is never taken), or
the outputs that are compared do not show it.  Such a layer is taken to do to the outputs what it
does to its own: its relative square error stands for its damage.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_lowrank.fitting.fit import fit
from onnx_lowrank.fitting.spectra import group_memory, largest_first
from onnx_lowrank.fitting.statistics import Statistics
from onnx_lowrank.maps.choice import Choice, Joint, Spectrum
from onnx_lowrank.maps.find import Group
from onnx_lowrank.numerics.crew import HERE, Crew
from onnx_lowrank.numerics.felt import Weigh
from onnx_lowrank.numerics.joint import joint_tails
from onnx_lowrank.numerics.parallel import map_layers
from onnx_lowrank.numerics.ranks import break_even, largest_rank
from onnx_lowrank.numerics.stacks import lost_energies
from onnx_lowrank.progress import Advance
from onnx_lowrank.ranks.alone import SAMPLES, Halves, alone
from onnx_lowrank.ranks.goals import Goal
from onnx_lowrank.ranks.probe import Probe

__all__ = ["STEPS", "DamageCurve", "DamageFrom", "damage_curves", "find_joints", "joint_curves"]

# So many groups of one activation are tried in all subsets, more only all together.
_SUBSETS = 3
# Reference ranks as shares of the break-even rank; where the weighed energy gives the shape of the
# curve the first is enough.
_SHARES = (0.5, 0.125)
STEPS = len(_SHARES)
"""How many units of progress a group is."""
# The same of the width between two maps, of which less is left out.
_INNER_SHARES = (0.8, 0.5)
DamageFrom = Literal["outputs", "other layers", "own error"]
"""What a damage is known from: the model's outputs; those of other layers, because the weight
cannot be exchanged; the layer's own error, because the outputs do not show it."""


@dataclass(frozen=True, eq=False)
class DamageCurve:
    """Damage of one group by its rank.

    Attributes:
        points: reference ranks, falling, and the damage at each: mean relative square error of
            the model's outputs.
        tails: energy outside the first r components, as far as it is felt, shape [s + 1],
            r = 0…s; no larger rank is asked for.
        known_from: what the damage is known from.
    """

    points: tuple[tuple[int, float], ...]
    tails: npt.NDArray[np.float64]
    known_from: DamageFrom = "outputs"

    @property
    def measured(self) -> bool:
        """Whether the outputs were seen to change."""
        return self.known_from == "outputs"

    def at(self, rank: int) -> float:
        """The damage at a rank; it never falls with it."""
        tail = self._tail(rank)
        if tail <= 0.0 or not self.points:
            return 0.0
        above = [point for point in self.points if point[0] >= rank]
        below = [point for point in self.points if point[0] <= rank]
        if above and below and above[-1] != below[0]:
            (high, low_damage), (low, high_damage) = above[-1], below[0]
            ends = self._tail(high), self._tail(low)
            if 0.0 < ends[0] < ends[1] and 0.0 < low_damage < high_damage:
                power = math.log(high_damage / low_damage) / math.log(ends[1] / ends[0])
                return float(low_damage * (tail / ends[0]) ** power)
        reference, damage = below[0] if below else above[-1]
        return damage * tail / self._tail(reference)

    @property
    def sensitivity(self) -> float:
        """Damage for each share of the energy that is lost, at the first reference rank."""
        if not self.points:
            return 0.0
        rank, damage = self.points[0]
        return damage * float(self.tails[0]) / self._tail(rank)

    @property
    def slope(self) -> float:
        """Damage for each unit of energy that is lost, at the first reference rank."""
        if not self.points:
            return 0.0
        rank, damage = self.points[0]
        return damage / self._tail(rank)

    @property
    def full(self) -> int:
        """The largest rank of the curve."""
        return len(self.tails) - 1

    def held(self, rank: int) -> float:
        """The energy, as far as it is felt, that a pair of a rank holds."""
        return max(float(self.tails[0]) - self._tail(rank), 0.0)

    def _tail(self, rank: int) -> float:
        return float(self.tails[min(rank, len(self.tails) - 1)])


def damage_curves(
    groups: Sequence[Group],
    measured: Mapping[Group, Spectrum],
    statistics: Statistics,
    goal: Goal,
    probe: Probe,
    advance: Advance,
    earlier: Callable[[Group], DamageCurve | None] = lambda _: None,
    crew: Crew = HERE,
) -> dict[Group, DamageCurve]:
    """Factor each group alone and run the samples.

    Args:
        groups: which; all of them have a finite matrix with a spectrum.
        measured: their spectra.
        statistics: what the factors are fitted to; its held moments, if any, are those of the
            probe's samples.
        goal: limits the ranks.
        probe: runs the model.
        advance: called with `STEPS` for every group, in one or more calls.
        earlier: a group's curve where it is known already; it is taken if it goes far enough.
        crew: who fits the factors.
    """
    taken = {}
    for group in groups:
        curve = earlier(group)
        if curve is not None and len(curve.tails) > min(goal.largest(group), *group.shape[1:]):
            taken[group] = curve
    advance(STEPS * len(taken))
    groups = [group for group in groups if group not in taken]
    tails = _tails(groups, measured, statistics, crew.room())
    weighed = {
        group
        for group in statistics.felt.keys() & statistics.bases.keys()
        if not group.selects or statistics.coordinates(group).known
    }
    ranks = {
        group: _references(group, tails[group], goal)[: 1 if group in weighed else None]
        for group in groups
    }
    points: dict[Group, list[tuple[int, float]]] = {group: [] for group in groups}
    fitted = replace(statistics, held={})
    within = set(probe.groups)
    measurements = sum(map(len, ranks.values()))
    halves = Halves()
    for number in range(len(_SHARES)):
        choices = {
            group: Choice(own[number], "reference")
            for group, own in ranks.items()
            if number < len(own) and group in within
        }
        for group, factors in fit(choices, fitted, lambda _: None, crew):
            constants = factors.constants(group)
            damage = alone(probe, constants, measurements, SAMPLES, halves)
            points[group].append((factors.rank, 0.0 if damage is None else damage))
            last = number == len(ranks[group]) - 1
            advance(STEPS - number if last else 1)
    curves = {
        group: DamageCurve(tuple(points[group]), tails[group])
        for group in groups
        if any(damage > 0.0 for _, damage in points[group]) or not ranks[group]
    }
    known = [curve.sensitivity for curve in curves.values() if curve.points]
    typical = float(np.median(known)) if known else 1.0
    for group in groups:
        if group not in curves:
            rank = ranks[group][0]
            lost = float(tails[group][rank] / tails[group][0])
            # What was not seen may be all that another sample sees.
            unseen = bool(points[group])
            scale = max(typical, 1.0) if unseen else typical
            curves[group] = DamageCurve(
                ((rank, scale * lost),), tails[group], "own error" if unseen else "other layers"
            )
    advance(STEPS * sum(not own for own in points.values()))
    return curves | taken


def joint_curves(
    joints: Sequence[Joint],
    curves: Mapping[Group, DamageCurve],
    statistics: Statistics,
    goal: Goal,
    advance: Advance,
    crew: Crew = HERE,
) -> dict[Joint, DamageCurve]:
    """Damage of groups that share their first factor, from that of each alone.

    Args:
        joints: groups with moments.
        curves: of the groups by themselves.
        statistics: what the factors are fitted to, and held moments if any.
        goal: limits the ranks.
        advance: called with 1 for every joint.
        crew: what work in this process may hold.
    """

    def work(joint: Joint) -> npt.NDArray[np.float64]:
        matrices, weighs = [], []
        for group in joint.groups:
            matrices.append(statistics.coordinates(group).into(group.matrix.numpy()[0]))
            weighs.append(_scaled(statistics.weigh(group), curves[group].slope))
        own, unseen = statistics.fit[joint.groups[0]], statistics.held.get(joint.groups[0])
        other = None if unseen is None else unseen[0]
        rank = min(_joint_limit(joint, goal), joint.groups[0].shape[1])
        return joint_tails(matrices, joint.scales, own[0], other, rank, weighs)

    def memory(joint: Joint) -> int:
        return sum(group_memory(group) for group in joint.groups) * len(joint.groups)

    found = {}
    for joint, tails in map_layers(work, joints, memory, room=crew.room()):
        # The tails are damages already: one point says so.
        lossy = int(np.count_nonzero(tails > 0.0)) - 1
        points = ((lossy, float(tails[lossy])),) if lossy >= 0 else ()
        found[joint] = DamageCurve(points, tails)
        advance(1)
    return found


def _joint_limit(joint: Joint, goal: Goal) -> int:
    m, widths = joint.groups[0].shape[1], [group.shape[2] for group in joint.groups]
    return largest_rank(m, sum(widths), 1.0 - goal.min_gain)


def _scaled(weigh: Weigh, scale: float) -> Weigh:
    """What is felt, times a number that is not below 0."""
    root = math.sqrt(scale)
    return lambda array: root * weigh(array)


def find_joints(
    curves: Mapping[Group, DamageCurve],
    measured: Mapping[Group, Spectrum],
    statistics: Statistics,
    model: ir.Model,
) -> list[Joint]:
    """Groups that read one activation in one way, and could share their first factor.

    Args:
        curves: of the groups; the damage for each unit of energy that is lost scales its share.
        measured: their spectra.
        statistics: groups without moments are left out.
        model: whose main graph they are in.
    """
    alike: dict[tuple[object, ...], list[Group]] = {}
    for group, curve in curves.items():
        member, (slices, m, _) = group.members[0], group.shape
        site = member.site
        value, reading = site.form.activation(site), site.form.reading(site)
        plain = len(group.members) == 1 and slices == 1 and not member.transposed
        inside = site.node.graph is model.graph and group in statistics.fit
        if not (plain and inside and site.form.shares_first and curve.points and curve.measured):
            continue
        if value is None or group.others or reading != ("rows", m):
            continue
        alike.setdefault((value, site.operand.dtype, group.matrix.tensor.dtype), []).append(group)
    joints = []
    for groups in alike.values():
        if len(groups) > 1:
            slopes = [_slope(curves[group], measured[group]) for group in groups]
            least = 1e-6 * max(slopes)
            if least <= 0.0:
                continue
            scales = [math.sqrt(max(slope, least)) for slope in slopes]
            both = list(zip(groups, scales, strict=True))
            sizes = range(2, len(both) + 1) if len(both) <= _SUBSETS else [len(both)]
            for chosen in itertools.chain(*(itertools.combinations(both, n) for n in sizes)):
                own, scaled = zip(*chosen, strict=True)
                joints.append(Joint(own, scaled))
    return joints


def _slope(curve: DamageCurve, spectrum: Spectrum) -> float:
    """Damage for each unit of plain energy that is lost, at the first reference rank."""
    assert spectrum.squares is not None
    rank, damage = curve.points[0]
    lost = float(spectrum.squares[rank:].sum()) + spectrum.rest
    return damage / lost if lost > 0.0 else 0.0


def _tails(
    groups: Sequence[Group],
    measured: Mapping[Group, Spectrum],
    statistics: Statistics,
    room: int | None,
) -> dict[Group, npt.NDArray[np.float64]]:
    """What is felt of the energy outside the first r components.

    With moments on samples that these are not fitted to, if any.
    """
    known = [group for group in groups if group in statistics.fit and group in statistics.bases]

    def work(group: Group) -> npt.NDArray[np.float64]:
        return lost_energies(
            statistics.coordinates(group).into(group.matrix.numpy()),
            statistics.bases[group],
            statistics.fit[group],
            statistics.held.get(group),
            statistics.weigh(group),
        )

    found = dict(map_layers(work, largest_first(known), group_memory, room=room))
    for group in groups:
        if group not in found:
            energies = measured[group].squares
            assert energies is not None
            found[group] = _summed(energies)
    return found


def _summed(energies: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Energy outside of the first r components, r = 0…s."""
    # What is lost only by rounding is not lost.
    kept = np.where(energies > 1e-14 * energies.sum(), energies, 0.0)
    return np.concatenate([np.cumsum(kept[::-1])[::-1], [0.0]])


def _references(group: Group, tails: npt.NDArray[np.float64], goal: Goal) -> tuple[int, ...]:
    """Falling ranks at which something is lost; none where every rank is exact."""
    if group.heads:
        most = min(goal.largest(group), int(np.count_nonzero(tails > 0.0)) - 1)
        shares = _SHARES if group.inner is None else _INNER_SHARES
        wanted = [min(max(1, round(share * group.shape[1])), most) for share in shares]
        return tuple(rank for rank in dict.fromkeys(wanted) if rank > 0)
    _, m, n = group.shape
    return tuple(rank for rank in _below(m, n, tails, goal.min_gain) if rank <= goal.largest(group))


def _below(m: int, n: int, tails: npt.NDArray[np.float64], min_gain: float) -> tuple[int, ...]:
    lossy = int(np.count_nonzero(tails > 0.0)) - 1  # the last rank that loses something
    most = min(largest_rank(m, n, 1.0 - min_gain), lossy)
    wanted = [min(max(1, round(share * break_even(m, n))), most) for share in _SHARES]
    return tuple(rank for rank in dict.fromkeys(wanted) if rank > 0)
