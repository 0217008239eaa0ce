"""Whether two models compute the same, but for rounding."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from onnx_lowrank.numerics.arrays import Feed
from onnx_lowrank.schema.measures import OutputCheck

__all__ = ["change", "same_bits"]

# A graph in another order computes the same: this is rounding, not another result.
_ROUNDING = {
    ir.DataType.FLOAT16: 1e-2,
    ir.DataType.BFLOAT16: 5e-2,
}
_ROUNDING_FLOAT = 1e-4
# Outputs of a sigmoid or a softmax near 0 are exact to this, however small they are.
_ROUNDING_ABSOLUTE = 1e-6


def change(checks: Iterable[OutputCheck], types: Iterable[ir.DataType | None]) -> str | None:
    """The first output that is further off than rounding, as the end of a sentence; or None.

    Args:
        checks: the figures of each output.
        types: of the outputs and of what they are computed with: the coarsest one counts.
    """
    limit = max((_ROUNDING[t] for t in types if t in _ROUNDING), default=_ROUNDING_FLOAT)
    for check in checks:
        if not (check.relative_l2 <= limit or check.max_abs_error <= _ROUNDING_ABSOLUTE):
            return (
                f"changed output {check.name!r} by {check.relative_l2:.1e} "
                f"(relative; limit {limit:g})"
            )
    return None


def same_bits(one: Feed, other: Feed) -> bool:
    """Whether two runs gave the same, bit by bit."""
    return all(
        array.tolist() == other[name].tolist()
        if array.dtype.kind == "O"
        else array.tobytes() == other[name].tobytes()
        for name, array in one.items()
    )
