"""Spectra and pairs of a stack of matrices, by its weights alone or by what it is applied to.

Moments come as they were gathered; what is fitted to them shrinks them first, one slice at a time
(see `Moments.shrunk`), what judges does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_lowrank.numerics.factors import balanced_pair
from onnx_lowrank.numerics.moments import Moments
from onnx_lowrank.numerics.output_pca import (
    component_energies,
    output_energies,
    output_pair,
    output_squares,
)
from onnx_lowrank.numerics.spectrum import squared_singular_values

__all__ = ["achieved_error", "fitted_pair", "squares", "unseen_squares"]

Array = npt.NDArray[Any]


def squares(stack: Array, moments: Sequence[Moments] | None) -> npt.NDArray[np.float64]:
    """What each further unit of rank adds, falling, summed over the slices: shape [min(m, n)].

    Squared singular values of ``W[e, m, n]``, or with moments (one for each slice) the energy of
    its outputs by principal component.
    """
    if moments is None:
        return squared_singular_values(stack)
    total = np.zeros(min(stack.shape[1:]), np.float64)
    for matrix, own in zip(stack, moments, strict=True):
        total += output_squares(matrix, own.shrunk())
    return total


def unseen_squares(
    stack: Array, fitted: Sequence[Moments], other: Sequence[Moments]
) -> npt.NDArray[np.float64]:
    """As `squares`, of the components fitted to some inputs, on others: shape [min(m, n)]."""
    total = np.zeros(min(stack.shape[1:]), np.float64)
    for matrix, own, unseen in zip(stack, fitted, other, strict=True):
        total += component_energies(matrix, own.shrunk(), unseen)
    return total


def fitted_pair(
    stack: Array, moments: Sequence[Moments] | None, rank: int, dtype: npt.DTypeLike
) -> tuple[Array, Array]:
    """``A[e, m, k]`` and ``B[e, k, n]``: closest to W, or with moments closest in the outputs."""
    if moments is None:
        return balanced_pair(stack, rank, dtype)
    pairs = [
        output_pair(matrix, own.shrunk(), rank, dtype)
        for matrix, own in zip(stack, moments, strict=True)
    ]
    return np.stack([first for first, _ in pairs]), np.stack([second for _, second in pairs])


def achieved_error(stack: Array, first: Array, second: Array, moments: Sequence[Moments]) -> float:
    """Relative error of the outputs ``√(E‖x(W − A·B)‖² / E‖x W‖²)``, all slices together.

    Where the outputs are zero: 0 if they stay so, else infinity.
    """
    error = total = 0.0
    for matrix, a, b, own in zip(stack, first, second, moments, strict=True):
        off, whole = output_energies(matrix, a, b, own)
        error, total = error + off, total + whole
    if total <= 0.0:
        return 0.0 if error <= 0.0 else math.inf
    return math.sqrt(error / total)
