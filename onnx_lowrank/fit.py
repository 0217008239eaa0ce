"""Fit: the pair of every group that has a rank, layers in parallel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_lowrank.calibrate import Statistics
from onnx_lowrank.choose import Choice
from onnx_lowrank.constants import Constant
from onnx_lowrank.find import Group
from onnx_lowrank.measure import group_memory, largest_first
from onnx_lowrank.numerics.factors import relative_error
from onnx_lowrank.numerics.fit import achieved_error, fitted_pair, shift_of
from onnx_lowrank.numerics.joint import joint_pair
from onnx_lowrank.numerics.parallel import map_layers

__all__ = ["Errors", "Factors", "fit", "judged", "shifted"]

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Errors:
    """How far a pair, as stored, is from its weight.

    Attributes:
        weight: ``‖W − A·B‖ / ‖W‖`` (Frobenius).
        output: ``√(E‖x(W − A·B) − s‖² / E‖x W‖²)`` over held-out samples, s what a bias adds for
            the pair, in the coordinates that it was fitted in; None without them.
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
        shift: s[n], what comes on top of the group's bias: what W makes of the mean of its inputs
            and the pair does not; None leaves the bias.
    """

    first: Array
    second: Array
    errors: Errors
    shared: bool = False
    shift: npt.NDArray[np.float64] | None = None

    @property
    def rank(self) -> int:
        """The rank k."""
        return int(self.first.shape[2])

    def product(self) -> Array:
        """``A @ B``, shape [e, m, n], in the factors' type."""
        wide = np.result_type(np.float32, self.first.dtype)
        product = np.matmul(self.first.astype(wide), self.second.astype(wide))
        return np.asarray(product, self.first.dtype)

    def constants(self, group: Group) -> dict[str, Array]:
        """What stands in place of a group's weight and bias where pairs cannot: name -> elements.

        Args:
            group: whose pair this is.
        """
        matrix = group.matrix
        array = np.ascontiguousarray(matrix.layout.inverse().apply(self.product()))
        found = {matrix.name: array}
        if self.shift is not None:
            assert group.bias is not None
            found[group.bias.name] = shifted(group.bias, self.shift)
        return found


def shifted(bias: Constant, shift: npt.NDArray[np.float64]) -> Array:
    """The elements of a bias with s[n] on top, in its own type and shape."""
    own = bias.tensor.numpy()
    wide = own.astype(np.float64).reshape(-1) + shift
    return np.asarray(wide.reshape(own.shape).astype(own.dtype))


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
        moments = statistics.fit.get(task[0])
        fishers = [statistics.coordinates(group) for group in task]
        felt = [fisher.into(stack) for fisher, stack in zip(fishers, stacks, strict=True)]
        if joint is None:
            pairs = [fitted_pair(felt[0], moments, rank, felt[0].dtype)]
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
            errors = judged(group, first, second, shift, statistics)
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
    return Errors(weight=relative_error(stack, first, second), output=output)
