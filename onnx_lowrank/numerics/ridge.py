"""Ridge regression of outputs on inputs, from sums over rows.

For rows x and what they should be mapped to, y, and a prior weight W the ridge solution is

    W* = (E[xᵀx] + λI)⁻¹ (E[xᵀy] + λW),

which is W where the data say nothing.  Several λ share one eigendecomposition.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.linalg

from onnx_lowrank.numerics.moments import Moments

__all__ = ["Regression"]

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]

# Rows multiplied at a time, see `onnx_lowrank.numerics.moments`.
_BLOCK = 4096


class Regression:
    """Sums of a regression of y[n] on x[m].

    Attributes:
        rows: how many rows came.
    """

    def __init__(self, m: int, n: int) -> None:
        self._xx = np.zeros((m, m), np.float64)
        self._xy = np.zeros((m, n), np.float64)
        self._x = np.zeros(m, np.float64)
        self._yy = 0.0
        self.rows = 0
        self._waiting: list[tuple[Array, Array]] = []
        self._count = 0

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
        self._waiting, self._count = [], 0
        self._xx += x.T @ x
        self._xy += x.T @ y
        self._x += x.sum(axis=0, dtype=np.float64)
        self._yy += float(np.vdot(y, y))
        self.rows += len(x)

    def moments(self) -> Moments:
        """Moments of x; there has to be a row."""
        self._flush()
        return Moments(self._xx / self.rows, self._x / self.rows, self.rows)

    def error(self, first: Array, second: Array) -> float:
        """``Σ‖y − x A B‖² / Σ‖y‖²`` of a pair ``A[m, k]``, ``B[k, n]``."""
        self._flush()
        if self._yy <= 0.0:
            return 0.0
        a, b = first.astype(np.float64), second.astype(np.float64)
        inner = a.T @ self._xx @ a  # [k, k]
        fitted = float(np.vdot(inner @ b, b))
        crossed = float(np.vdot(a.T @ self._xy, b))
        return max(fitted - 2.0 * crossed + self._yy, 0.0) / self._yy

    def solutions(self, prior: Array, shares: Sequence[float]) -> list[Float64]:
        """Ridge solutions ``W*[m, n]`` for λ = share × the mean eigenvalue of E[xᵀx].

        Args:
            prior: ``W[m, n]``.
            shares: above 0.

        Returns:
            one for each share; none where all rows are zero.
        """
        self._flush()
        values, vectors = scipy.linalg.eigh(self._xx / max(self.rows, 1), check_finite=False)
        values = np.maximum(values, 0.0)
        mean = float(values.mean())
        if mean <= 0.0:
            return []
        cross = vectors.T @ (self._xy / self.rows)
        turned = vectors.T @ prior.astype(np.float64)
        return [
            vectors @ ((cross + share * mean * turned) / (values + share * mean)[:, None])
            for share in shares
        ]
