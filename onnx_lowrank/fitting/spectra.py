"""Measure: the spectra of the groups and their leading components, layers in parallel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from onnx_lowrank.fitting.statistics import Statistics
from onnx_lowrank.graph.spool import Spool
from onnx_lowrank.maps.choice import EnergyOf, Spectrum
from onnx_lowrank.maps.find import Group
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.components import Basis
from onnx_lowrank.numerics.parallel import map_layers, working_set
from onnx_lowrank.numerics.sketch import sketch
from onnx_lowrank.numerics.spectrum import row_blocks, squared_norm
from onnx_lowrank.numerics.stacks import StackComponents

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
    energy: float | None = None,
    wanted: Callable[[Group, Spectrum], int | None] | None = None,
    folder: Path | None = None,
) -> tuple[dict[Group, Spectrum], dict[Group, tuple[Basis, ...]]]:
    """The spectrum of every group's matrix, and its leading components where they are wanted.

    Args:
        groups: what to measure.
        statistics: moments of their inputs; a group without is measured by its weight alone.
        advance: called with the number of elements of every group that is done.
        spectra: False only looks whether the weights are finite.
        energy: the only share of the energy that is asked about, if so: only so many components
            are found then where they are few.
        wanted: of how many components of a group the vectors are wanted, None for none.
        folder: where vectors wait; default: the system's temporary one.
    """
    measured: dict[Group, Spectrum] = {}
    bases: dict[Group, tuple[Basis, ...]] = {}

    def work(group: Group) -> tuple[Spectrum, tuple[Basis, ...]]:
        return _measured(group, statistics, spectra, energy, wanted)

    with Spool(folder) as spool:
        for group, (spectrum, own) in map_layers(work, largest_first(groups), group_memory):
            measured[group] = spectrum
            if own:
                bases[group] = tuple(_spooled(basis, spool) for basis in own)
            advance(group.matrix.size)
    return measured, bases


def _measured(
    group: Group,
    statistics: Statistics,
    spectra: bool,
    energy: float | None,
    wanted: Callable[[Group, Spectrum], int | None] | None,
) -> tuple[Spectrum, tuple[Basis, ...]]:
    try:
        return _components(group, statistics, spectra, energy, wanted)
    finally:
        # All views of the weight are gone with the call, else its file could not be closed.
        group.matrix.release()


def _components(
    group: Group,
    statistics: Statistics,
    spectra: bool,
    energy: float | None,
    wanted: Callable[[Group, Spectrum], int | None] | None,
) -> tuple[Spectrum, tuple[Basis, ...]]:
    moments, fisher = statistics.inputs(group), statistics.coordinates(group)
    stack = group.matrix.numpy()
    weighed: EnergyOf = "fisher" if fisher.known else "output"
    of = weighed if group in statistics.fit else "weight"
    heads = () if group.head is None else group.head.matrix.numpy()
    if not all(_finite(matrix) for matrix in (*stack, *heads)):
        return Spectrum(None, False, of), ()
    if not spectra:
        return Spectrum(None, True, of), ()
    if moments is None and energy is not None and len(stack) == 1:
        found = sketch(stack[0], energy=energy)
        if found is not None:
            return Spectrum(found.squares, True, of, found.rest), (found.basis,)
    components = StackComponents(fisher.into(stack), moments)
    spectrum = Spectrum(components.squares, True, of)
    rank = None if wanted is None else wanted(group, spectrum)
    bases: tuple[Basis, ...] = ()
    if rank:
        bases = components.bases(rank)
        if stack.dtype != np.float64:
            bases = tuple(basis.narrow() for basis in bases)
    return spectrum, bases


def _finite(matrix: Array) -> bool:
    """Whether there is no NaN and no Inf."""
    if matrix.dtype != np.float64 and np.isfinite(squared_norm(matrix)):
        return True
    return all(bool(np.isfinite(matrix[block]).all()) for block in row_blocks(*matrix.shape))


def _spooled(basis: Basis, spool: Spool) -> Basis:
    return Basis(np.asarray(spool.store(basis.vectors, "basis").numpy()), basis.transposed)
