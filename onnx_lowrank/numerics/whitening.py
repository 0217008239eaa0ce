"""Coordinates of a factor in which its inputs are white.

Descent is slow along inputs that hardly vary and overshoots along those that vary a lot.  With
``C = E[xᵀx]`` and ``D = C + ε·tr(C)/m·I`` the map ``x·A`` is ``(x·D^-½)·(D^½·A)``, and ``D^½·A``
reads inputs of about unit variance in all directions: a step changes the outputs alike wherever it
goes.  This is the input half of the preconditioner of J. Martens, R. Grosse,
"Optimizing neural networks with Kronecker-factored approximate curvature", ICML 2015, held fixed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.linalg

from onnx_lowrank.numerics.moments import Moments

__all__ = ["Whitening"]

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]

# ε: directions with less than this share of the mean variance are not stretched further.
_FLOOR = 0.1


@dataclass(frozen=True, eq=False)
class Whitening:
    """``D^½`` and ``D^-½`` of inputs with m elements.

    Attributes:
        root: ``D^½``, shape [m, m], symmetric.
        inverse: ``D^-½``, shape [m, m], symmetric.
    """

    root: Float32
    inverse: Float32

    @classmethod
    def of(cls, moments: Moments) -> Whitening | None:
        """From the moments of the inputs; None if these are all zero."""
        values, vectors = scipy.linalg.eigh(moments.full().second, check_finite=False)
        mean = float(values.mean())
        if not mean > 0.0:
            return None
        scales = np.sqrt(np.maximum(values, 0.0) + _FLOOR * mean)
        root, inverse = ((vectors * own) @ vectors.T for own in (scales, 1.0 / scales))
        return cls(root.astype(np.float32), inverse.astype(np.float32))
