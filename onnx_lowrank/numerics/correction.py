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
from onnx_lowrank.numerics.fisher import PLAIN, Fisher
from onnx_lowrank.numerics.moments import Moments
from onnx_lowrank.numerics.rotation import rotated_first, rotated_second

__all__ = ["Corrected", "corrected", "corrected_energies", "felt_error"]

# Products with a block of vectors that find leading components, and vectors beside those wanted.
_PASSES, _BESIDE = 8, 8
# Rounds of rounding and fitting, and the least gain of one that is worth another.
_ROUNDS = 4
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


def corrected_energies(
    difference: Array, moments: Moments | None, rank: int, fisher: Fisher = PLAIN
) -> npt.NDArray[np.float64]:
    """What the leading components of an error matrix take of `felt_error`, falling.

    Args:
        difference: ``E[m, n]``.
        moments: C of the inputs; None counts every element alike.
        rank: how many.
        fisher: in what coordinates of the outputs errors count alike.

    Returns:
        shape [rank]; each at most the true one.
    """
    _, values = _leading(fisher.into(np.asarray(difference, np.float64)), moments, rank)
    return values


def _pair(
    difference: Array, moments: Moments | None, rank: int, fisher: Fisher
) -> tuple[Array, Array]:
    felt = fisher.into(difference)
    vectors, _ = _leading(felt, moments, rank)
    first, second = felt @ vectors, vectors.T
    # The same scale in both, and on all channels (see `onnx_lowrank.numerics.rotation`).
    scale = np.sqrt(np.linalg.norm(first, axis=0))
    inverse = np.divide(1.0, scale, out=np.zeros_like(scale), where=scale > 0.0)
    first = rotated_first(first * inverse)
    second = fisher.back(rotated_second(second * scale[:, None]))
    return first.astype(np.float32), second.astype(np.float32)


def _leading(
    felt: Array, moments: Moments | None, rank: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Leading eigenvectors of ``EᵀCE`` and their values, by subspace iteration.

    Rounding errors have a flat spectrum, of which a few products find about as much as there is
    (N. Halko, P. G. Martinsson, J. A. Tropp, SIAM Review 53, 2011, algorithm 4.4).
    """
    n = felt.shape[1]
    width = min(n, rank + _BESIDE)
    vectors = np.random.default_rng(0).standard_normal((n, width))
    values = np.zeros(width)
    for _ in range(_PASSES):
        vectors, _ = np.linalg.qr(vectors)
        made = felt @ vectors
        applied = made if moments is None else moments.applied(made)
        small = made.T @ applied
        values, turn = np.linalg.eigh(small)
        values, turn = values[::-1], turn[:, ::-1]
        kept = vectors @ turn
        vectors = felt.T @ (applied @ turn)
    return kept[:, :rank], np.maximum(values[:rank], 0.0)
