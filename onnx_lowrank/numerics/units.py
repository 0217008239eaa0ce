"""Which units can be left out in front of a map: pure arithmetic on second moments.

Units h[m] that a map ``W[m, n]`` reads are left out one after the other, each time those that cost
least, and what remains of W is fitted again to make up for them: the optimal brain surgeon
(B. Hassibi & D. Stork, NIPS 1992) on ``E‖h W − h_S T‖²``, for whole rows of W as in ZipLM
(E. Kurtic et al., NeurIPS 2023).  With ``H = C⁻¹`` of what remains, leaving out the units D adds
``tr(W_Dᵀ (H_DD)⁻¹ W_D)``, and ``W ← W − H_·D (H_DD)⁻¹ W_D``, ``H ← H − H_·D (H_DD)⁻¹ H_D·``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.linalg

from onnx_lowrank.numerics.arrays import Array

__all__ = ["Units"]

Float64 = npt.NDArray[np.float64]

# Added to C, as a share of its mean diagonal: so that it has an inverse.
_RIDGE = 1e-5
# Units are left out in so many steps; those of a step are found among so many times as many that
# are cheapest at its start, one after the other: of two that are alike only one is cheap.
_STEPS, _POOL = 96, 4


@dataclass(frozen=True, eq=False)
class Units:
    """Units in front of a map in the order in which they are kept.

    Attributes:
        order: their numbers, shape [m]; of k kept units the first k.
        lost: what the map's outputs lose with k kept, ``E‖h W − h_S T‖²``, shape [m + 1], k = 0…m;
            never rising.
    """

    order: npt.NDArray[np.intp]
    lost: Float64

    @classmethod
    def of(cls, matrix: Array, second: Float64) -> Units:
        """From a map and the moments of its units.

        Args:
            matrix: ``W[m, n]``.
            second: ``C[m, m] = E[hᵀh]``.
        """
        rest = np.array(matrix, np.float64)
        total = float(np.vdot(second @ rest, rest))
        left = np.arange(len(rest))
        inverse = np.linalg.inv(_raised(second))
        inverse = 0.5 * (inverse + inverse.T)
        size = -(-len(left) // _STEPS)
        removed: list[int] = []
        lost = [0.0]
        while len(left):
            worst, steps = _cheapest(inverse, rest, size)
            lost += [lost[-1] + float(step) for step in np.cumsum(steps)]
            stays = np.setdiff1d(np.arange(len(left)), worst)
            corner = scipy.linalg.cho_factor(inverse[np.ix_(worst, worst)])
            solved = scipy.linalg.cho_solve(corner, rest[worst])
            removed += [int(unit) for unit in left[worst]]
            across = inverse[np.ix_(stays, worst)]
            rest = rest[stays] - across @ solved
            inverse = inverse[np.ix_(stays, stays)] - across @ scipy.linalg.cho_solve(
                corner, across.T
            )
            left = left[stays]
        tails = np.minimum(np.array(lost[::-1]), total)
        tails[0] = total
        return cls(np.array(removed[::-1], np.intp), np.maximum.accumulate(tails[::-1])[::-1])

    @property
    def rank(self) -> int:
        """How many there are."""
        return len(self.order)

    def narrow(self) -> Units:
        """The same: there is little to store."""
        return self

    def squares(self, first: float) -> Float64:
        """What each further unit adds to the energy of the outputs, shape [m].

        Args:
            first: what the outputs at the centre add, which no unit has to hold.
        """
        found = self.lost[:-1] - self.lost[1:]
        found[:1] += first
        return np.asarray(found)

    def pair(self, matrix: Array, second: Float64, rank: int) -> tuple[Float64, Float64]:
        """``S[m, k]``, one 1 in each column, and ``T[k, n]`` with ``h S T`` closest to ``h W``.

        Args:
            matrix: ``W[m, n]``.
            second: ``C[m, m]`` of the units, which need not be those of the order.
            rank: k.
        """
        kept = np.sort(self.order[:rank])
        raised = _raised(second)
        aimed = raised[kept] @ np.asarray(matrix, np.float64)
        solved = scipy.linalg.solve(raised[np.ix_(kept, kept)], aimed, assume_a="pos")
        first = np.zeros((len(matrix), len(kept)))
        first[kept, np.arange(len(kept))] = 1.0
        return first, np.asarray(solved)


def _cheapest(inverse: Float64, rest: Float64, count: int) -> tuple[npt.NDArray[np.intp], Float64]:
    """The units to leave out next, and what each of them adds to the loss."""
    costs = np.square(rest).sum(axis=1) / np.diag(inverse)
    pool = np.argsort(costs, kind="stable")[: _POOL * count]
    h, w = inverse[np.ix_(pool, pool)], rest[pool]
    open_ = np.ones(len(pool), bool)
    found, steps = [], []
    for _ in range(min(count, len(pool))):
        costs = np.where(open_, np.square(w).sum(axis=1) / np.where(open_, np.diag(h), 1.0), np.inf)
        unit = int(np.argmin(costs))
        found.append(unit)
        steps.append(costs[unit])
        column = h[:, unit] / h[unit, unit]
        w = w - np.outer(column, w[unit])
        h = h - np.outer(column, h[unit])
        open_[unit] = False
    return pool[found], np.array(steps)


def _raised(second: Float64) -> Float64:
    """C with a ridge; units that are always 0 get a moment of their own."""
    size = len(second)
    raised = second.copy()
    scale = float(np.trace(second)) / max(size, 1)
    raised[np.diag_indices(size)] += _RIDGE * scale if scale > 0.0 else 1.0
    return raised
