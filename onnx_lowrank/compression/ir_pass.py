"""The compression as a pass of onnx_ir, for a `PassManager` among other passes."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from onnx_lowrank.compression.api import compress
from onnx_lowrank.compression.settings import Settings
from onnx_lowrank.compression.verbs import SETTINGS
from onnx_lowrank.phrases import near_names
from onnx_lowrank.schema.report import Report

__all__ = ["LowRankPass"]


class LowRankPass(ir.passes.FunctionalPass):
    """`compress` with fixed options: a new model, the one that is given stays as it is.

    Attributes:
        report: of the last model; None before there was one.
    """

    def __init__(self, **options: Any) -> None:
        """Takes what `compress` takes beside the model; see there.

        Raises:
            UsageError: an option is out of its range, or two exclude each other.
            TypeError: there is no such option.
        """
        known = {option.name for option in SETTINGS}
        for name in options:
            if name not in known:
                raise TypeError(f"LowRankPass: no option {name!r}; {near_names(name, known)}")
        Settings.of(options)  # now, not after the passes before this one
        self.options = options
        self.report: Report | None = None

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Compress a model; it counts as modified whatever became of its layers.

        Raises:
            LowRankError: as `compress` does.
        """
        result = compress(model, **self.options)
        self.report = result.report
        # Also where every layer stays dense: simplification, and the metadata on what was done.
        return ir.passes.PassResult(result.model, modified=True)
