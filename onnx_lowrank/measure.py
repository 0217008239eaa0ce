"""Measure: the spectra of the groups, layers in parallel."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from onnx_lowrank.choose import Measurement
from onnx_lowrank.find import Group
from onnx_lowrank.numerics.parallel import map_layers, working_set
from onnx_lowrank.numerics.spectrum import row_blocks, squared_singular_values

__all__ = ["group_memory", "largest_first", "measure"]


def largest_first(groups: Sequence[Group]) -> list[Group]:
    """The groups by falling work, so that the cores finish together; the order is stable."""
    return sorted(groups, key=lambda group: -group_memory(group))


def group_memory(group: Group) -> int:
    """Bytes that measuring or factoring a group takes."""
    slices, m, n = group.shape
    return working_set(m, n) + 8 * (slices - 1) * min(m, n) * (m + n)


def measure(groups: Sequence[Group], advance: Callable[[int], None]) -> dict[Group, Measurement]:
    """Squared singular values of every group's matrix, values only.

    Args:
        groups: what to measure.
        advance: called with the number of elements of every group that is done.
    """
    measured = {}
    for group, result in map_layers(_measure_one, largest_first(groups), group_memory):
        measured[group] = result
        advance(group.matrix.size)
    return measured


def _measure_one(group: Group) -> Measurement:
    stack = group.matrix.numpy()
    try:
        finite = all(
            bool(np.isfinite(matrix[block]).all())
            for matrix in stack
            for block in row_blocks(*matrix.shape)
        )
        squares = squared_singular_values(stack) if finite else np.zeros(0)
    finally:
        del stack
    group.matrix.release()
    return Measurement(squares, finite)
