"""Factors: the two arrays that stand for a weight, and how far their product is from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnx_lowrank.maps.find import Group
from onnx_lowrank.numerics.arrays import Array

__all__ = ["Errors", "Factors", "constants_of", "constants_of_pairs", "shifted"]


@dataclass(frozen=True)
class Errors:
    """How far a pair, as stored, is from its weight.

    Attributes:
        weight: ``‖W − A·B‖ / ‖W‖`` (Frobenius).
        output: ``√(E‖x(W − A·B) − s‖² / E‖x W‖²)`` over held-out samples, s what a bias adds for
            the pair, in the coordinates that it was fitted in; None without them.
        refit: squared relative error of what a refit layer should give, before and after, on
            samples that the refit was not made with; None where there was none.
    """

    weight: float
    output: float | None = None
    refit: tuple[float, float] | None = None


@dataclass(frozen=True, eq=False)
class Factors:
    """A pair: ``first`` is ``A[e, m, k]``, ``second`` is ``B[e, k, n]``.

    Attributes:
        first: the same array in all pairs that share it.
        second: their own.
        errors: how far the pair is off.
        shared: whether other groups share the first factor.
        shift: s[n], added to the group's bias: what W makes of the mean of its inputs
            and the pair does not; None leaves the bias.
    """

    first: Array
    second: Array
    errors: Errors
    shared: bool = False
    shift: npt.NDArray[np.float64] | None = None

    @property
    def rank(self) -> int:
        """The rank k."""
        return int(self.first.shape[2])

    def product(self) -> Array:
        """``A @ B``, shape [e, m, n], in the factors' type."""
        wide = np.result_type(np.float32, self.first.dtype)
        product = np.matmul(self.first.astype(wide), self.second.astype(wide))
        return np.asarray(product, self.first.dtype)

    def constants(self, group: Group) -> dict[str, Array]:
        """What stands in place of a group's weight and bias where pairs cannot: name -> elements.

        Args:
            group: whose pair this is.
        """
        return constants_of(group, self.product(), self.shift)


def constants_of(
    group: Group, stack: Array, shift: npt.NDArray[np.float64] | None = None
) -> dict[str, Array]:
    """What stands in place of a group's weight, and of its bias, in the types they are stored in.

    Args:
        group: whose weight.
        stack: ``W[e, m, n]``, of any type.
        shift: s[n], added to the bias; None leaves it.

    Returns:
        Name -> elements.
    """
    matrix = group.matrix
    stored = np.asarray(stack, matrix.tensor.dtype.numpy())
    found = {matrix.name: np.ascontiguousarray(matrix.layout.inverse().apply(stored))}
    if shift is not None:
        assert group.bias is not None
        found[group.bias.name] = shifted(group.bias.tensor.numpy(), shift)
    return found


def constants_of_pairs(pairs: Mapping[Group, Factors]) -> dict[str, Array]:
    """What stands in place of the weights and biases of groups: name -> elements.

    Args:
        pairs: of the groups.
    """
    found: dict[str, Array] = {}
    for group, factors in pairs.items():
        found |= factors.constants(group)
    return found


def shifted(own: Array, shift: npt.NDArray[np.float64]) -> Array:
    """The elements of a bias with s[n] on top, in its own type and shape."""
    wide = own.astype(np.float64).reshape(-1) + shift
    return np.asarray(wide.reshape(own.shape).astype(own.dtype))
