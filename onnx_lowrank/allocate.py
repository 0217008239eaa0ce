"""Allocate: ranks for all layers together, least damage for what they cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnx_lowrank.choose import Choice, Goal, Measurement
from onnx_lowrank.damage import Curve
from onnx_lowrank.find import Candidates, Finding, Group
from onnx_lowrank.numerics.knapsack import Item, Solution
from onnx_lowrank.numerics.ranks import energy_at

__all__ = ["CostOf", "Ladders", "bytes_of", "parameters_of"]

CostOf = Callable[[Group, int | None], float | None]
"""What a group costs at a rank, or (None) dense; None where that is not known."""


def parameters_of(group: Group, rank: int | None) -> float:
    """Parameters that a group leaves in the model."""
    slices, m, n = group.shape
    dense = slices * m * n
    if rank is None:
        return float(dense)
    return float(slices * rank * (m + n) + (dense if group.others else 0))


def bytes_of(group: Group, rank: int | None) -> float:
    """Bytes that a group leaves in the file."""
    return parameters_of(group, rank) * group.matrix.tensor.dtype.itemsize


@dataclass(frozen=True, eq=False)
class _Rung:
    """One option: a group at a rank, or (None) all of them dense."""

    group: Group | None
    rank: int | None
    damage: float


class Ladders:
    """The options of every layer, and what becomes of a choice among them.

    Layers that can be factored in several ways (a convolution) have the options of all ways.
    """

    def __init__(
        self,
        finding: Finding,
        curves: Mapping[Group, Curve],
        measured: Mapping[Group, Measurement],
        goal: Goal,
        multiple: Callable[[Group], int | None] | None = None,
    ) -> None:
        """Options of the groups that have a curve; others keep what was decided before.

        Args:
            finding: the linear maps.
            curves: damage by rank.
            measured: the spectra, for the energy that a rank holds.
            goal: limits and rounds the ranks.
            multiple: on which multiple a group's rank should be, None for the goal's.
        """
        self._multiple = multiple
        self._curves, self._measured, self._goal = curves, measured, goal
        self._ways = list(_ways(finding, curves))
        self._rungs = [self._ladder(ways) for ways in self._ways]

    def items(self, cost: CostOf) -> list[Item]:
        """The options with their costs; what has no known cost costs what dense does."""
        items = []
        for ways, rungs in zip(self._ways, self._rungs, strict=True):
            dense = cost(ways[0], None) or 0.0
            costs = []
            for rung in rungs:
                own = dense if rung.group is None else cost(rung.group, rung.rank)
                costs.append(dense if own is None else own)
            damages = [rung.damage for rung in rungs]
            items.append(Item(np.array(costs, np.float64), np.array(damages, np.float64)))
        return items

    def choices(self, solution: Solution) -> dict[Group, Choice]:
        """What becomes of every group with a curve; ways that were not taken are left out."""
        choices = {}
        for ways, rungs, pick in zip(self._ways, self._rungs, solution.picks, strict=True):
            rung = rungs[pick]
            group = rung.group or ways[0]
            choices[group] = self._choice(group, rung)
        return choices

    @property
    def groups(self) -> list[Group]:
        """All groups that have options."""
        return [group for ways in self._ways for group in ways]

    def _choice(self, group: Group, rung: _Rung) -> Choice:
        of = self._measured[group].of
        if rung.rank is None:
            return Choice(None, "dense: any rank here would hurt more than elsewhere", of=of)
        squares = self._measured[group].squares
        assert squares is not None
        curve = self._curves[group]
        guessed = "" if curve.measured else " (guessed from other layers)"
        why = f"rank {rung.rank} of the budget, predicted damage {rung.damage:.3g}{guessed}"
        return Choice(rung.rank, why, energy_at(squares, rung.rank), rung.rank, of)

    def _ladder(self, ways: Sequence[Group]) -> list[_Rung]:
        rungs = [_Rung(None, None, 0.0)]
        for group in ways:
            curve = self._curves[group]
            for rank in self._ranks(group):
                damage = curve.at(rank)
                if np.isfinite(damage):
                    rungs.append(_Rung(group, rank, damage))
        return rungs

    def _ranks(self, group: Group) -> list[int]:
        """The ranks to choose from: multiples, and below the first of them powers of two."""
        limit = self._goal.largest(group)
        own = None if self._multiple is None else self._multiple(group)
        multiple = own or self._goal.rank_multiple
        small = [2**power for power in range(16) if 2**power < min(multiple, limit + 1)]
        return [*small, *range(multiple, limit + 1, multiple)]


def _ways(finding: Finding, curves: Mapping[Group, Curve]) -> list[tuple[Group, ...]]:
    """Groups that exclude each other, because they factor the same nodes."""
    group_of = {member.site: group for group in finding.groups for member in group.members}
    ways: dict[Group, tuple[Group, ...]] = {}
    for entry in finding.entries:
        if isinstance(entry, Candidates):
            own = [group_of[site] for site in entry.sites if group_of[site] in curves]
            taken = next((ways[group] for group in own if group in ways), None)
            if own and taken is None:
                ways[own[0]] = tuple(dict.fromkeys(own))
                for group in own[1:]:
                    ways[group] = ways[own[0]]
    return list(dict.fromkeys(ways.values()))
