"""Ridge regression of outputs on inputs, from sums over rows.

For rows x and what they should be mapped to, y, and a prior weight W the ridge solution is

    W* = (E[xᵀx] + λI)⁻¹ (E[xᵀy] + λW),

which is W where the data say nothing.  With an intercept s all rows are taken less their means, and
s is what the solution leaves of the means.  Errors are in the coordinates ``y L`` of a Fisher
information (`onnx_lowrank.numerics.fisher`), where the solution is ``W* L``.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.fisher import PLAIN, Fisher
from onnx_lowrank.numerics.moments import Moments
from onnx_lowrank.numerics.spectrum import unit

__all__ = ["Regression"]

Float64 = npt.NDArray[np.float64]

# Rows multiplied at a time, see `onnx_lowrank.numerics.moments`.
_BLOCK = 4096


class Regression:
    """Sums of a regression of y[n] on x[m].

    Attributes:
        fisher: in what coordinates of y errors count alike.
    """

    def __init__(self, m: int, n: int, *, biased: bool = False, fisher: Fisher = PLAIN) -> None:
        """A regression without rows; biased: with an intercept."""
        self.fisher = fisher
        self._biased = biased
        self._xx = np.zeros((m, m), np.float64)
        self._xy = np.zeros((m, n), np.float64)
        self._x = np.zeros(m, np.float64)
        self._y = np.zeros(n, np.float64)
        self._yy = 0.0
        self._rows = 0
        self._waiting: list[tuple[Array, Array]] = []
        self._count = 0

    @staticmethod
    def memory(m: int, n: int) -> int:
        """Bytes that the sums take, and the float32 rows that wait for them."""
        return 8 * m * (m + n) + 4 * _BLOCK * (m + n)

    def add(self, x: Array, y: Array) -> None:
        """Add rows ``x[N, m]`` and ``y[N, n]``."""
        self._waiting.append((x, y))
        self._count += len(x)
        if self._count >= _BLOCK:
            self._flush()

    def _flush(self) -> None:
        if not self._waiting:
            return
        x = np.concatenate([part for part, _ in self._waiting], dtype=np.float32)
        y = np.concatenate([part for _, part in self._waiting], dtype=np.float32)
        y = self.fisher.into(y, np.float32)
        self._waiting, self._count = [], 0
        if unit(x, np.float32) != 1.0 or unit(y, np.float32) != 1.0:  # squares beyond float32
            x, y = x.astype(np.float64), y.astype(np.float64)
        self._xx += x.T @ x
        self._xy += x.T @ y
        self._x += x.sum(axis=0, dtype=np.float64)
        self._y += y.sum(axis=0, dtype=np.float64)
        self._yy += float(np.vdot(y, y))
        self._rows += len(x)

    @property
    def rows(self) -> int:
        """How many rows were added."""
        self._flush()
        return self._rows

    @property
    def energy(self) -> float:
        """``Σ‖y L‖²``."""
        self._flush()
        return self._yy

    def moments(self) -> Moments:
        """Moments of x, with an intercept about their mean; there has to be a row."""
        self._flush()
        mean = self._x / self.rows
        return Moments(self._xx / self.rows, mean, self.rows, mean if self._biased else None)

    def shift(self, first: Array, second: Array) -> Float64 | None:
        """The intercept of a pair: ``E[y] − E[x] A B``, shape [n]; None without one."""
        self._flush()
        if not self._biased:
            return None
        made = (self._x @ first.astype(np.float64)) @ second.astype(np.float64)
        return np.asarray((self.fisher.back(self._y) - made) / max(self.rows, 1))

    def error(self, first: Array, second: Array, shift: Float64 | None = None) -> float:
        """``Σ‖(y − x A B − s) L‖² / Σ‖y L‖²`` of a pair ``A[m, k]``, ``B[k, n]`` and s[n]."""
        self._flush()
        if self._yy <= 0.0:
            return 0.0
        a, b = first.astype(np.float64), self.fisher.into(second.astype(np.float64))
        inner = a.T @ self._xx @ a  # [k, k]
        fitted = float(np.vdot(inner @ b, b))
        crossed = float(np.vdot(a.T @ self._xy, b))
        error = fitted - 2.0 * crossed + self._yy
        if shift is not None:
            shift = self.fisher.into(shift)
            error += float(shift @ (self.rows * shift - 2.0 * (self._y - (self._x @ a) @ b)))
        return max(error, 0.0) / self._yy

    def solution(self, prior: Array, share: float) -> Float64 | None:
        """The ridge solution ``W* L``, shape [m, n], for λ = share × the mean eigenvalue of E[xᵀx].

        With an intercept both are taken less their means.

        Args:
            prior: ``W[m, n]``.
            share: above 0.

        Returns:
            None where all rows are zero.
        """
        self._flush()
        rows = max(self.rows, 1)
        xx, xy = self._xx / rows, self._xy / rows
        if self._biased:
            xx -= np.outer(self._x, self._x) / rows**2
            xy -= np.outer(self._x, self._y) / rows**2
        mean = float(np.trace(xx)) / len(xx)
        if mean <= 0.0:
            return None
        # Some thousandth of the mean at least is added to every eigenvalue: no need for them.
        ridge = share * mean
        xx[np.diag_indices(len(xx))] += ridge
        xy += ridge * self.fisher.into(prior.astype(np.float64))
        return np.asarray(np.linalg.solve(xx, xy))
