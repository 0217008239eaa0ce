"""Make an exported ONNX model smaller and faster without retraining.

Constant linear maps are replaced by two chained ones, ``W[m, n] ≈ A[m, k] B[k, n]``, from SVD:

    result = onnx_lowrank.compress("in.onnx", energy=0.95)
    result.save("out.onnx")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from onnx_lowrank.errors import (
    GateError,
    InputError,
    LowRankError,
    UsageError,
)
from onnx_lowrank.report import Report

if TYPE_CHECKING:
    from onnx_lowrank.compression.api import compress
    from onnx_lowrank.compression.result import Result
    from onnx_lowrank.compression.sweep import sweep

__all__ = [
    "GateError",
    "InputError",
    "LowRankError",
    "Report",
    "Result",
    "UsageError",
    "compress",
    "sweep",
]


def __getattr__(name: str) -> Any:
    """Import what needs ONNX Runtime only when it is asked for: ``--help`` must answer at once."""
    if name == "compress":
        from onnx_lowrank.compression.api import compress

        return compress
    if name == "sweep":
        from onnx_lowrank.compression.sweep import sweep

        return sweep
    if name == "Result":
        from onnx_lowrank.compression.result import Result

        return Result
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
