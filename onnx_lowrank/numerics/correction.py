"""A matrix of few bits and a pair that corrects its rounding error: ``W ≈ Q + A·B``.

Of ``E = W − Q`` the pair takes what the outputs feel most of, in closed form: output PCA of E on
the moments C of the inputs (LQER, C. Zhang et al., ICML 2024, with a diagonal C; QERA, C. Zhang et
al., ICLR 2025, with all of it).  Where the Fisher information G of the outputs is known E is taken
in its coordinates.  Rounding ``W − A·B`` instead of W, and fitting the pair again, gains a little
more each time, as in LoftQ (Y. Li et al., ICLR 2024) and CALDERA (R. Saha et al., NeurIPS 2024);
that goes on until it does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.blocks import Blocks
from onnx_lowrank.numerics.factors import balanced_pair
from onnx_lowrank.numerics.fisher import PLAIN, Fisher
from onnx_lowrank.numerics.moments import Moments
from onnx_lowrank.numerics.output_pca import output_pair

__all__ = ["Corrected", "corrected", "felt_error"]

# Rounds of rounding and fitting, and the least gain of one that is worth another.
_ROUNDS = 8
_GAIN = 0.005


@dataclass(frozen=True, eq=False)
class Corrected:
    """Codes, and the pair that is added to the matrix that they represent.

    Attributes:
        codes: Q, of ``W[m, n]``.
        first: ``A[m, r]``, float32.
        second: ``B[r, n]``, float32.
        error: ``E‖x (W − Q − A·B) L‖²``, with L of G; without moments the sum of squares.
        rounds: how often Q was rounded.
    """

    codes: Blocks
    first: Array
    second: Array
    error: float
    rounds: int

    def values(self) -> npt.NDArray[np.float32]:
        """``Q + A·B``."""
        return np.asarray(self.codes.values() + self.first @ self.second, np.float32)


def corrected(
    matrix: Array,
    moments: Moments | None,
    rank: int,
    rounding: Callable[[Array], Blocks],
    fisher: Fisher = PLAIN,
) -> Corrected:
    """Codes and the pair that corrects them best, fitted in turns until the error stops falling.

    Args:
        matrix: ``W[m, n]``, finite.
        moments: C of the inputs, centred and shrunk (see `Moments.fitting`); None counts every
            element of the weight alike.
        rank: r of the pair, from 1.
        rounding: makes codes of a matrix, such as `onnx_lowrank.numerics.gptq.gptq`.
        fisher: in what coordinates of the outputs errors count alike.
    """
    exact = np.asarray(matrix, np.float64)
    best: Corrected | None = None
    target = exact
    for number in range(1, _ROUNDS + 1):
        codes = rounding(target)
        first, second = _pair(exact - codes.values(), moments, rank, fisher)
        error = felt_error(exact - codes.values() - first @ second, moments, fisher)
        if best is not None and error >= best.error:
            break
        before, best = best, Corrected(codes, first, second, error, number)
        if before is not None and error > (1.0 - _GAIN) * before.error:
            break
        target = exact - first @ second
    assert best is not None
    return best


def felt_error(difference: Array, moments: Moments | None, fisher: Fisher = PLAIN) -> float:
    """``tr(G Eᵀ C E)`` of an error matrix E[m, n]; without moments ``tr(G Eᵀ E)``."""
    felt = fisher.into(np.asarray(difference, np.float64))
    return float(np.vdot(felt, felt if moments is None else moments.applied(felt)))


def _pair(
    difference: Array, moments: Moments | None, rank: int, fisher: Fisher
) -> tuple[Array, Array]:
    felt = fisher.into(difference)
    if moments is None:
        first, second = (part[0] for part in balanced_pair(felt[None], rank, np.float64))
    else:
        first, second = output_pair(felt, moments, rank, np.float64)
    return first.astype(np.float32), fisher.back(second).astype(np.float32)
