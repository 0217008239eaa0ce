"""Furthest: how far one may go along steps of rising loss until a limit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from onnx_lowrank.numerics.knapsack import Solution

__all__ = ["furthest"]

# How often the whole model is judged in a search.
_EVALUATIONS = 12
# After so many the guess is not asked any more.
_GUESSED = 4


def furthest(
    steps: Sequence[Solution],
    loss: Callable[[Solution], float],
    limit: float,
    guess: Callable[[Solution], float],
    known: Mapping[int, float],
) -> tuple[int, dict[int, float]]:
    """The last step whose loss stays within a limit, by bisection.

    The loss grows along the steps but for noise.  A guess of it, scaled to what was found so far,
    says where to look next.

    Args:
        steps: from no damage to the most.
        loss: the real loss; dear.
        limit: the limit.
        guess: about proportional to the loss; cheap.
        known: losses of steps that are known already.

    Returns:
        Index of the step (0 at worst), and all losses that are known now.
    """
    found = {0: 0.0, **known}
    low = max((index for index, value in found.items() if value <= limit), default=0)
    high = min((i for i, value in found.items() if value > limit and i > low), default=len(steps))
    scale = 1.0
    for number in range(_EVALUATIONS):
        if high - low <= 1:
            break
        # As far as the guess goes within the limit, but always well inside of the interval.
        inside = [i for i in range(low + 1, high) if scale * guess(steps[i]) <= limit]
        margin = (high - low) // 8
        index = min(max(max(inside, default=low + 1), low + 1 + margin), high - 1 - margin)
        if number >= _GUESSED:  # the guess leads astray: halve
            index = (low + high) // 2
        index = min(max(index, low + 1), high - 1)
        found[index] = value = loss(steps[index])
        guessed = guess(steps[index])
        if guessed > 0.0 and value > 0.0:
            scale = value / guessed
        if value <= limit:
            low = index
        else:
            high = index
        if steps[low].cost - steps[min(high, len(steps) - 1)].cost <= 0.005 * steps[0].cost:
            break
    return low, found
