"""Make an exported ONNX model smaller and faster without retraining.

Constant linear maps are replaced by two chained ones, ``W[m, n] ≈ A[m, k] B[k, n]``, from SVD:

    result = onnx_lowrank.compress("in.onnx", energy=0.95)
    result.save("out.onnx")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from onnx_lowrank.errors import (
    GateError,
    InputError,
    LowRankError,
    UsageError,
)
from onnx_lowrank.schema.report import Report

if TYPE_CHECKING:
    from onnx_lowrank.compression.api import compress, inspect
    from onnx_lowrank.compression.inspection import Inspection
    from onnx_lowrank.compression.ir_pass import LowRankPass
    from onnx_lowrank.compression.judging import bench, check, providers, support
    from onnx_lowrank.compression.result import Result
    from onnx_lowrank.compression.sweep import sweep
    from onnx_lowrank.compression.sweep_report import SweepReport
    from onnx_lowrank.evaluation.bench import BenchReport
    from onnx_lowrank.evaluation.check import CheckReport
    from onnx_lowrank.reports.writers import write_report
    from onnx_lowrank.targets.base import Offer
    from onnx_lowrank.targets.support import SupportReport

    __version__: str

__all__ = [
    "BenchReport",
    "CheckReport",
    "GateError",
    "InputError",
    "Inspection",
    "LowRankError",
    "LowRankPass",
    "Offer",
    "Report",
    "Result",
    "SupportReport",
    "SweepReport",
    "UsageError",
    "__version__",
    "bench",
    "check",
    "compress",
    "inspect",
    "providers",
    "support",
    "sweep",
    "write_report",
]

# Imported only when they are asked for: ``--help`` must answer at once.
_HOMES = {
    "BenchReport": "evaluation.bench",
    "CheckReport": "evaluation.check",
    "Inspection": "compression.inspection",
    "LowRankPass": "compression.ir_pass",
    "Offer": "targets.base",
    "Result": "compression.result",
    "SupportReport": "targets.support",
    "SweepReport": "compression.sweep_report",
    "bench": "compression.judging",
    "check": "compression.judging",
    "compress": "compression.api",
    "inspect": "compression.api",
    "providers": "compression.judging",
    "support": "compression.judging",
    "sweep": "compression.sweep",
    "write_report": "reports.writers",
}


def __getattr__(name: str) -> Any:
    """What needs ONNX Runtime, and the version of the package."""
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("onnx-lowrank")
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Also what is imported only when it is asked for."""
    return sorted({*globals(), *__all__})
