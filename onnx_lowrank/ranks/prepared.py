"""Prepared: what is known of a model before any rank is chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from onnx_lowrank.fitting.statistics import Statistics
from onnx_lowrank.maps.choice import Choice, Spectrum
from onnx_lowrank.maps.find import Finding, Group
from onnx_lowrank.ranks.macs import Macs
from onnx_lowrank.report import Calibration

__all__ = ["Prepared"]


@dataclass(frozen=True, eq=False)
class Prepared:
    """What is known of a model.

    Attributes:
        model: simplified, and otherwise as it was given.
        finding: its linear maps.
        early: what becomes of groups whatever their numbers are.
        measured: the spectra of the others.
        statistics: what the final factors are fitted to and judged with.
        search: what factors are fitted to while ranks are searched; it leaves out the samples
            that the search judges with, whose moments are its ``held`` ones.
        calibration: the same in short, for the report.
        macs: multiply-accumulates, where the model can be run.
    """

    model: ir.Model
    finding: Finding
    early: Mapping[Group, Choice]
    measured: Mapping[Group, Spectrum]
    statistics: Statistics
    search: Statistics
    calibration: Calibration | None
    macs: Macs | None
