"""Ranges: which steps of 8 bits hold what values of a model have been on samples.

The ranges are those of ONNX Runtime's own calibrators, with their own settings: the extremes
("minmax"), what leaves out the outermost hundred-thousandth ("percentile"), and the range that
keeps most of the distribution's information ("entropy").  They are fed here, one sample at a time,
since its calibrators want the model as a file and run it themselves.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np
from onnxruntime.quantization.calibrate import HistogramCollector
from onnxruntime.quantization.quant_utils import compute_scale_zp

from onnx_lowrank.errors import InputError
from onnx_lowrank.maps.static import ByteStep
from onnx_lowrank.numerics.arrays import Array

__all__ = ["METHODS", "Method", "Ranges"]

Method = Literal["minmax", "percentile", "entropy"]
METHODS: tuple[Method, ...] = get_args(Method)
"""How a range is found, the simplest one first."""

_LEVELS = 255
# Bins of the histograms, and of what they are rounded to: ONNX Runtime's defaults.
_BINS: Mapping[Method, tuple[int, int]] = {"percentile": (2048, 128), "entropy": (128, 128)}
_PERCENTILE = 99.999


class Ranges:
    """What values have been so far."""

    def __init__(self) -> None:
        self._extremes: dict[str, tuple[float, float]] = {}
        self._histograms: dict[Method, Any] = {
            method: HistogramCollector(
                method=method,
                symmetric=False,
                num_bins=bins,
                num_quantized_bins=levels,
                percentile=_PERCENTILE,
                scenario="same",
            )
            for method, (bins, levels) in _BINS.items()
        }

    def see(self, values: Mapping[str, Array]) -> None:
        """Take what values are on one sample into account.

        Args:
            values: name -> elements, float32.

        Raises:
            InputError: one is not finite.
        """
        wide: dict[str, Array] = {}
        for name, array in values.items():
            if not array.size:
                self._extremes.setdefault(name, (0.0, 0.0))
                continue
            low, high = float(array.min()), float(array.max())
            if not np.isfinite([low, high]).all():
                raise InputError(
                    f"{name} holds NaN or Inf on a sample: 8 bits have no range for it"
                )
            before = self._extremes.get(name, (0.0, 0.0))
            self._extremes[name] = min(low, before[0]), max(high, before[1])
            if low < high:  # a histogram of one number has no width
                wide[name] = array
        for collector in self._histograms.values():
            collector.collect_value(wide)

    def steps(self, method: Method) -> dict[str, ByteStep]:
        """The steps of all values that were seen; each range holds 0."""
        ranges = dict(self._extremes)
        if method != "minmax" and self._histograms[method].get_histogram_dict():
            with contextlib.redirect_stdout(io.StringIO()):  # it tells what it does
                found = self._histograms[method].compute_collection_result()
            ranges |= {name: (float(own[0]), float(own[1])) for name, own in found.items()}
        return {name: _step(*own) for name, own in ranges.items()}


def _step(low: float, high: float) -> ByteStep:
    """Integers from 0 to 255 for a range."""
    zero, scale = compute_scale_zp(
        np.array(low, np.float32),
        np.array(high, np.float32),
        np.array(0, np.uint8),
        np.array(_LEVELS, np.uint8),
    )
    return ByteStep(float(scale), int(zero))
