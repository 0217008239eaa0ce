"""Coordinates of a factor in which its inputs are white.

Descent is slow along inputs that hardly vary and overshoots along those that vary a lot.  With
``C = E[xᵀx]`` and ``D ≈ C + ε·tr(C)/m·I`` the map ``x·A`` is ``(x·D^-½)·(D^½·A)``, and ``D^½·A``
reads inputs of about unit variance in all directions: a step of any direction changes the outputs
equally.  This is the input half of the preconditioner of J. Martens, R. Grosse, "Optimizing neural
networks with Kronecker-factored approximate curvature", ICML 2015, held fixed.

D keeps the leading eigenvectors of C and is a multiple of the identity on all others, which alike
vary little; that multiple is scaled to 1, so that products with D cost a fraction of those with C.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.lapack import Tridiagonal
from onnx_lowrank.numerics.moments import Moments

__all__ = ["Whitening"]

Float32 = npt.NDArray[np.float32]

# ε: directions with less than this share of the mean variance are not stretched further.
_FLOOR = 0.1
# Share of the eigenvectors that D keeps.
_KEPT = 0.125


@dataclass(frozen=True, eq=False)
class Whitening:
    """``D = I + Q·diag(d − 1)·Qᵀ`` of inputs with m elements.

    Attributes:
        basis: ``Q[m, r]``, orthonormal columns.
        variances: ``d[r]``, positive.
    """

    basis: Float32
    variances: Float32

    @classmethod
    def of(cls, moments: Moments) -> Whitening | None:
        """From the moments of the inputs; None if these are all zero."""
        second = moments.full().second
        size = len(second)
        mean = moments.trace / size
        if not mean > 0.0:
            return None
        kept = max(1, round(_KEPT * size))
        values, basis = Tridiagonal(second.copy()).leading(kept)
        values = np.maximum(values, 0.0)
        others = max(moments.trace - float(values.sum()), 0.0) / max(size - kept, 1)
        variances = (values + _FLOOR * mean) / (others + _FLOOR * mean)
        return cls(basis.astype(np.float32), variances.astype(np.float32))

    def step(self, power: float) -> Float32:
        """``S[m, r]`` so that ``D^power = I + S·Qᵀ``."""
        return np.asarray(self.basis * (self.variances**power - 1.0), np.float32)

    def applied(self, array: Array, power: float) -> Array:
        """``D^power · array`` for an array [m, n]."""
        return np.asarray(array + self.step(power) @ (self.basis.T @ array), np.float32)
