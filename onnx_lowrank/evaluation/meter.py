"""Meter: adds up a metric of two models, one sample at a time."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod

import numpy as np

from onnx_lowrank.errors import InputError, named
from onnx_lowrank.numerics.arrays import Array, Feed
from onnx_lowrank.schema.measures import Judged

__all__ = ["Meter"]


class Meter(ABC):
    """Adds up a metric; one sample at a time is in memory.

    Attributes:
        samples: how many were added.
        notes: what the user should know, each once.
    """

    def __init__(self) -> None:
        self.samples = 0
        self.notes: dict[str, None] = {}
        self._sums: list[float] = [0.0]

    def add(
        self,
        outputs: Feed,
        reference: Feed,
        labels: Array | None = None,
        keep: Array | None = None,
    ) -> None:
        """Add one sample.

        Args:
            outputs: of the model, name -> array.
            reference: of the original.
            labels: of the sample, shape [rows, …], or None.
            keep: which rows count (see `Reading.kept`); None for all of them.  A function of the
                user's gets whole outputs.

        Raises:
            InputError: the outputs do not fit each other, the metric or the labels; or the user's
                function fails.  It names the sample, counted from 0.
        """
        self._add(outputs, reference, labels, keep)
        self.samples += 1
        self._sums.append(self._sum())

    def result(self) -> Judged:
        """The metric over all samples.

        Raises:
            InputError: there was no sample.
        """
        if not self.samples:
            raise InputError(f"{named('metric')}: expected at least one sample, got none")
        return dataclasses.replace(self._result(), standard_error=self._standard_error())

    def _sum(self) -> float:
        """The sum of the losses of all samples so far."""
        try:
            return self._result().loss * self.samples
        except InputError:  # nothing to compare in the samples so far
            return 0.0

    def _standard_error(self) -> float | None:
        if self.samples < 2 or not np.isfinite(self._sums).all():
            return None
        return float(np.std(np.diff(self._sums), ddof=1) / math.sqrt(self.samples))

    @abstractmethod
    def _add(
        self, outputs: Feed, reference: Feed, labels: Array | None, keep: Array | None
    ) -> None: ...

    @abstractmethod
    def _result(self) -> Judged: ...
