"""One first factor for several maps of the same inputs.

For ``Y_i = X W_i`` and weights s_i of their errors the best shared A[m, k] and B_i[k, n_i] come
from output PCA of ``[s₁W₁ | … | sₚWₚ]``; k·(m + Σ n_i) parameters stand for p pairs of k·(m + n_i).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.components import Components
from onnx_lowrank.numerics.engine import PROCESSOR, Engine
from onnx_lowrank.numerics.factors import balanced_pair
from onnx_lowrank.numerics.felt import Weigh, felt_tails
from onnx_lowrank.numerics.moments import Moments
from onnx_lowrank.numerics.output_pca import output_pair

__all__ = ["joint_pair", "joint_tails", "side_by_side"]


def side_by_side(matrices: Sequence[Array], scales: Sequence[float]) -> Array:
    """``[s₁W₁ | … | sₚWₚ]``, shape [m, Σ n_i], of ``W_i[m, n_i]``."""
    scaled = [scale * np.asarray(w, np.float64) for w, scale in zip(matrices, scales, strict=True)]
    return np.concatenate(scaled, axis=1)


def joint_tails(
    matrices: Sequence[Array],
    scales: Sequence[float],
    fitted: Moments,
    other: Moments | None,
    rank: int,
    weighs: Sequence[Weigh],
) -> npt.NDArray[np.float64]:
    """What is felt of the errors of all maps together, at every rank up to one: shape [k + 1].

    Args:
        matrices: the W_i.
        scales: above 0, as for `joint_pair`.
        fitted: of the inputs that the pair is fitted to.
        other: of those that it is judged by; None for the same.
        rank: k, the largest.
        weighs: multiply with a root of what is felt of errors of each map's outputs.
    """
    joined = side_by_side(matrices, scales)
    basis = Components(joined, fitted.fitting()).basis(rank)
    ends = np.cumsum([w.shape[1] for w in matrices])[:-1]

    def weigh(array: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        parts = np.split(array, ends)
        both = zip(weighs, parts, scales, strict=True)
        return np.concatenate([own(part) / scale for own, part, scale in both])

    inputs = fitted.fitting() if other is None else other.about(fitted.centre)
    return felt_tails(joined, basis.vectors, inputs, weigh)


def joint_pair(
    matrices: Sequence[Array],
    scales: Sequence[float],
    moments: Moments | None,
    rank: int,
    dtype: npt.DTypeLike,
    engine: Engine = PROCESSOR,
) -> tuple[Array, list[Array]]:
    """``A[m, k]`` and ``B_i[k, n_i]``, one for each ``W_i[m, n_i]``.

    Args:
        matrices: the W_i.
        scales: above 0.
        moments: C of the inputs; None fits to the weights alone.
        rank: k.
        dtype: of the factors.
        engine: does the work.
    """
    joined = side_by_side(matrices, scales)
    if moments is None:
        first, second = (part[0] for part in balanced_pair(joined[None], rank, np.float64, engine))
    else:
        first, second = output_pair(joined, moments.fitting(), rank, np.float64, engine)
    ends = np.cumsum([w.shape[1] for w in matrices])[:-1]
    parts = np.split(second, ends, axis=1)
    seconds = [(part / scale).astype(dtype) for part, scale in zip(parts, scales, strict=True)]
    return first.astype(dtype), seconds
