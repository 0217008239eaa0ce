"""Spectra and pairs of a stack of matrices, by its weights alone or by its inputs.

Moments are given as gathered.  To fit a pair, their centre is subtracted and they are shrunk, one
slice at a time (see `Moments.fitting`); to judge one, they are used as they are.  Where moments
have a centre c, a bias adds ``c (W − A·B)``: the output at c is exact, and counts as energy of the
first component.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.components import Basis, Components
from onnx_lowrank.numerics.engine import PROCESSOR, Engine
from onnx_lowrank.numerics.felt import Weigh, felt_tails, plainly
from onnx_lowrank.numerics.moments import Moments
from onnx_lowrank.numerics.output_pca import output_energies
from onnx_lowrank.numerics.sketch import sketch
from onnx_lowrank.numerics.units import Units

__all__ = [
    "Leading",
    "StackComponents",
    "achieved_error",
    "energy_of",
    "fitted_pair",
    "lost_energies",
    "selected_pair",
    "shift_of",
    "squares",
]

# Reductions of slices that are held until their vectors are asked for, in elements; others are
# done again.
_HELD = 1 << 25

Leading = Basis | Units
"""What of a map is kept first: its components, or the units in front of it."""


class StackComponents:
    """The components of a stack of matrices: their energies now, the vectors when asked for.

    Attributes:
        squares: what each further unit of rank adds, falling, summed over the slices, shape
            [min(m, n)]: squared singular values of ``W[e, m, n]``, or with moments (one for each
            slice) the energy of its outputs by principal component.
    """

    def __init__(
        self,
        stack: Array,
        moments: Sequence[Moments] | None,
        energy: float | None = None,
        engine: Engine = PROCESSOR,
    ) -> None:
        """Find the energies.

        Args:
            stack: ``W[e, m, n]``.
            moments: of the inputs, by slice; None for the weights by themselves.
            energy: the only share of the energy that is asked about, if so.
            engine: does the work.
        """
        self._stack, self._moments, self._engine = stack, moments, engine
        self._energy = energy if len(stack) == 1 else None  # it is a share of all slices together
        self.squares = np.zeros(min(stack.shape[1:]), np.float64)
        side = min(stack.shape[1:])
        held = len(stack) == 1 or len(stack) * side * side <= _HELD
        self._parts: list[Components] = []
        for index, matrix in enumerate(stack):
            central = 0.0 if moments is None else energy_of(matrix, moments[index].centre)
            part = self._part(index, central)
            self.squares += part.squares
            self.squares[:1] += central
            if held:
                self._parts.append(part)

    def _part(self, index: int, central: float = 0.0) -> Components:
        if index < len(self._parts):
            return self._parts[index]
        own = None if self._moments is None else self._moments[index].fitting()
        return Components(
            self._stack[index], own, energy=self._energy, beside=central, engine=self._engine
        )

    def bases(self, rank: int) -> tuple[Basis, ...]:
        """The leading components of every slice."""
        return tuple(self._part(index).basis(rank) for index in range(len(self._stack)))


def squares(stack: Array, moments: Sequence[Moments] | None) -> npt.NDArray[np.float64]:
    """What each further unit of rank adds, falling, summed over the slices: shape [min(m, n)].

    Squared singular values of ``W[e, m, n]``, or with moments (one for each slice) the energy of
    its outputs by principal component.
    """
    return StackComponents(stack, moments).squares


def lost_energies(
    stack: Array,
    bases: Sequence[Leading],
    fitted: Sequence[Moments],
    others: Sequence[Moments] | None = None,
    weigh: Weigh = plainly,
) -> npt.NDArray[np.float64]:
    """What pairs of every rank lose of the outputs, summed over the slices: shape [k + 1].

    Args:
        stack: ``W[e, m, n]``.
        bases: k components of each slice, found with the fitted moments; of units those, whose
            loss is what it was when they were found.
        fitted: of the inputs, by slice.
        others: of inputs that the pairs are not fitted to; None for the fitted ones.
        weigh: multiplies with a root of what is felt of errors of the outputs.
    """
    total = np.zeros(bases[0].rank + 1, np.float64)
    judged = fitted if others is None else others
    for matrix, basis, own, other in zip(stack, bases, fitted, judged, strict=True):
        if isinstance(basis, Units):
            total += basis.lost
            continue
        inputs = own.fitting() if others is None else other.about(own.centre)
        total += felt_tails(matrix, basis.vectors, inputs, weigh)
    return total


def energy_of(matrix: Array, row: npt.NDArray[np.float64] | None) -> float:
    """``‖x W‖²`` of one row; 0 without."""
    if row is None:
        return 0.0
    made = row @ matrix.astype(np.float64)
    return float(made @ made)


def fitted_pair(
    stack: Array,
    moments: Sequence[Moments] | None,
    rank: int,
    dtype: npt.DTypeLike,
    bases: Sequence[Leading] = (),
    engine: Engine = PROCESSOR,
) -> tuple[Array, Array]:
    """``A[e, m, k]`` and ``B[e, k, n]``: closest to W, or with moments closest in the outputs.

    Args:
        stack: ``W[e, m, n]``.
        moments: of the inputs, by slice; None for the weights by themselves.
        rank: k.
        dtype: of the factors.
        bases: components by slice where they are known; they are used if there are enough.
        engine: does the work.
    """
    slices, m, n = stack.shape
    first, second = np.empty((slices, m, rank), dtype), np.empty((slices, rank, n), dtype)
    for index, matrix in enumerate(stack):
        basis = bases[index] if bases and bases[index].rank >= rank else None
        if isinstance(basis, Units):
            basis = None  # found for another way to take less of the map
        if basis is None and moments is None:
            found = sketch(matrix, rank=rank)
            basis = None if found is None else found.basis
        if basis is None:
            own = None if moments is None else moments[index].fitting()
            asked = None if np.dtype(dtype) == np.float64 else rank
            basis = Components(matrix, own, rank=asked, engine=engine).basis(rank)
        first[index], second[index] = basis.pair(matrix, rank, dtype, engine)
    return first, second


def selected_pair(
    stack: Array, moments: Sequence[Moments], rank: int, bases: Sequence[Leading] = ()
) -> tuple[Array, Array]:
    """``A[1, m, k]`` with one 1 in each column, and ``B[1, k, n]`` that makes up for the others.

    Args:
        stack: ``W[1, m, n]``.
        moments: of the units.
        rank: k, how many are kept.
        bases: the units in their order, where it is known.
    """
    second = moments[0].fitting().second
    known = bases[0] if bases else None
    units = known if isinstance(known, Units) else Units.of(stack[0], second)
    first, rest = units.pair(stack[0], second, rank)
    return first[None].astype(stack.dtype), rest[None].astype(stack.dtype)


def shift_of(
    stack: Array, first: Array, second: Array, moments: Sequence[Moments] | None
) -> npt.NDArray[np.float64] | None:
    """What a bias adds for the centre of a single matrix, ``c (W − A·B)``, shape [n].

    None where the moments have no centre.
    """
    centre = None if moments is None else moments[0].centre
    if centre is None:
        return None
    made = (centre @ first[0].astype(np.float64)) @ second[0].astype(np.float64)
    return np.asarray(centre @ stack[0].astype(np.float64) - made)


def achieved_error(
    stack: Array,
    first: Array,
    second: Array,
    moments: Sequence[Moments],
    shift: npt.NDArray[np.float64] | None = None,
) -> float:
    """Relative error of the outputs ``√(E‖x(W − A·B) − s‖² / E‖x W‖²)``, all slices together.

    Where the outputs are zero: 0 if they stay so, else infinity.

    Args:
        stack: ``W[e, m, n]``.
        first: ``A[e, m, k]``.
        second: ``B[e, k, n]``.
        moments: of x, by slice.
        shift: s[n], which a bias adds; None adds nothing.
    """
    error = total = 0.0
    for matrix, a, b, own in zip(stack, first, second, moments, strict=True):
        off, whole = output_energies(matrix, a, b, own, shift)
        error, total = error + off, total + whole
    if total <= 0.0:
        return 0.0 if error <= 0.0 else math.inf
    return math.sqrt(error / total)
