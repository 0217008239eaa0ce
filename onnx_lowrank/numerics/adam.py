"""Gradient descent with Adam on many arrays at once, in numpy.

D. P. Kingma, J. Ba, "Adam: a method for stochastic optimization", ICLR 2015, algorithm 1.  Each
array has its own rate, a share of the root mean square of its elements, so that one setting serves
factors of any scale; the rate rises over the first steps and falls along a cosine to 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Adam", "AdamState", "schedule"]

Float32 = npt.NDArray[np.float32]

_FIRST, _SECOND, _EPSILON = 0.9, 0.99, 1e-12
# Elements at a time, so that all that one step reads and writes of them stays in the cache.
_BLOCK = 1 << 15
# Gradients are cut here: squares of more are near the end of float32.
_MOST = np.float32(2.0**60)


def schedule(step: int, steps: int) -> float:
    """Share of the full rate at a step, counted from 0: a short rise, then a half cosine to 0."""
    rise = min(20, max(1, steps // 10))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1.0 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


@dataclass(frozen=True, eq=False)
class AdamState:
    """A descent on its way.

    Attributes:
        values: all arrays, one after the other.
        first: first moments of the gradients.
        second: second ones.
        steps: since the last start.
        rate: as in `Adam`.
    """

    values: Float32
    first: Float32
    second: Float32
    steps: int
    rate: float


class Adam:
    """Arrays trained by gradient descent.

    Attributes:
        arrays: name -> the array as it is now; views that `step` changes.
        rate: about the largest change of an element in one full step, as a share of the root mean
            square of its array at the start.
    """

    def __init__(self, arrays: Mapping[str, npt.NDArray[np.generic]], rate: float) -> None:
        """Start at these arrays.

        Args:
            arrays: name -> start, converted to float32.
            rate: change of an element in one step, at most about, as a share of the root mean
                square of its array.
        """
        sizes = {name: array.size for name, array in arrays.items()}
        total = sum(sizes.values())
        self._values = np.empty(total, np.float32)
        self._first = np.zeros(total, np.float32)
        self._second = np.zeros(total, np.float32)
        self._steps = 0
        self.rate = rate
        self.arrays: dict[str, Float32] = {}
        self._parts: list[tuple[str, slice, float]] = []
        start = 0
        largest = 0.0
        for name, array in arrays.items():
            part = slice(start, start + sizes[name])
            self._values[part] = array.reshape(-1)
            self.arrays[name] = self._values[part].reshape(array.shape)
            self._parts.append((name, part, _rms(self._values[part])))
            largest = max(largest, self._parts[-1][2])
            start = part.stop
        # An array of zeros, such as an unused bias, has no scale of its own.
        self._parts = [(name, part, own or 0.1 * largest) for name, part, own in self._parts]

    def restart(self, arrays: Mapping[str, npt.NDArray[np.generic]], rate: float) -> None:
        """Go on from other arrays with another rate, as if no step had been taken."""
        for name, part, _ in self._parts:
            self._values[part] = arrays[name].reshape(-1)
        self._first[:] = 0.0
        self._second[:] = 0.0
        self._steps, self.rate = 0, rate

    def state(self) -> AdamState:
        """All that the next step depends on."""
        return AdamState(
            self._values.copy(), self._first.copy(), self._second.copy(), self._steps, self.rate
        )

    def resume(self, state: AdamState) -> None:
        """Go on from a state of the same arrays."""
        self._values[:], self._first[:], self._second[:] = state.values, state.first, state.second
        self._steps, self.rate = state.steps, state.rate

    def step(self, gradients: Mapping[str, Float32], share: float) -> None:
        """Change the arrays by one step.

        Args:
            gradients: of the arrays by name; one that is missing stays as it is.
            share: of the full rate.
        """
        self._steps += 1
        first = 1.0 - _FIRST**self._steps
        second = 1.0 - _SECOND**self._steps
        buffer = np.empty(_BLOCK, np.float32)
        for name, part, scale in self._parts:
            if name not in gradients:
                continue
            gradient = gradients[name].reshape(-1)
            for start in range(0, gradient.size, _BLOCK):
                g = gradient[start : start + _BLOCK]
                where = slice(part.start + start, part.start + start + g.size)
                if not max(g.max(), -g.min()) <= _MOST:
                    g = np.clip(g, -_MOST, _MOST)
                m, v, work = self._first[where], self._second[where], buffer[: g.size]
                np.subtract(g, m, out=work)
                work *= 1.0 - _FIRST
                m += work
                np.multiply(g, g, out=work)
                work -= v
                work *= 1.0 - _SECOND
                v += work
                np.sqrt(v, out=work)
                work += _EPSILON
                np.divide(m, work, out=work)
                work *= share * self.rate * scale * math.sqrt(second) / first
                self._values[where] -= work

    def copy(self) -> dict[str, Float32]:
        """The arrays as they are now, safe from further steps."""
        values = self._values.copy()
        return {
            name: values[part].reshape(self.arrays[name].shape) for name, part, _ in self._parts
        }


def _rms(values: Float32) -> float:
    return math.sqrt(float(np.mean(np.square(values, dtype=np.float64)))) if values.size else 0.0
