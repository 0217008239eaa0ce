"""NaN and Inf that a provider gives where the CPU gives numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from onnx_lowrank.numerics.arrays import Feed

__all__ = ["all_finite", "not_finite"]


def all_finite(outputs: Feed) -> bool:
    """Whether no output holds NaN or Inf; outputs that are no numbers count as finite."""
    return not any(_odd(array).any() for array in outputs.values())


def not_finite(found: Feed, expected: Feed) -> str | None:
    """Where one provider gives NaN or Inf and the CPU gives numbers, as the end of a sentence.

    Args:
        found: output -> array, as the provider gave it.
        expected: the same on the CPU.
    """
    for name, array in found.items():
        wrong = _odd(array)
        if name in expected and np.shape(expected[name]) == wrong.shape:
            wrong &= ~_odd(expected[name])
        if wrong.any():
            return (
                f"gives NaN or Inf in {int(wrong.sum())} of {wrong.size} values of output "
                f"{name!r}, where the CPU gives numbers"
            )
    return None


def _odd(array: Any) -> Any:
    array = np.asarray(array)
    if array.dtype.kind in "biuOUS":
        return np.zeros(array.shape, bool)
    return ~np.isfinite(array.astype(np.float64) if array.dtype.kind == "V" else array)
