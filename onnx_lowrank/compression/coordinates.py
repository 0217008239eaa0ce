"""Coordinates: whether factors are fitted to what the outputs feel, decided before the search.

Layers get pairs that hold the same energy, once fitted to their own outputs and once to what the
model's outputs feel of them (Fisher information).  Where the second is nearer to the
original on samples kept aside, damage, ranks and pairs are all found in these coordinates: ranks
that were found for one fit are not the best ones of the other.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import onnx_ir as ir

from onnx_lowrank.compression.context import Context
from onnx_lowrank.compression.effort import FISHER, error_of, judging_probe
from onnx_lowrank.fitting.fit import fit
from onnx_lowrank.fitting.statistics import Statistics
from onnx_lowrank.maps.choice import Choice, Spectrum
from onnx_lowrank.maps.find import Group
from onnx_lowrank.ranks.goals import Goal
from onnx_lowrank.ranks.recipe import Recipe
from onnx_lowrank.schema.report import EffortStep

__all__ = ["Coordinates", "decided"]

# The share of parameters at which the fits are compared where the goal does not name one.
_SHARE = 0.5
# Of the range that the energy of the comparison is looked for in.
_HALVINGS = 20


@dataclass(frozen=True, eq=False)
class Coordinates:
    """Layers measured in some coordinates.

    Attributes:
        statistics: what factors are fitted to while ranks are searched, with components.
        spectra: of every group.
    """

    statistics: Statistics
    spectra: Mapping[Group, Spectrum]


def decided(
    context: Context,
    model: ir.Model,
    methods: Mapping[str, str | None],
    plain: Coordinates,
    measure: Callable[[Statistics], Coordinates],
) -> tuple[Coordinates, EffortStep | None]:
    """The coordinates that are better, and what was tried to find out.

    Nothing is tried where ranks are not searched; then Fisher information is tried, if at all, at
    the ranks of the result (`onnx_lowrank.compression.effort`).

    Args:
        context: the run.
        model: the model, simplified.
        methods: that the effort asks for -> why one is not worth a try, None where it is.
        plain: the layers, measured by their own outputs.
        measure: the same in the coordinates of other statistics.
    """
    budget, search = context.settings.budget, plain.statistics
    untried = methods.get(FISHER, "") is not None or not search.felt
    if budget is None or untried or isinstance(context.settings.recipe, Recipe):
        return plain, None
    if context.late():
        return plain, EffortStep(FISHER, False, None, None, 0.0, "the time is up")
    start = time.perf_counter() - context.stages.seconds.get("fisher", 0.0)
    share = budget.value if budget.kind == "keep" else _SHARE
    choices = _alike(plain, context.settings.goal, share)
    felt = measure(replace(search, fisher=search.felt, bases={}))
    with context.stages("effort"):
        finite = [group for group, spectrum in plain.spectra.items() if spectrum.finite]
        probe = judging_probe(context, model, finite)  # later stages ask about others
        errors = []
        for own in (plain, felt):
            fitting = replace(own.statistics, held={})
            pairs = dict(fit(choices, fitting, lambda _: None, context.crew))
            errors.append(error_of(probe, pairs))
    before, after = errors
    seconds = time.perf_counter() - start
    if before is None or after is None:
        why = "no sample kept aside shows an error"
        return plain, EffortStep(FISHER, False, None, None, seconds, why)
    taken, of = after < before, context.settings.damage_of
    at = f"with {share:.0%} of the layers, before ranks are searched".replace("%", " %")
    step = EffortStep(FISHER, taken, before, after, seconds, error_of=of, at=at)
    return felt if taken else plain, step


def _alike(measured: Coordinates, goal: Goal, share: float) -> dict[Group, Choice]:
    """Ranks that hold the same energy in every layer, and a share of the parameters together.

    One share of the parameters for each layer would lose nearly everything in a layer of few
    outputs, such as a classifier, and its error would hide all others.  A layer that would need
    more than its largest rank stays dense, as a search would leave it.
    """
    groups = [group for group in measured.statistics.bases if goal.largest(group) > 0]
    budget = share * sum(math.prod(group.shape) for group in groups)
    low, high = 0.0, 1.0
    ranks: dict[Group, float] = {}
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        tried = {group: _needed(measured.spectra[group], middle) for group in groups}
        kept = {group: rank for group, rank in tried.items() if rank <= goal.largest(group)}
        if sum(_size(group, kept.get(group)) for group in groups) <= budget:
            low, ranks = middle, kept
        else:
            high = middle
    return {group: Choice(int(rank), "reference") for group, rank in ranks.items()}


def _size(group: Group, rank: float | None) -> float:
    slices, m, n = group.shape
    return slices * (m * n if rank is None else rank * (m + n))


def _needed(spectrum: Spectrum, energy: float) -> float:
    """The rank that holds a share of the energy; infinite beyond the components that are known."""
    known = 0 if spectrum.squares is None else len(spectrum.squares)
    held = spectrum.held(known) if known else None
    return spectrum.needed(energy) if held is not None and held >= energy else math.inf
