"""Declared: the inputs and outputs of a model, as the model itself describes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

__all__ = ["InputSpec", "input_specs", "output_specs"]


@dataclass(frozen=True)
class InputSpec:
    """One input of the graph as the model declares it.

    Attributes:
        name: the input.
        dtype: element type; ``object`` for strings and for what is not a tensor.
        shape: one entry an axis: a fixed size, the name of a symbolic size, or None where it is
            unknown; None as a whole where even the rank is unknown.
        kind: "tensor"; "sequence" for one of tensors; or another type, such as
            "Sequence(Sequence(Tensor(FLOAT)))".
        optional: the input need not be fed.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...] | None
    kind: str = "tensor"
    optional: bool = False

    @property
    def fed(self) -> bool:
        """Whether samples can hold it."""
        return self.kind in ("tensor", "sequence")

    @property
    def drawn(self) -> bool:
        """Whether random samples hold it."""
        return self.kind == "tensor" and not self.optional


def input_specs(model: ir.Model) -> tuple[InputSpec, ...]:
    """The inputs that a run has to feed, in the order of the graph.

    Initializers that are listed as inputs too (all of them before IR version 4) have a default
    and are left out.
    """
    return tuple(
        _spec(value) for value in model.graph.inputs if value.name not in model.graph.initializers
    )


def output_specs(model: ir.Model) -> tuple[InputSpec, ...]:
    """The outputs, described as the inputs are."""
    return tuple(map(_spec, model.graph.outputs))


def _spec(value: ir.Value) -> InputSpec:
    name, held = value.name or "", value.type
    optional = isinstance(held, ir.OptionalType)
    if isinstance(held, ir.OptionalType):
        held = held.elem_type
    inner = held.elem_type if isinstance(held, ir.SequenceType) else None
    if isinstance(inner, ir.TensorType) and inner.dtype != ir.DataType.UNDEFINED:
        return InputSpec(name, np.dtype(inner.dtype.numpy()), None, "sequence", optional)
    typed = isinstance(held, ir.TensorType) and held.dtype != ir.DataType.UNDEFINED
    if not isinstance(held, ir.TensorType) or not typed:
        kind = str(value.type) if value.type is not None else "an unknown type"
        return InputSpec(name, np.dtype(object), None, kind, optional)
    shape = None if value.shape is None else tuple(_axis(size) for size in value.shape)
    return InputSpec(name, np.dtype(held.dtype.numpy()), shape, "tensor", optional)


def _axis(size: int | ir.SymbolicDim) -> int | str | None:
    if isinstance(size, int):
        return size if size >= 0 else None  # some exporters write -1 for "any size"
    symbol = size.value
    # Paddle names every unknown size "?": equal names do not mean equal sizes there.
    return None if symbol in (None, "", "?", "-1") else symbol
