"""Prepared: what is known of a model before any rank is chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import get_args

import onnx_ir as ir

from onnx_lowrank.fitting.static import StaticSteps
from onnx_lowrank.fitting.statistics import Statistics
from onnx_lowrank.fitting.statistics_file import SavedStatistics, weight_of
from onnx_lowrank.maps.choice import Choice, Spectrum
from onnx_lowrank.maps.find import Finding, Group
from onnx_lowrank.maps.tables import Tables
from onnx_lowrank.numerics.crew import HERE, Crew
from onnx_lowrank.ranks.damage import DamageCurve, DamageFrom
from onnx_lowrank.ranks.format_wishes import FormatWishes
from onnx_lowrank.ranks.formats import Formats
from onnx_lowrank.ranks.macs import Macs
from onnx_lowrank.runtime.pieces import Pieces
from onnx_lowrank.schema.report import Calibration, EffortStep

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
        saved: what an earlier run or this one wrote or would write for later ones.
        quantized: which formats are wanted.
        formats: those of the layers and tables that may have some; all others stay floats.
        floats: why the others do, where formats were asked for.
        tables: of embeddings, whose rows may be stored in integers too.
        stored: name of a weight that IN holds as integers -> bytes of them; ``model`` has floats.
        untried: methods that the effort asks for -> why one is not tried, None where it is.
        crew: who works on its layers.
        steps: those that were tried before, whose outcome the statistics have.
        pieces: where finished work of an earlier run is; None: nowhere.
        static: steps of inputs and results of products that may be rounded with ranges that are
            known before a run; None without any.
    """

    model: ir.Model
    finding: Finding
    early: Mapping[Group, Choice]
    measured: Mapping[Group, Spectrum]
    statistics: Statistics
    search: Statistics
    calibration: Calibration | None
    macs: Macs | None
    saved: SavedStatistics | None = None
    quantized: FormatWishes = field(default_factory=FormatWishes)
    formats: Mapping[Group, Formats] = field(default_factory=dict)
    floats: Mapping[Group, str] = field(default_factory=dict)
    tables: Tables = field(default_factory=Tables)
    untried: Mapping[str, str | None] = field(default_factory=dict)
    crew: Crew = HERE
    stored: Mapping[str, int] = field(default_factory=dict)
    steps: tuple[EffortStep, ...] = ()
    pieces: Pieces | None = None
    static: StaticSteps | None = None

    def known_curve(self, group: Group, fisher: bool) -> DamageCurve | None:
        """The damage of a group that was measured in an earlier run.

        Args:
            group: the group.
            fisher: whether its factors are fitted to what the outputs feel.
        """
        saved = self.saved
        if saved is None or saved.curves_fisher != fisher:
            return None
        found = saved.curves.get(weight_of(group))
        if found is None:
            return None
        known_from = next((own for own in get_args(DamageFrom) if own == found.known_from), None)
        if known_from is None:
            return None
        return DamageCurve(found.points, found.tails, known_from)
