"""Measure: the spectra of the groups, layers in parallel."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from onnx_lowrank.fitting.statistics import Statistics
from onnx_lowrank.maps.choice import EnergyOf, Spectrum
from onnx_lowrank.maps.find import Group
from onnx_lowrank.numerics.parallel import map_layers, working_set
from onnx_lowrank.numerics.spectrum import row_blocks
from onnx_lowrank.numerics.stacks import squares

__all__ = ["group_memory", "largest_first", "measure"]


def largest_first(groups: Sequence[Group]) -> list[Group]:
    """The groups by falling work, so that the cores finish together; the order is stable."""
    return sorted(groups, key=lambda group: -group_memory(group))


def group_memory(group: Group) -> int:
    """Bytes that measuring or factoring a group takes."""
    slices, m, n = group.shape
    return working_set(m, n) + 8 * (slices - 1) * min(m, n) * (m + n)


def measure(
    groups: Sequence[Group],
    statistics: Statistics,
    advance: Callable[[int], None],
    *,
    spectra: bool = True,
) -> dict[Group, Spectrum]:
    """The spectrum of every group's matrix, values only.

    Args:
        groups: what to measure.
        statistics: moments of their inputs; a group without is measured by its weight alone.
        advance: called with the number of elements of every group that is done.
        spectra: False only looks whether the weights are finite.
    """
    measured = {}

    def work(group: Group) -> Spectrum:
        return _measure_one(group, statistics, spectra)

    for group, result in map_layers(work, largest_first(groups), group_memory):
        measured[group] = result
        advance(group.matrix.size)
    return measured


def _measure_one(group: Group, statistics: Statistics, spectra: bool) -> Spectrum:
    moments, fisher = statistics.fit.get(group), statistics.coordinates(group)
    stack = group.matrix.numpy()
    try:
        finite = all(
            bool(np.isfinite(matrix[block]).all())
            for matrix in stack
            for block in row_blocks(*matrix.shape)
        )
        values = squares(fisher.into(stack), moments) if finite and spectra else None
    finally:
        del stack
    group.matrix.release()
    weighed: EnergyOf = "fisher" if fisher.known else "output"
    return Spectrum(values, finite, "weight" if moments is None else weighed)
