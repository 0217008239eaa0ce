"""Fit: the pair of every group that has a rank, layers in parallel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnx_lowrank.fitting.layers import LayerArrays, arrays_of
from onnx_lowrank.fitting.spectra import group_memory, largest_first
from onnx_lowrank.fitting.statistics import Statistics
from onnx_lowrank.maps.choice import Choice
from onnx_lowrank.maps.find import Group
from onnx_lowrank.maps.pair import Errors, Factors
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.crew import HERE, Crew
from onnx_lowrank.numerics.engine import engine_of
from onnx_lowrank.numerics.factors import relative_error
from onnx_lowrank.numerics.fisher import PLAIN, Fisher
from onnx_lowrank.numerics.joint import joint_pair
from onnx_lowrank.numerics.moments import Moments
from onnx_lowrank.numerics.stacks import achieved_error, fitted_pair, selected_pair, shift_of

__all__ = ["fit", "fitted"]


@dataclass(frozen=True, eq=False)
class _Fitting:
    """Layers that are fitted together: one, or several that share their first factor.

    Attributes:
        layers: the layers; the first one's moments count for all.
        rank: of the pairs.
        scales: how strongly errors of each count, where they share; else None.
        by_fisher: of each, whether its rank was chosen by the energy in the coordinates of errors.
        device: where they are computed.
    """

    layers: tuple[LayerArrays, ...]
    rank: int
    scales: tuple[float, ...] | None
    by_fisher: tuple[bool, ...]
    device: str


def fit(
    choices: Mapping[Group, Choice],
    statistics: Statistics,
    advance: Callable[[int], None],
    crew: Crew = HERE,
) -> Iterator[tuple[Group, Factors]]:
    """The pairs one after the other, so that only a few are in memory at a time.

    Args:
        choices: the rank of every group.
        statistics: what the factors are fitted to and judged with.
        advance: called with the number of elements of every group that is done.
        crew: who does the work.
    """
    ranked = [group for group, choice in choices.items() if choice.rank is not None]
    tasks: list[tuple[Group, ...]] = []
    for group in largest_first(ranked):
        joint = choices[group].joint
        if joint is None:
            tasks.append((group,))
        elif choices[group].leads:
            tasks.append(joint.groups)

    def given(task: tuple[Group, ...]) -> _Fitting:
        rank, joint = choices[task[0]].rank, choices[task[0]].joint
        assert rank is not None
        return _Fitting(
            tuple(arrays_of(group, statistics, leads=group is task[0]) for group in task),
            rank,
            None if joint is None else joint.scales,
            tuple(choices[group].of == "fisher" for group in task),
            crew.device,
        )

    def memory(task: tuple[Group, ...]) -> int:
        return sum(group_memory(group) for group in task) * len(task)

    for task, found in crew.map(fitted, tasks, given, memory):
        for group, factors in zip(task, found, strict=True):
            yield group, factors
            advance(group.matrix.size)


def fitted(task: _Fitting) -> list[Factors]:
    """The pairs of layers that are fitted together."""
    lead, rank, engine = task.layers[0], task.rank, engine_of(task.device)
    moments = lead.moments
    felt = [layer.fisher.into(layer.stack) for layer in task.layers]
    if lead.selects:
        assert moments is not None  # without, nothing is left out
        pairs = [selected_pair(felt[0], moments, rank, lead.bases)]
    elif task.scales is None:
        pairs = [fitted_pair(felt[0], moments, rank, felt[0].dtype, lead.bases, engine)]
    else:
        matrices = [stack[0] for stack in felt]
        inputs = None if moments is None else moments[0]
        first, seconds = joint_pair(matrices, task.scales, inputs, rank, felt[0].dtype, engine)
        shared = first[None]  # one array for all: that is how it is stored once
        pairs = [(shared, second[None]) for second in seconds]
    del felt
    found, dtype = [], lead.stack.dtype
    first = pairs[0][0].astype(dtype, copy=False)
    for layer, by_fisher, (_, own) in zip(task.layers, task.by_fisher, pairs, strict=True):
        second = layer.fisher.back(own).astype(dtype, copy=False)
        shift = shift_of(layer.stack, first, second, moments)
        # In the coordinates of the energy that the rank was chosen by.
        errors = _judged(layer, first, second, shift, layer.fisher if by_fisher else PLAIN)
        found.append(Factors(first, second, errors, task.scales is not None, shift))
    return found


def _judged(
    layer: LayerArrays,
    first: Array,
    second: Array,
    shift: npt.NDArray[np.float64] | None,
    fisher: Fisher,
) -> Errors:
    """How far a pair, with what its bias adds, is from its layer's matrix."""
    stack, output = layer.stack, None
    if layer.held is not None:
        own = None if shift is None else fisher.into(shift)
        output = achieved_error(fisher.into(stack), first, fisher.into(second), layer.held, own)
    if not layer.heads or layer.inner:
        return Errors(weight=relative_error(stack, first, second), output=output)
    plain = (Moments.mapped(layer.heads[0][0]),)
    return Errors(weight=achieved_error(stack, first, second, plain), output=output)
