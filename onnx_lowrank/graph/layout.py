"""How an array is read from another one: a chain of transposes and reshapes.

A weight reaches its node through Transpose, Reshape, Squeeze and Unsqueeze nodes, a form then
looks at it as a stack of matrices, and a factor is stored the way its node wants it.  All of
these are one thing, a `Layout`.  Two layouts of one array are the same exactly if they have the
same shape and strides, whatever steps led there; that is how a weight which several nodes read
in several ways is recognised as one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from onnx_lowrank.numerics.arrays import Array

__all__ = ["Layout", "Step"]


# A factor has at most the axes of its weight; with more, all their orders are too many to try.
_MOST_AXES = 5


@dataclass(frozen=True)
class Step:
    """One transpose (by a permutation) or one reshape (to a shape)."""

    kind: Literal["transpose", "reshape"]
    argument: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """A chain of steps from an array of shape ``base`` to one of shape ``shape``."""

    base: tuple[int, ...]
    shape: tuple[int, ...]
    steps: tuple[Step, ...] = ()

    @classmethod
    def of(cls, shape: Sequence[int]) -> Layout:
        """The layout that leaves an array of this shape as it is."""
        return cls(tuple(shape), tuple(shape))

    def transpose(self, *perm: int) -> Layout:
        """This layout, then a transpose.  Raises ValueError if perm is no permutation."""
        if sorted(perm) != list(range(len(self.shape))):
            raise ValueError(f"{perm} is no permutation of the axes of {self.shape}")
        if perm == tuple(range(len(perm))):
            return self
        shape = tuple(self.shape[axis] for axis in perm)
        return Layout(self.base, shape, (*self.steps, Step("transpose", perm)))

    def reshape(self, *shape: int) -> Layout:
        """This layout, then a reshape.  Raises ValueError if the sizes differ."""
        if math.prod(shape) != math.prod(self.shape):
            raise ValueError(f"{self.shape} cannot be reshaped to {shape}")
        if shape == self.shape:
            return self
        return Layout(self.base, shape, (*self.steps, Step("reshape", shape)))

    def apply(self, array: Array) -> Array:
        """The array (of shape ``base``) read this way; a view wherever numpy can make one."""
        assert array.shape == self.base, (array.shape, self.base)
        for step in self.steps:
            if step.kind == "transpose":
                array = array.transpose(step.argument)
            else:
                array = array.reshape(step.argument)
        return array

    @property
    def key(self) -> Hashable:
        """Equal for two layouts of one array exactly if they read it the same way."""
        # A dummy with the strides of a contiguous array, and no memory of that size behind it:
        # transposes and most reshapes only compute new strides.
        strides = [1] * len(self.base)
        for axis in range(len(self.base) - 2, -1, -1):
            strides[axis] = strides[axis + 1] * max(self.base[axis + 1], 1)
        dummy = np.lib.stride_tricks.as_strided(np.zeros(1, np.int8), self.base, strides)
        try:
            for step in self.steps:
                if step.kind == "transpose":
                    dummy = dummy.transpose(step.argument)
                else:
                    dummy = np.reshape(dummy, step.argument, copy=False)
        except ValueError:  # a reshape that has to copy: only the steps tell what it reads
            return (self.shape, self.steps)
        # The stride of an axis of length 1 is arbitrary.
        return tuple(
            (length, stride if length > 1 else 0)
            for length, stride in zip(dummy.shape, dummy.strides, strict=True)
        )

    def inverse(self) -> Layout:
        """The layout that leads from ``shape`` back to ``base``."""
        back = Layout.of(self.shape)
        shapes = [self.base]
        for step in self.steps:
            before = Layout.of(shapes[-1])
            after = (
                before.transpose(*step.argument)
                if step.kind == "transpose"
                else before.reshape(*step.argument)
            )
            shapes.append(after.shape)
        for step, before_shape in zip(reversed(self.steps), reversed(shapes[:-1]), strict=True):
            if step.kind == "transpose":
                back = back.transpose(*(int(axis) for axis in np.argsort(step.argument)))
            else:
                back = back.reshape(*before_shape)
        return back

    def shortest(self) -> Layout:
        """The same reading by one transpose, one reshape, or both, where that is enough."""
        direct = Layout.of(self.base)
        ways = [direct.reshape(*self.shape)]
        if len(self.base) <= _MOST_AXES:
            turned = [direct.transpose(*p) for p in itertools.permutations(range(len(self.base)))]
            ways += [way for way in turned if way.shape == self.shape]
            ways += [way.reshape(*self.shape) for way in turned]
        key = self.key
        return next((w for w in ways if w.key == key and len(w.steps) < len(self.steps)), self)

    def then(self, other: Layout) -> Layout:
        """This layout, then another one of its shape; neighbouring transposes are merged."""
        result = self
        for step in other.steps:
            last = result.steps[-1] if result.steps else None
            if step.kind == "transpose" and last is not None and last.kind == "transpose":
                merged = tuple(last.argument[axis] for axis in step.argument)
                shape_before = tuple(result.shape[int(axis)] for axis in np.argsort(last.argument))
                result = Layout(self.base, shape_before, result.steps[:-1]).transpose(*merged)
            elif step.kind == "transpose":
                result = result.transpose(*step.argument)
            elif last is not None and last.kind == "reshape":
                result = _before_last_reshape(result).reshape(*step.argument)
            else:
                result = result.reshape(*step.argument)
        return result


def _before_last_reshape(layout: Layout) -> Layout:
    shorter = Layout.of(layout.base)
    for step in layout.steps[:-1]:
        shorter = (
            shorter.transpose(*step.argument)
            if step.kind == "transpose"
            else shorter.reshape(*step.argument)
        )
    return shorter
