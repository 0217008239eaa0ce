"""The free rotation of a pair's rank axis: ``A·B = (A·Q)·(Qᵀ·B)`` for every orthogonal Q.

The columns of A and rows of B that a singular value decomposition gives fall with the root of the
singular values, and so do the channels of the bottleneck ``x·A``.  One scale for all of them, as
8-bit quantization has, wastes the small ones, and the few large ones add up beyond what the
saturating int8 products of older processors hold.  A random rotation gives all channels one scale
and removes outliers, as in QuIP (J. Chee et al., NeurIPS 2023) and QuaRot (S. Ashkboos et al.,
NeurIPS 2024).

Q is random signs and the orthonormal discrete cosine transform, twice.  It exists for every size,
unlike a Hadamard matrix, takes ``O(m·k·log k)``, and its elements are about normal.  Once is not
enough: neighbouring channels would then share the wave of the largest singular value, and it is
neighbours whose products are added up in 16 bits.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import scipy.fft

__all__ = ["rotated_first", "rotated_second"]

Float64 = npt.NDArray[np.float64]

_ROUNDS = 2
# Of the signs: a rank always has the same Q.
_SEED = 0x5EED


def rotated_first(first: Float64) -> Float64:
    """``A·Q`` of ``A[m, k]``, which is overwritten."""
    for signs in _signs(first.shape[1]):
        first *= signs
        first = scipy.fft.dct(first, norm="ortho", axis=1, overwrite_x=True)
    return first


def rotated_second(second: Float64) -> Float64:
    """``Qᵀ·B`` of ``B[k, n]``, which is overwritten."""
    for signs in _signs(len(second)):
        second *= signs[:, None]
        second = scipy.fft.dct(second, norm="ortho", axis=0, overwrite_x=True)
    return second


def _signs(rank: int) -> Float64:
    """Random signs of every round, shape [rounds, k]."""
    rng = np.random.default_rng((_SEED, rank))
    return np.asarray(rng.choice([-1.0, 1.0], (_ROUNDS, rank)), np.float64)
