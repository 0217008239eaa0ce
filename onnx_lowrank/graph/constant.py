"""Constant: a weight as one node reads it, or why a constant value cannot be used as one."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy.typing as npt
import onnx_ir as ir

from onnx_lowrank.graph.layout import Layout

__all__ = ["FLOATS", "FLOAT_FIRST", "Constant", "Unusable"]

FLOATS = frozenset(
    {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}
)

FLOAT_FIRST = "factor the float model first, then quantize"
"""The advice in the reason of every weight that is quantized."""


@dataclass(frozen=True, eq=False)
class Constant:
    """A constant as one node reads it.

    Attributes:
        root: the initializer, or the output of the Constant node.
        tensor: the root's tensor.
        layout: how the tensor is read, from the root's shape to ``shape``.
        dtype: the element type that the reading node sees (the root's may differ by Casts).
    """

    root: ir.Value
    tensor: ir.TensorProtocol
    layout: Layout
    dtype: ir.DataType

    @property
    def name(self) -> str:
        """The root's name."""
        return self.root.name or ""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the constant as it is read."""
        return self.layout.shape

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def transpose(self, *perm: int) -> Constant:
        """The same constant, transposed further."""
        return Constant(self.root, self.tensor, self.layout.transpose(*perm), self.dtype)

    def reshape(self, *shape: int) -> Constant:
        """The same constant, reshaped further."""
        return Constant(self.root, self.tensor, self.layout.reshape(*shape), self.dtype)

    def numpy(self) -> npt.NDArray[Any]:
        """The elements in the type they are stored in; a view on the stored array if possible.

        A file is mapped into memory for each call, until the last view is gone: the pages of all
        weights together may be more than there is memory, and threads that read one weight do not
        take the file from each other.
        """
        tensor = self.tensor
        if isinstance(tensor, ir.ExternalTensor):
            tensor = ir.ExternalTensor(
                tensor.location,
                tensor.offset,
                tensor.length,
                tensor.dtype,
                shape=tensor.shape,
                name=tensor.name or "",
                base_dir=tensor.base_dir,
            )
        return self.layout.apply(tensor.numpy())

    def read(self) -> npt.NDArray[Any]:
        """The elements in the type that the reading node sees; a view where that is the same."""
        return self.numpy().astype(self.dtype.numpy(), copy=False)

    def unusable(self, reason: str) -> Unusable:
        """That it is constant and yet cannot be used, for a reason (see `Unusable`)."""
        return Unusable(self.name, self.size, self.shape, reason)


@dataclass(frozen=True)
class Unusable:
    """A value that is constant, or nearly so, and cannot be factored.

    Attributes:
        name: the value.
        size: number of elements, 0 if not known.
        shape: as its node reads it, None if not known.
        reason: why, as the end of a sentence that begins with the value's name.
    """

    name: str
    size: int
    shape: tuple[int, ...] | None
    reason: str

    def unusable(self, reason: str) -> Unusable:
        """The same for another reason."""
        return replace(self, reason=reason)
