"""Which rank: pure arithmetic on a spectrum and a shape.

For a map ``W[m, n]`` a pair of rank k has ``k·(m + n)`` parameters instead of ``m·n``, so it is
smaller below the break-even rank ``m·n / (m + n)``.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

__all__ = ["break_even", "energy_at", "energy_rank", "largest_rank", "rounded"]

# Ranks are computed from products of floats such as (1 - 0.1)·m·n, whose rounding is below this.
_SLACK = 1e-9


def break_even(m: int, n: int) -> float:
    """The rank at which a pair has as many parameters as ``W[m, n]``; 0 for an empty one."""
    return m * n / (m + n) if m and n else 0.0


def largest_rank(m: int, n: int, share: float) -> int:
    """Largest rank whose pair has at most ``share`` of the parameters of ``W[m, n]``.

    Never above ``min(m, n)``, where the pair is exact; 0 if not even rank 1 fits.
    """
    return max(0, min(m, n, math.floor(share * break_even(m, n) + _SLACK)))


def energy_rank(squares: npt.NDArray[np.float64], energy: float, rest: float = 0.0) -> int:
    """Smallest rank whose squared singular values hold the share ``energy`` of their sum.

    Args:
        squares: squared singular values, falling, shape [s].
        energy: share in (0, 1].
        rest: sum of further ones; those that are given have to hold the share.

    Returns:
        A rank in 1..s; 1 for a matrix of zeros, which any rank represents.
    """
    # What is cut off, summed from the small end so that small tails keep their digits:
    # tails[k] is the energy outside the first k.
    tails = np.concatenate([np.cumsum(squares[::-1])[::-1], [0.0]]) + rest
    enough = tails <= (1.0 - energy) * tails[0]
    return max(1, int(np.argmax(enough)))


def energy_at(squares: npt.NDArray[np.float64], rank: int, rest: float = 0.0) -> float:
    """Share of the sum of the squared singular values, and a rest, that the first ``rank`` hold."""
    total = float(squares.sum()) + rest
    return 1.0 if total == 0.0 else 1.0 - (float(squares[rank:].sum()) + rest) / total


def rounded(rank: int, multiple: int, largest: int, *, up: bool) -> int:
    """A rank on a multiple: the next one up, or the next one down.

    Args:
        rank: the rank.
        multiple: what to round to.
        largest: limit; where the multiple above exceeds it, the rank stays as it is, since the
            multiple below would hold less energy than asked for.
        up: False rounds down, for a rank that spends a budget; one below the multiple stays.
    """
    if not up:
        return rank // multiple * multiple or rank
    above = -(-rank // multiple) * multiple
    return above if above <= largest else rank
