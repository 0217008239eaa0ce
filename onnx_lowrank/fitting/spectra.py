"""Measure: the spectra of the groups and their leading components, layers in parallel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnx_lowrank.fitting.layers import LayerArrays, arrays_of
from onnx_lowrank.fitting.statistics import Statistics
from onnx_lowrank.graph.spool import Spool
from onnx_lowrank.maps.choice import EnergyOf, Spectrum
from onnx_lowrank.maps.find import Group
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.components import Basis
from onnx_lowrank.numerics.crew import HERE, Crew
from onnx_lowrank.numerics.engine import engine_of
from onnx_lowrank.numerics.parallel import working_set
from onnx_lowrank.numerics.sketch import sketch
from onnx_lowrank.numerics.spectrum import row_blocks, squared_norm
from onnx_lowrank.numerics.stacks import Leading, StackComponents, energy_of
from onnx_lowrank.numerics.units import Units

__all__ = ["Wish", "group_memory", "largest_first", "measure", "measured"]

Wish = Callable[[Spectrum], int | None]
"""By the spectrum of a layer, of how many components the vectors are wanted; None for none."""


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
    energy: float | None = None,
    wanted: Callable[[Group], Wish] | None = None,
    folder: Path | None = None,
    crew: Crew = HERE,
) -> tuple[dict[Group, Spectrum], dict[Group, tuple[Leading, ...]]]:
    """The spectrum of every group's matrix, and its leading components where they are wanted.

    Args:
        groups: what to measure.
        statistics: moments of their inputs; a group without is measured by its weight alone.
        advance: called with the number of elements of every group that is done.
        spectra: False only looks whether the weights are finite.
        energy: the only share of the energy that is asked about, if so: only so many components
            are found then where they are few.
        wanted: of a group a function that can be pickled: of how many components the vectors are
            wanted, by the spectrum; None for none.
        folder: where vectors wait; default: the system's temporary one.
        crew: who does the work.
    """
    found: dict[Group, Spectrum] = {}
    bases: dict[Group, tuple[Leading, ...]] = {}

    def given(group: Group) -> _Measuring:
        return _Measuring(
            arrays_of(group, statistics, judged=False),
            _weighed(group, statistics),
            spectra,
            energy,
            None if wanted is None else wanted(group),
            crew.device,
        )

    with Spool(folder) as spool:
        items = largest_first(groups)
        answers = crew.map(measured, items, given, group_memory)
        for group, (spectrum, own) in answers:
            found[group] = spectrum
            if own:
                bases[group] = tuple(_spooled(basis, spool) for basis in own)
            advance(group.matrix.size)
    return found, bases


@dataclass(frozen=True, eq=False)
class _Measuring:
    """What is measured of a layer."""

    layer: LayerArrays
    of: EnergyOf
    spectra: bool
    energy: float | None
    wanted: Wish | None
    device: str


def _weighed(group: Group, statistics: Statistics) -> EnergyOf:
    """What a group's squares are the energy of."""
    if group not in statistics.fit:
        return "weight"
    return "fisher" if statistics.coordinates(group).known else "output"


def measured(task: _Measuring) -> tuple[Spectrum, tuple[Leading, ...]]:
    """The spectrum of a layer, and its leading components."""
    layer, of = task.layer, task.of
    stack, moments = layer.stack, layer.moments
    heads = [matrix for head in layer.heads for matrix in head]
    if not all(_finite(matrix) for matrix in (*stack, *heads)):
        return Spectrum(None, False, of), ()
    if not task.spectra:
        return Spectrum(None, True, of), ()
    if moments is None and task.energy is not None and len(stack) == 1:
        found = sketch(stack[0], energy=task.energy)
        if found is not None:
            return Spectrum(found.squares, True, of, found.rest), (found.basis,)
    if layer.selects:
        return _units(layer, of)
    components = StackComponents(
        layer.fisher.into(stack), moments, task.energy, engine_of(task.device)
    )
    spectrum = Spectrum(components.squares, True, of)
    rank = None if task.wanted is None else task.wanted(spectrum)
    bases: tuple[Leading, ...] = ()
    if rank:
        bases = components.bases(rank)
        if stack.dtype != np.float64:
            bases = tuple(basis.narrow() for basis in bases)
    return spectrum, bases


def _units(layer: LayerArrays, of: EnergyOf) -> tuple[Spectrum, tuple[Leading, ...]]:
    """What units in front of a layer hold of its outputs; nothing without samples."""
    if layer.moments is None:
        return Spectrum(None, True, of), ()
    (moments,), (matrix,) = layer.moments, layer.fisher.into(layer.stack)
    units = Units.of(matrix, moments.fitting().second)
    return Spectrum(units.squares(energy_of(matrix, moments.centre)), True, of), (units,)


def _finite(matrix: Array) -> bool:
    """Whether there is no NaN and no Inf."""
    if matrix.dtype != np.float64 and np.isfinite(squared_norm(matrix)):
        return True
    return all(bool(np.isfinite(matrix[block]).all()) for block in row_blocks(*matrix.shape))


def _spooled(basis: Leading, spool: Spool) -> Leading:
    if isinstance(basis, Units):
        return basis  # a few numbers for each unit
    return Basis(np.asarray(spool.store(basis.vectors, "basis").numpy()), basis.transposed)
