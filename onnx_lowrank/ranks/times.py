"""Times of one linear map: what they depend on, and where they were taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort

from onnx_lowrank.maps.formats import CORRECTION, Format
from onnx_lowrank.phrases import counted
from onnx_lowrank.runtime.machine import processor

__all__ = ["CostKey", "FormatTimes", "Place", "Times"]


@dataclass(frozen=True, order=True)
class CostKey:
    """What a map's time depends on, as plain values.

    Attributes:
        form: name of the form.
        node: domain, operator and attributes.
        inputs: of each input its type and shape, and whether it is the weight or a constant.
        shape: (e, m, n) of the weight as it is factored.
    """

    form: str
    node: str
    inputs: tuple[str, ...]
    shape: tuple[int, int, int]


@dataclass(frozen=True)
class FormatTimes:
    """How long one map takes with its weights in a format.

    Attributes:
        bits: of a weight.
        block: weights that share a scale; 0: those of a column.
        dense_ns: of the map as it is.
        pair_ns: of its pairs, at the ranks of its `Times`; empty where they were not timed.
        activations: as those of a `Format`.
    """

    bits: int
    block: int
    dense_ns: float
    pair_ns: tuple[float, ...] = ()
    activations: str = "float"

    def fits(self, form: Format) -> bool:
        """Whether these are the times of a format; each place has its own sign of integers."""
        own = self.bits, self.block, self.activations
        return own == (form.bits, form.block, form.activations)


@dataclass(frozen=True)
class Times:
    """How long one map takes.

    Attributes:
        dense_ns: as it is; like all times with the overhead of one call, so that differences mean
            more than quotients where maps are small.
        ranks: ranks of the pairs that were measured, rising.
        pair_ns: their times.
        widths: half the 95 % interval of each pair's time over the dense one's, relative to it.
        rounds: how often each was run.
        multiple: which multiple a rank should be on, where that was asked for and could be told.
        formats: the same with weights in formats.
    """

    dense_ns: float
    ranks: tuple[int, ...]
    pair_ns: tuple[float, ...]
    widths: tuple[float, ...]
    rounds: int
    multiple: int | None = None
    formats: tuple[FormatTimes, ...] = ()

    def at(self, rank: int, form: Format | None = None) -> float | None:
        """Nanoseconds of a pair: between measured ranks, and beyond them, on a straight line.

        Args:
            rank: of the pair.
            form: of its factors; None for floats.

        Returns:
            None where the format was not timed.
        """
        known = None if form is None else self.of(form)
        times = self.pair_ns if form is None else () if known is None else known.pair_ns
        return self._between(times, rank) if times else None

    def of(self, form: Format) -> FormatTimes | None:
        """What was timed of a format; None if nothing."""
        return next((own for own in self.formats if own.fits(form)), None)

    def dense(self, form: Format) -> float | None:
        """Nanoseconds of a dense weight in a format, with the pair that corrects it."""
        known = self.of(form)
        if known is None or not form.correction:
            return None if known is None else known.dense_ns
        more = self.at(form.correction, CORRECTION)
        return None if more is None else known.dense_ns + more

    def _between(self, times: Sequence[float], rank: int) -> float:
        ranks = self.ranks
        if len(ranks) == 1:
            return times[0]
        if ranks[0] <= rank <= ranks[-1]:
            return float(np.interp(rank, ranks, times))
        a, b = (0, 1) if rank < ranks[0] else (-2, -1)
        slope = max(0.0, (times[b] - times[a]) / (ranks[b] - ranks[a]))
        if rank > ranks[-1]:
            return times[-1] + slope * (rank - ranks[-1])
        # Part of the time does not depend on the rank, so it falls no faster than in proportion.
        return max(times[0] + slope * (rank - ranks[0]), times[0] * rank / ranks[0])

    @property
    def noise(self) -> float:
        """The largest of the widths."""
        return max(self.widths, default=0.0)


@dataclass(frozen=True)
class Place:
    """Where times were taken.

    Attributes:
        provider: execution provider.
        threads: intra-op threads.
        processor: name of the CPU.
        runtime: version of ONNX Runtime.
    """

    provider: str
    threads: int
    processor: str
    runtime: str

    @classmethod
    def here(cls, provider: str, threads: int) -> Place:
        """This machine."""
        return cls(provider, threads, processor(), str(ort.__version__))

    def __str__(self) -> str:
        threads = counted(self.threads, "thread")
        return f"{self.provider}, {threads}, {self.processor}, ONNX Runtime {self.runtime}"
