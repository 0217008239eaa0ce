"""Round: maps around a width become integers, each by itself on what it reads, on arrays.

``g(X·A + a)·B``: A is rounded on the moments of X and B on those of what g gives.  Where fewer
elements lie between them, ``g(X·(A·S) + a·S)·T``, T reads ``h·S`` with the moments ``Sᵀ·C·S``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnx_lowrank.fitting.rounded_weights import centre_of, moments_of, round_weight, shift_by
from onnx_lowrank.fitting.statistics import Statistics
from onnx_lowrank.maps.find import Group
from onnx_lowrank.maps.formats import SMALLEST, Format
from onnx_lowrank.maps.narrow import kept_units, mixed
from onnx_lowrank.maps.pair import Factors, constants_of
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.moments import Moments

__all__ = ["Width", "inputs_of", "rounded_maps"]

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Width:
    """What is left of the width between maps.

    Attributes:
        first: ``S[e, m, k]`` by head; None where elements are kept or left out.
        units: numbers of those that are kept; None where they are mixed.
    """

    first: Array | None
    units: npt.NDArray[np.intp] | None

    @classmethod
    def of(cls, group: Group, pair: Factors) -> Width:
        """Of a group that becomes narrower.

        Args:
            group: the group.
            pair: S and T.
        """
        units = kept_units(pair.first) if group.selects else None
        return cls(pair.first, None) if units is None else cls(None, units)

    def moments(self, whole: Moments) -> Moments:
        """Moments of what the last map reads, ``h·S``.

        Args:
            whole: of h, with all elements.
        """
        if self.units is not None:
            return whole.of(self.units)
        assert self.first is not None
        heads, m, rank = self.first.shape
        blocks = np.zeros((heads, m, heads, rank))
        blocks[np.arange(heads), :, np.arange(heads)] = self.first
        return whole.through(blocks.reshape(heads * m, heads * rank))

    def spread(self, narrow: Array, whole: Array, *, turned: bool = True) -> Array:
        """Elements of all the width, with some of what is left of it on top.

        Args:
            narrow: ``[…, c·e·k]`` along its last axis.
            whole: ``[…, c·e·m]``, what the others are.
            turned: whether they go through S⁺; else through Sᵀ.
        """
        if self.units is not None:
            found = np.array(whole, order="C")  # a view of it is changed
            times = narrow.shape[-1] // len(self.units)
            found.reshape(-1, times, whole.shape[-1] // times)[..., self.units] += narrow.reshape(
                -1, times, len(self.units)
            )
            return found
        assert self.first is not None
        exact = self.first.astype(np.float64)
        back = np.linalg.pinv(exact) if turned else exact.transpose(0, 2, 1)
        return np.asarray(whole + mixed(narrow, back), whole.dtype)


def inputs_of(
    statistics: Statistics, own: Group, width: Width | None = None
) -> tuple[Moments | None, Float64 | None]:
    """What a map is rounded on: moments of its inputs, and their mean where a bias makes up for it.

    Args:
        statistics: what was gathered.
        own: the map.
        width: what is left of its inputs; None leaves all.

    Returns:
        None without samples.
    """
    if width is None or own not in statistics.fit:
        return moments_of(statistics, own), centre_of(statistics, own)
    found = width.moments(statistics.fit[own][0])
    return found.fitting(), found.centre


def rounded_maps(
    group: Group, form: Format, pair: Factors | None, statistics: Statistics
) -> dict[str, Array]:
    """What stands in place of the constants of a group's maps, in their full width.

    The elements that a lower rank leaves out stay in the first maps, and the last one does not
    read them: with S⁺·S = 1 that computes what the narrower maps compute.

    Args:
        group: with maps.
        form: of all of them.
        pair: S and T, as floats; None leaves the width.
        statistics: what is rounded on.

    Returns:
        Name -> elements.
    """
    found: dict[str, Array] = {}
    width = None if pair is None else Width.of(group, pair)
    for own in group.maps:
        matrix, last = own.matrix.numpy()[0], own is group.maps[-1]
        if pair is None:
            exact = matrix
        elif last:
            exact = pair.second.reshape(-1, matrix.shape[1])
        else:
            exact = mixed(matrix, pair.first)
        moments, centre = inputs_of(statistics, own, width if last else None)
        values, shift = exact, None if pair is None or not last else pair.shift
        if len(exact) >= SMALLEST:  # else it is narrower than a block
            values = round_weight(exact, form, moments).values()
            more = shift_by(centre, exact, values)
            shift = shift if more is None else more + (0.0 if shift is None else shift)
        if pair is not None and width is not None:
            if last:
                values = width.spread(values.T, np.zeros_like(matrix.T), turned=False).T
            else:
                values = width.spread(values - exact, matrix)
                none = np.zeros(matrix.shape[-1])
                shift = None if shift is None else width.spread(shift, none)
        found |= constants_of(own, values[None], shift)
    return found
