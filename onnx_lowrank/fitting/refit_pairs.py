"""Pairs of a refit: ridge solutions that are cut to their rank, judged on samples kept aside."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from onnx_lowrank.maps.find import Group
from onnx_lowrank.maps.pair import Factors
from onnx_lowrank.numerics.moments import Moments
from onnx_lowrank.numerics.output_pca import output_pair
from onnx_lowrank.numerics.parallel import map_layers
from onnx_lowrank.numerics.ridge import Regression

__all__ = ["gain", "moved", "refit_memory", "ridge_pairs"]

# Ridges, as shares of the mean eigenvalue of X̂ᵀX̂: two are tried, and one beyond the better one.
_RIDGES = 1e-2, 1e-1
_BEYOND = {1e-2: 1e-3, 1e-1: 1.0}


@dataclass(frozen=True, eq=False)
class _Begun:
    """What is the same for every ridge.

    Attributes:
        error: of the old pair, on samples kept aside.
        moments: of the inputs, as a pair is fitted to them.
    """

    error: float
    moments: Moments


def ridge_pairs(
    current: Mapping[Group, Factors],
    sums: Mapping[Group, Regression],
    judging: Mapping[Group, Regression],
    room: int | None,
) -> dict[Group, list[Factors]]:
    """Refits of layers with several ridges, and their errors; none where there are no rows.

    Args:
        current: the pairs that are to be replaced.
        sums: regressions on the samples to fit to.
        judging: the same on samples kept aside.
        room: bytes that the work may take; None for no limit of its own.
    """

    def begun(group: Group) -> _Begun:
        pair = current[group]
        error = judging[group].error(pair.first[0], pair.second[0], pair.shift)
        return _Begun(error, sums[group].moments().fitting())

    groups = [group for group in sums if sums[group].rows and judging[group].rows]
    starts = dict(map_layers(begun, groups, _solving, room=room))
    found: dict[Group, list[Factors]] = {group: [] for group in sums}

    def solved(trial: tuple[Group, float]) -> Factors | None:
        group, ridge = trial
        return _solution(group, current[group], sums[group], judging[group], starts[group], ridge)

    def tried(trials: list[tuple[Group, float]]) -> None:
        # Side by side: mostly layers are refitted one by one.
        for (group, _), own in map_layers(solved, trials, lambda t: _solving(t[0]), room=room):
            if own is not None:
                found[group].append(own)

    tried([(group, ridge) for group in groups for ridge in _RIDGES])
    better = {
        group: max(zip(map(gain, pairs), _RIDGES, strict=True))[1]
        for group, pairs in found.items()
        if pairs
    }
    tried([(group, _BEYOND[ridge]) for group, ridge in better.items()])
    return found


def refit_memory(group: Group) -> int:
    """Bytes that the refit of a layer takes: sums, rows that wait for them, and one solution."""
    _, m, n = group.shape
    return _solving(group) + 2 * Regression.memory(m, n)


def _solving(group: Group) -> int:
    """Bytes that one solution takes: moments of the inputs and their copies, [m, m], and [m, n]."""
    _, m, n = group.shape
    return 8 * m * (6 * m + 4 * n)


def _solution(
    group: Group,
    pair: Factors,
    fit: Regression,
    aside: Regression,
    begun: _Begun,
    ridge: float,
) -> Factors | None:
    """The refit with a ridge, with its error on samples kept aside; None where rows are zero."""
    solution = fit.solution(group.matrix.numpy()[0], ridge)
    if solution is None:
        return None
    dtype = pair.first.dtype
    a, b = output_pair(solution, begun.moments, pair.rank, np.float64)
    first, second = a.astype(dtype), fit.fisher.back(b).astype(dtype)
    shift = fit.shift(first, second)
    after = aside.error(first, second, shift)
    errors = dataclasses.replace(pair.errors, refit=(begun.error, after))
    return Factors(first[None], second[None], errors, shift=shift)


def moved(pair: Factors, aside: Regression, there: Regression) -> Factors:
    """A refit with its error on what its nodes read with it in place.

    Args:
        pair: the refit.
        aside: of the samples kept aside, with the old pair in place.
        there: of the same with the refit in place.
    """
    start, _ = _errors(pair)
    # What should be added to a residual stream has changed as well; what is off of it compares.
    off = there.error(pair.first[0], pair.second[0], pair.shift) * there.energy
    errors = dataclasses.replace(pair.errors, refit=(start, off / aside.energy))
    return dataclasses.replace(pair, errors=errors)


def gain(pair: Factors) -> float:
    """By how much a refit is better than the pair that it would replace."""
    start, after = _errors(pair)
    return start - after


def _errors(pair: Factors) -> tuple[float, float]:
    assert pair.errors.refit is not None
    return pair.errors.refit
