"""Fit: the pair of every group that has a rank, layers in parallel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from onnx_lowrank.fitting.spectra import group_memory, largest_first
from onnx_lowrank.fitting.statistics import Statistics
from onnx_lowrank.maps.choice import Choice
from onnx_lowrank.maps.find import Group
from onnx_lowrank.maps.pair import Errors, Factors
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.factors import relative_error
from onnx_lowrank.numerics.joint import joint_pair
from onnx_lowrank.numerics.parallel import map_layers
from onnx_lowrank.numerics.stacks import achieved_error, fitted_pair, shift_of

__all__ = [
    "fit",
    "judged",
]


def fit(
    choices: Mapping[Group, Choice],
    statistics: Statistics,
    advance: Callable[[int], None],
) -> Iterator[tuple[Group, Factors]]:
    """The pairs one after the other, so that only a few are in memory at a time.

    Args:
        choices: the rank of every group.
        statistics: what the factors are fitted to and judged with.
        advance: called with the number of elements of every group that is done.
    """
    ranked = [group for group, choice in choices.items() if choice.rank is not None]
    tasks: list[tuple[Group, ...]] = []
    for group in largest_first(ranked):
        joint = choices[group].joint
        if joint is None:
            tasks.append((group,))
        elif choices[group].leads:
            tasks.append(joint.groups)

    def work(task: tuple[Group, ...]) -> list[Factors]:
        own_energy = replace(statistics, fisher={})
        rank, joint = choices[task[0]].rank, choices[task[0]].joint
        assert rank is not None
        stacks = [group.matrix.numpy() for group in task]
        moments = statistics.inputs(task[0])
        fishers = [statistics.coordinates(group) for group in task]
        felt = [fisher.into(stack) for fisher, stack in zip(fishers, stacks, strict=True)]
        if joint is None:
            known = statistics.bases.get(task[0], ())
            pairs = [fitted_pair(felt[0], moments, rank, felt[0].dtype, known)]
        else:
            matrices = [stack[0] for stack in felt]
            first, seconds = joint_pair(
                matrices, joint.scales, None if moments is None else moments[0], rank, felt[0].dtype
            )
            shared = first[None]  # one array for all: that is how it is stored once
            pairs = [(shared, second[None]) for second in seconds]
        del felt
        found, dtype = [], stacks[0].dtype
        first = pairs[0][0].astype(dtype, copy=False)
        for group, stack, fisher, (_, own) in zip(task, stacks, fishers, pairs, strict=True):
            second = fisher.back(own).astype(dtype, copy=False)
            shift = shift_of(stack, first, second, moments)
            # In the coordinates of the energy that the rank was chosen by.
            by = statistics if choices[group].of == "fisher" else own_energy
            errors = judged(group, first, second, shift, by)
            found.append(Factors(first, second, errors, joint is not None, shift))
        return found

    def memory(task: tuple[Group, ...]) -> int:
        return sum(group_memory(group) for group in task) * len(task)

    for task, found in map_layers(work, tasks, memory):
        for group, factors in zip(task, found, strict=True):
            yield group, factors
            advance(group.matrix.size)


def judged(
    group: Group,
    first: Array,
    second: Array,
    shift: npt.NDArray[np.float64] | None,
    statistics: Statistics,
) -> Errors:
    """How far a pair, with what its bias adds, is from its group's matrix."""
    stack, fisher = group.matrix.numpy(), statistics.coordinates(group)
    held = statistics.held.get(group) if group in statistics.fit else None
    output = None
    if held is not None:
        own = None if shift is None else fisher.into(shift)
        output = achieved_error(fisher.into(stack), first, fisher.into(second), held, own)
    if group.head is None:
        return Errors(weight=relative_error(stack, first, second), output=output)
    plain = Statistics().inputs(group)
    assert plain is not None
    return Errors(weight=achieved_error(stack, first, second, plain), output=output)
