"""The Fisher information of a layer's outputs: how its errors change the model's outputs.

A small error e[n] of a layer's output row changes the model's outputs by ``J e``, so that the mean
square of that change is ``e G eᵀ`` with ``G = E[Jᵀ J]``: the Gauss-Newton matrix of their
squared error, which is the Fisher information of a Gaussian around them (J. Martens, "New insights
and perspectives on the natural gradient method", JMLR 21, 2020, section 9).  With ``G = L Lᵀ`` and
inputs that are independent of J, as in K-FAC (J. Martens & R. Grosse, ICML 2015), the error of a
pair is ``E‖x (W − A·B) L‖²``: a pair is fitted to ``W L``, and its second factor is multiplied with
``L⁻¹``.  FWSVD (Y.-C. Hsu et al., ICLR 2022) weights the rows of W in this way.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.linalg

from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.moments import Moments

__all__ = ["PLAIN", "Fisher", "folded"]

Float64 = npt.NDArray[np.float64]

# Added to G, as a share of its mean eigenvalue: other samples may react where these did not.
_DAMPING = 0.1


@dataclass(frozen=True, eq=False)
class Fisher:
    """Coordinates of outputs in which equal errors change the model's outputs equally.

    Attributes:
        root: ``L[n, n]``, lower triangular; None where G is not known and taken as 1.
    """

    root: Float64 | None = None

    @classmethod
    def of(cls, second: Float64, draws: int) -> Fisher:
        """From ``E[gᵀ g]`` of gradients at the outputs, shape [n, n].

        Args:
            second: of ``g = rᵀ J`` with random r of mean 0 and unit covariance.
            draws: how many r there were; few draw G towards a multiple of 1.
        """
        size = len(second)
        scale = float(np.trace(second)) / max(size, 1)
        if not scale > 0.0:
            return PLAIN
        shrunk = Moments(second / scale, np.zeros(size), draws).shrunk().second.copy()
        shrunk[np.diag_indices(size)] += _DAMPING
        return cls(np.asarray(np.linalg.cholesky(shrunk), np.float64))

    @property
    def known(self) -> bool:
        """Whether these are other coordinates at all."""
        return self.root is not None

    def into(self, array: Array, dtype: npt.DTypeLike = np.float64) -> Array:
        """Outputs, or what makes them, in these coordinates: ``Y L`` of ``Y[..., n]``."""
        if self.root is None:
            return array
        return np.asarray(array.astype(dtype, copy=False) @ self.root.astype(dtype, copy=False))

    def turned(self, array: Float64) -> Float64:
        """``Lᵀ X`` of ``X[n, k]``, with ``G = L Lᵀ``."""
        return array if self.root is None else np.asarray(self.root.T @ array)

    def back(self, array: Array) -> Array:
        """The way back: ``Y L⁻¹`` of ``Y[..., n]``."""
        if self.root is None:
            return array
        rows = array.reshape(-1, array.shape[-1]).T
        solved = scipy.linalg.solve_triangular(
            self.root, rows, trans="T", lower=True, check_finite=False
        )
        return np.asarray(solved.T.reshape(array.shape))


PLAIN = Fisher()
"""Where nothing is known: every error counts as it is."""


def folded(rows: Array, count: int, rng: np.random.Generator) -> Array:
    """At most so many rows whose second moments are those of the rows, in the mean over signs.

    Each is a sum of some of the rows with random signs, so that ``E[FᵀF] = RᵀR`` (the count sketch;
    K. Clarkson & D. Woodruff, "Low rank approximation and regression in input sparsity time", STOC
    2013).

    Args:
        rows: ``R[N, n]``.
        count: how many there may be.
        rng: draws the signs.

    Returns:
        shape [count, n], or the rows as they are where they are no more.
    """
    if len(rows) <= count:
        return rows
    signs = rng.integers(0, 2, (len(rows), 1), np.int8).astype(rows.dtype) * 2 - 1
    found = rows[:count] * signs[:count]
    for start in range(count, len(rows), count):
        part = rows[start : start + count]
        found[: len(part)] += part * signs[start : start + count]
    return np.asarray(found)
