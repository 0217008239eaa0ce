"""Damage: what factoring a layer does to the model's outputs, measured end to end.

Every layer alone is given a pair of one reference rank r₀, the model is run, and the distance of
its outputs is taken as the damage d.  At other ranks the damage follows the energy that the layer
loses, ``d(r) = d · tail(r) / tail(r₀)``, and that of several layers adds up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnx_lowrank.calibrate import Statistics
from onnx_lowrank.choose import Choice, Goal, Measurement
from onnx_lowrank.find import Group
from onnx_lowrank.fit import fit
from onnx_lowrank.numerics.ranks import break_even
from onnx_lowrank.probe import Probe
from onnx_lowrank.progress import Advance

__all__ = ["Curve", "damage_curves"]


@dataclass(frozen=True, eq=False)
class Curve:
    """Damage of one group as a function of its rank.

    Attributes:
        rank: the reference rank.
        damage: measured there; mean relative square error of the model's outputs.
        tails: energy outside the first r components, shape [s + 1], r = 0…s.
        measured: False where it is a guess from other layers, because the weight cannot be
            exchanged.
    """

    rank: int
    damage: float
    tails: npt.NDArray[np.float64]
    measured: bool = True

    def at(self, rank: int) -> float:
        """The damage at a rank."""
        tail = float(self.tails[min(rank, len(self.tails) - 1)])
        if tail <= 0.0:
            return 0.0
        reference = float(self.tails[self.rank])
        return self.damage * tail / reference if reference > 0.0 else math.inf

    @property
    def lost(self) -> float:
        """Share of the energy that is lost at the reference rank."""
        return float(self.tails[self.rank] / self.tails[0]) if self.tails[0] > 0.0 else 0.0


def damage_curves(
    groups: Sequence[Group],
    measured: Mapping[Group, Measurement],
    statistics: Statistics,
    goal: Goal,
    probe: Probe,
    advance: Advance,
) -> dict[Group, Curve]:
    """Factor each group alone and run the samples.

    Args:
        groups: which; all of them have a finite matrix with a spectrum.
        measured: their spectra.
        statistics: what the factors are fitted to.
        goal: limits the rank.
        probe: runs the model.
        advance: called with 1 for every group.
    """
    tails = {group: _tails(measured[group]) for group in groups}
    ranks = {group: _reference(group, tails[group], goal) for group in groups}
    exact = [group for group in groups if ranks[group] == 0]
    curves = {group: Curve(0, 0.0, tails[group]) for group in exact}
    advance(len(exact))
    open_groups = [g for g in probe.groups if ranks.get(g)]
    choices = {group: Choice(ranks[group], "reference") for group in open_groups}
    for group, factors in fit(choices, Statistics(statistics.fit), lambda _: None):
        curves[group] = Curve(ranks[group], probe.damage({group: factors}), tails[group])
        advance(1)
    known = [curve.damage / curve.lost for curve in curves.values() if curve.lost > 0.0]
    sensitivity = float(np.median(known)) if known else 1.0
    for group in groups:
        if group not in curves:
            curve = Curve(ranks[group], 0.0, tails[group], measured=False)
            curves[group] = Curve(curve.rank, sensitivity * curve.lost, curve.tails, measured=False)
            advance(1)
    return curves


def _tails(measurement: Measurement) -> npt.NDArray[np.float64]:
    assert measurement.squares is not None
    return np.concatenate([np.cumsum(measurement.squares[::-1])[::-1], [0.0]])


def _reference(group: Group, tails: npt.NDArray[np.float64], goal: Goal) -> int:
    """Half the break-even rank, where something is lost; 0 where every rank is exact."""
    _, m, n = group.shape
    lossy = int(np.count_nonzero(tails > 0.0))  # ranks 0…lossy-1 lose something
    wanted = max(1, min(round(break_even(m, n) / 2), goal.largest(group)))
    return max(0, min(wanted, lossy - 1))
