"""Figures of single layers for the report: spectra, bytes and times, where they are known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from onnx_lowrank.graph.walk import all_graphs
from onnx_lowrank.maps.choice import Decision, Spectrum
from onnx_lowrank.maps.find import Group
from onnx_lowrank.numerics.ranks import break_even
from onnx_lowrank.ranks.costs import CostTable
from onnx_lowrank.ranks.prepared import Prepared
from onnx_lowrank.schema.layer import LayerSpectrum

__all__ = ["Figures", "figures_of", "shown_spectrum"]

_MOST = 64
"""Ranks of a spectrum that are shown."""


@dataclass(frozen=True, eq=False)
class Figures:
    """What is known of layers beside what was decided.

    Attributes:
        measured: spectra.
        table: times of single layers; None where none were taken.
        stored: name of a constant -> bytes as stored.
    """

    measured: Mapping[Group, Spectrum] = field(default_factory=dict)
    table: CostTable | None = None
    stored: Mapping[str, int] = field(default_factory=dict)

    def spectrum(self, decision: Decision) -> LayerSpectrum | None:
        """The layer's spectrum, thinned; None where it was not measured."""
        group = decision.group
        found = None if group is None else self.measured.get(group)
        if group is None or found is None:
            return None
        return shown_spectrum(found, group.shape[1:], decision.choice.rank, group.break_even)

    def bytes(self, decision: Decision) -> tuple[int | None, int | None]:
        """Bytes of the layer's weight as stored, before and after."""
        group, choice = decision.group, decision.choice
        if group is None:
            # The first maps of a pair count with the second one.
            known = self.stored.get(decision.weight) if decision.size else 0
            return known, known
        heads = sum(head.matrix.tensor.nbytes for head in group.heads)
        before = int(group.matrix.tensor.nbytes + heads)
        plain = choice.rank is None and choice.format is None
        return before, before if plain else choice.bytes(group)

    def milliseconds(self, decision: Decision) -> tuple[float | None, float | None]:
        """Time of the layer by itself, before and after."""
        site, choice = decision.site, decision.choice
        times = None if self.table is None or site is None else self.table.of(site)
        if times is None or site is None:
            return None, None
        before = times.dense_ns / 1e6
        if choice.rank is None:
            after = times.dense_ns if choice.format is None else times.dense(choice.format)
        else:
            after = times.at(choice.rank, choice.format)
        share = 1.0 if choice.leads else site.n / (site.m + site.n)
        return before, None if after is None else share * after / 1e6


def figures_of(prepared: Prepared, table: CostTable | None) -> Figures:
    """What is known of the layers of a prepared model."""
    return Figures(prepared.measured, table, _stored(prepared.model))


def _stored(model: ir.Model) -> dict[str, int]:
    return {
        name: int(value.const_value.nbytes)
        for graph in all_graphs(model)
        for name, value in graph.initializers.items()
        if value.const_value is not None
    }


def shown_spectrum(
    found: Spectrum, shape: tuple[int, int], rank: int | None = None, even: float | None = None
) -> LayerSpectrum | None:
    """A spectrum at no more than 64 ranks; None where nothing of it is known.

    Args:
        found: what was measured.
        shape: (m, n) of the matrix.
        rank: a rank that has to be among those shown.
        even: the rank at which a pair is as large; None where the matrix itself stands there.
    """
    squares = found.squares
    if squares is None or not found.finite or not len(squares) or not squares[0] > 0.0:
        return None
    chosen = set(np.linspace(1, len(squares), _MOST - 1).round().astype(int).tolist())
    if rank is not None and 1 <= rank <= len(squares):
        chosen.add(rank)
    ranks = np.array(sorted(chosen))
    total = float(squares.sum()) + found.rest
    values = np.sqrt(np.maximum(squares[ranks - 1], 0.0) / squares[0])
    energy = np.minimum(np.cumsum(squares)[ranks - 1] / total, 1.0)
    return LayerSpectrum(
        of=found.of,
        full=min(shape),
        break_even=break_even(*shape) if even is None else even,
        ranks=tuple(ranks.tolist()),
        values=tuple(float(f"{value:.4g}") for value in values),
        energy=tuple(float(f"{value:.6g}") for value in energy),
    )
