"""Round: weights and pairs become integers in blocks, on arrays.

Weights are rounded by GPTQ on the moments of their inputs, to nearest where there are none; the
second factor of a pair is fitted to what became of the first one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from onnx_lowrank.fitting.statistics import Statistics
from onnx_lowrank.maps.find import Group
from onnx_lowrank.maps.formats import CORRECTION, SMALLEST, Format, suited
from onnx_lowrank.maps.pair import Factors
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.blocks import Blocks
from onnx_lowrank.numerics.correction import corrected
from onnx_lowrank.numerics.fisher import PLAIN, Fisher
from onnx_lowrank.numerics.gptq import Inverse
from onnx_lowrank.numerics.moments import Moments
from onnx_lowrank.numerics.quantized_pair import (
    refitted_second,
    rounded,
    rounded_second,
)

__all__ = [
    "RoundedWeight",
    "centre_of",
    "moments_of",
    "round_correction",
    "round_factors",
    "round_first",
    "round_second",
    "round_weight",
    "shift_by",
]

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class RoundedWeight:
    """A weight ``W[m, n]`` as it is stored.

    Attributes:
        codes: of the weight, less its correction.
        correction: the pair that is added, ``A[m, r]`` and ``B[r, n]``; None without.
    """

    codes: Blocks
    correction: tuple[Blocks, Blocks] | None = None

    def values(self) -> Array:
        """The matrix that it stands for."""
        if self.correction is None:
            return self.codes.values()
        first, second = self.correction
        return np.asarray(self.codes.values() + first.values() @ second.values(), np.float32)

    def bytes(self, form: Format) -> int:
        """Bytes of all of its integers and scales, as they are written in a format."""
        parts = (form.corrected_by.stored(part) for part in self.correction or ())
        return form.stored(self.codes) + sum(parts)


def moments_of(statistics: Statistics, group: Group) -> Moments | None:
    """C of a group's inputs, about their mean where a bias makes up for that; shrunk."""
    moments = statistics.fit.get(group)
    return None if moments is None else moments[0].fitting()


def centre_of(statistics: Statistics, group: Group) -> Float64 | None:
    """The mean of a group's inputs, shape [m], where a bias makes up for it."""
    moments = statistics.fit.get(group)
    return None if moments is None else moments[0].centre


def shift_by(centre: Float64 | None, exact: Array, values: Array) -> Float64 | None:
    """What a bias adds, shape [n], so that outputs stay the same at the centre.

    Args:
        centre: of the inputs, shape [m]; None where there is no such bias.
        exact: ``W[m, n]``.
        values: what stands in its place.
    """
    if centre is None:
        return None
    return np.asarray(centre @ (np.asarray(exact, np.float64) - values), np.float64)


def round_weight(
    matrix: Array,
    form: Format,
    moments: Moments | None,
    fisher: Fisher = PLAIN,
    inverse: Inverse | None = None,
) -> RoundedWeight:
    """Codes of a weight, and of the pair that corrects them where the format has one.

    Args:
        matrix: ``W[m, n]``, finite.
        form: its format.
        moments: C of its inputs; None rounds to nearest.
        fisher: what the model's outputs feel of its outputs, which the correction is fitted to.
        inverse: of the moments, where it is known already.
    """
    if inverse is None and moments is not None:
        inverse = Inverse(moments)

    def rounding(own: Array) -> Blocks:
        block = form.rows(len(own))
        one = not form.channels
        return rounded(own, inverse, form.bits, block, one=one, zeros=form.zeros)

    if not form.correction:
        return RoundedWeight(rounding(matrix))
    found = corrected(matrix, moments, form.correction, rounding, fisher)
    missing = np.asarray(matrix, np.float64) - found.codes.values()
    return RoundedWeight(
        found.codes, round_correction(missing, found.first, found.second, moments, inverse)
    )


def round_correction(
    matrix: Array,
    first: Array,
    second: Array,
    moments: Moments | None,
    inverse: Inverse | None,
) -> tuple[Blocks, Blocks]:
    """Codes of the pair that stands for a matrix of what a rounding lost."""
    bits, block = CORRECTION.bits, CORRECTION.block
    a = rounded(first, inverse, bits, suited(block, len(first)))
    b = suited(block, len(second))
    return a, rounded_second(matrix, a.values(), second, moments, bits, b)


def round_factors(
    factors: Factors,
    form: Format,
    moments: Moments | None,
    centre: Float64 | None = None,
    inverse: Inverse | None = None,
) -> Factors:
    """A pair of one slice as it is stored in a format.

    Args:
        factors: the pair.
        form: its format.
        moments: C of the inputs; None rounds to nearest.
        centre: of the inputs, where a bias makes up for it.
        inverse: of the moments, where it is at hand.
    """
    exact, second = factors.first[0], factors.second[0]
    first = round_first(exact, form, moments if inverse is None else inverse).values()
    found = round_second(exact, first, second, form, moments)
    values = found.values() if isinstance(found, Blocks) else found
    more = shift_by(centre, exact @ second, first @ values)
    shift = (
        factors.shift if more is None else more + (0.0 if factors.shift is None else factors.shift)
    )
    return replace(factors, first=first[None], second=values[None], shift=shift)


def round_first(first: Array, form: Format, moments: Moments | Inverse | None) -> Blocks:
    """Codes of a first factor, in × rank; to nearest without moments."""
    block, one = form.rows(len(first)), not form.channels
    return rounded(first, moments, form.bits, block, one=one, zeros=form.zeros)


def round_second(
    exact: Array, first: Array, second: Array, form: Format, moments: Moments | None
) -> Blocks | Array:
    """A second factor, fitted to a first one that was rounded; floats where it is too narrow."""
    matrix = np.asarray(exact, np.float64) @ second
    if len(second) < SMALLEST:
        return refitted_second(matrix, first, second, moments).astype(np.float32)
    block, one = form.rows(len(second)), not form.channels
    return rounded_second(
        matrix, first, second, moments, form.bits, block, one=one, zeros=form.zeros
    )
