"""Fit: the pair of every group that has a rank, layers in parallel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_lowrank.calibrate import Statistics
from onnx_lowrank.choose import Choice
from onnx_lowrank.find import Group
from onnx_lowrank.measure import group_memory, largest_first
from onnx_lowrank.numerics.factors import relative_error
from onnx_lowrank.numerics.fit import achieved_error, fitted_pair
from onnx_lowrank.numerics.joint import joint_pair
from onnx_lowrank.numerics.parallel import map_layers

__all__ = ["Errors", "Factors", "fit", "judged"]

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Errors:
    """How far a pair, as stored, is from its weight.

    Attributes:
        weight: ``‖W − A·B‖ / ‖W‖`` (Frobenius).
        output: ``√(E‖x(W − A·B)‖² / E‖x W‖²)`` over held-out samples; None without them.
        refit: squared relative error of what a refit layer should give, before and after, on
            samples that the refit was not made with; None where there was none.
    """

    weight: float
    output: float | None = None
    refit: tuple[float, float] | None = None


@dataclass(frozen=True, eq=False)
class Factors:
    """A pair: ``first`` is ``A[e, m, k]``, ``second`` is ``B[e, k, n]``.

    Attributes:
        first: the same array in all pairs that share it.
        second: their own.
        errors: how far the pair is off.
        shared: whether other groups share the first factor.
    """

    first: Array
    second: Array
    errors: Errors
    shared: bool = False

    @property
    def rank(self) -> int:
        """The rank k."""
        return int(self.first.shape[2])

    def product(self) -> Array:
        """``A @ B``, shape [e, m, n], in the factors' type."""
        wide = np.result_type(np.float32, self.first.dtype)
        product = np.matmul(self.first.astype(wide), self.second.astype(wide))
        return np.asarray(product, self.first.dtype)


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
        rank, joint = choices[task[0]].rank, choices[task[0]].joint
        assert rank is not None
        stacks = [group.matrix.numpy() for group in task]
        if joint is None:
            pairs = [fitted_pair(stacks[0], statistics.fit.get(task[0]), rank, stacks[0].dtype)]
        else:
            moments = statistics.fit.get(task[0])
            matrices = [stack[0] for stack in stacks]
            first, seconds = joint_pair(
                matrices,
                joint.scales,
                None if moments is None else moments[0],
                rank,
                stacks[0].dtype,
            )
            shared = first[None]  # one array for all: that is how it is stored once
            pairs = [(shared, second[None]) for second in seconds]
        return [
            Factors(first, second, judged(group, first, second, statistics), joint is not None)
            for group, (first, second) in zip(task, pairs, strict=True)
        ]

    def memory(task: tuple[Group, ...]) -> int:
        return sum(group_memory(group) for group in task) * len(task)

    for task, found in map_layers(work, tasks, memory):
        for group, factors in zip(task, found, strict=True):
            yield group, factors
            advance(group.matrix.size)


def judged(group: Group, first: Array, second: Array, statistics: Statistics) -> Errors:
    """How far a pair is from its group's matrix."""
    stack = group.matrix.numpy()
    held = statistics.held.get(group) if group in statistics.fit else None
    return Errors(
        weight=relative_error(stack, first, second),
        output=None if held is None else achieved_error(stack, first, second, held),
    )
