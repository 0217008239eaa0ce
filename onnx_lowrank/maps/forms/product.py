"""What the forms of matrix products share: their constant operand, its slices, new shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnx_lowrank.graph.constant import Constant, Unusable
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.maps.forms.base import (
    Refusal,
)
from onnx_lowrank.numerics.arrays import Array

__all__ = ["by_slice", "constant_operand", "hidden_shape", "row_constant", "stack"]


def constant_operand(node: ir.Node, index: int, constants: Constants) -> Constant | Refusal | None:
    """The constant on one side of a product, why it cannot be factored, or None if it is computed.

    Where both sides are constant the right one answers, with a refusal.
    """
    constant = constants.resolve(node.inputs[index])
    activation = node.inputs[1 - index]
    other = constants.resolve(activation)
    if constant is None or (index == 0 and other is not None):
        return None
    if isinstance(constant, Unusable):
        return Refusal.of(constant)
    reason = None
    if isinstance(other, Constant):
        reason = "both operands are constant; simplification folds the node"
    elif len(constant.shape) < 2:
        reason = "a vector has no factors"
    elif len(constant.shape) > 2:
        rank = None if activation is None or activation.shape is None else len(activation.shape)
        if rank is None:
            reason = "a batch of weights whose activation has an unknown number of axes"
        elif rank < 2:
            reason = "a batch of weights applied to a single vector"
    if reason is None:
        return constant
    return Refusal.because(constant, reason)


def row_constant(value: ir.Value | None, size: int, constants: Constants) -> Constant | None:
    """A constant of shape [size], with any axes of one before; None if the value is none such."""
    found = constants.resolve(value)
    if isinstance(found, Constant) and found.shape[-1:] == (size,) and found.size == size:
        return found
    return None


def stack(operand: Constant, *, transposed: bool) -> Constant:
    """The matrices ``[e, m, n]`` of an operand with any number of leading batch dimensions."""
    *lead, rows, columns = operand.shape
    matrices = operand.reshape(math.prod(lead), rows, columns)
    return matrices.transpose(0, 2, 1) if transposed else matrices


def by_slice(rows: Array, lead: Sequence[int]) -> Array:
    """The rows ``[…, N, m]`` of an activation by slice of ``W[*lead, m, n]``: [e, N', m]."""
    if math.prod(lead) == 1:
        return rows.reshape(1, -1, rows.shape[-1])
    batch = np.broadcast_shapes(rows.shape[:-2], tuple(lead))
    rows = np.broadcast_to(rows, (*batch, *rows.shape[-2:]))
    padded = [1] * (len(batch) - len(lead)) + list(lead)
    own = [axis for axis, size in enumerate(padded) if size > 1]
    rest = [axis for axis in range(rows.ndim) if axis not in own]
    return rows.transpose(*own, *rest).reshape(math.prod(lead), -1, rows.shape[-1])


def hidden_shape(
    output: ir.Value, axis: int, rank: int, fallback: ir.Shape | None
) -> ir.Shape | None:
    """Shape of ``X @ A``: the node's output with one axis (-1 or -2) replaced by the rank."""
    source = output.shape if output.shape is not None else fallback
    if source is None:
        return None
    dims = list(source)
    if axis == -2 and len(dims) < 2:
        axis = -1  # a vector on the right of a matrix
    if len(dims) < -axis:
        return None
    dims[axis] = rank
    return ir.Shape(dims)
