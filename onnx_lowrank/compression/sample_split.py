"""Sample split: which samples judge the result, and which fit, search and heal the factors.

No sample both fits and judges, unless there is only one.  Those that judge the healing are kept
from its steps; what it starts from was fitted to them, which speaks for the start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_lowrank.compression.settings import Settings
from onnx_lowrank.data.declared import input_specs
from onnx_lowrank.data.runnable import runnable_shapes
from onnx_lowrank.data.samples import Samples, random_samples
from onnx_lowrank.data.sources import SampleSource, load_source, same_source
from onnx_lowrank.numerics.arrays import Feed

__all__ = ["SampleSplit"]

# A search judges with one calibration sample of so many, and with at most so many.
_SEARCHED, _MOST_SEARCHED = 5, 32
# Samples that are whole batches: with so many batches at most, or with so many of their rows.
_BATCHES_SEARCHED, _ROWS_SEARCHED = 8, 128
# Of few batches a third, until so many rows judge: of outputs that change by leaps, such as classes
# of characters, fewer rows tell next to nothing.
_FEWEST_ROWS, _THIRD = 48, 3
# For the search of a tolerance so many more samples are read, which neither fit nor judge.
_SPARE = 256
# Of samples that are whole batches so many judge at least, where the user does not say.
_FEWEST = 16
# Share of the calibration samples that judges the healing, and how many do at most: batches, or
# their rows.
_HEALED, _BATCHES_HEALED, _ROWS_HEALED = 0.1, 8, 128


class SampleSplit:
    """The samples of one run by what they are for; they are loaded when they are first needed."""

    def __init__(
        self,
        model: ir.Model,
        settings: Settings,
        runs: Callable[[Feed], bool | None],
        notes: dict[str, None],
    ) -> None:
        """A split of nothing yet.

        Args:
            model: what the samples must fit.
            settings: their sources, and how many are wanted.
            runs: whether the model runs on a feed; asked where a size has to be guessed.
            notes: gets assumptions and findings, for the report.
        """
        self._model, self._settings = model, settings
        self._runs, self.notes = runs, notes

    @property
    def judge(self) -> Samples:
        """The samples that judge the result: to check and to time with.

        Raises:
            InputError: the data do not fit the model.
        """
        return self._parts[0]

    @property
    def calibration(self) -> Samples | None:
        """The samples to fit to, none of which are in `judge`; None if there are none.

        Raises:
            InputError: the data do not fit the model.
        """
        return self._parts[1]

    @property
    def rows(self) -> int:
        """How many rows a sample to fit to holds: more than 1 where samples are whole batches."""
        return 1 if self.calibration is None else _rows(self.calibration)

    @cached_property
    def searched(self) -> tuple[int, ...]:
        """Which samples of `calibration` a search of ranks judges with; none of few."""
        count = 0 if self.calibration is None else len(self.calibration.feeds)
        if self.calibration is None or count < _SEARCHED:
            return ()
        rows = _rows(self.calibration)
        most = min(_MOST_SEARCHED, max(_BATCHES_SEARCHED, _ROWS_SEARCHED // rows))
        wanted = count // _SEARCHED
        if rows > 1:
            wanted = max(wanted, min(count // _THIRD, -(-_FEWEST_ROWS // rows)))
        spread = np.linspace(0, count - 1, min(most, wanted))
        return tuple(sorted({int(place) for place in spread}))

    @cached_property
    def healing(self) -> tuple[Samples, Samples] | None:
        """The samples that healing descends on, and those that judge it; None where there are none.

        What is healed was fitted to both.  Those that judge therefore speak for the start, and
        where no step is better by them nothing was withheld from the fit.
        """
        count = 0 if self.calibration is None else len(self.calibration.feeds)
        if self.calibration is None or not self._settings.heals or count < 2:
            return None
        most = max(_BATCHES_HEALED, _ROWS_HEALED // self.rows)
        wanted = min(most, max(1, round(_HEALED * count)))
        spread = np.linspace(0, count - 1, wanted + 2)[1:-1]
        judging = sorted({int(place) for place in spread})
        aside = set(judging)
        descending = [n for n in range(count) if n not in aside]
        return self.calibration.part(descending), self.calibration.part(judging)

    @property
    def search(self) -> Samples:
        """The samples that a search of ranks judges with.

        They are not in `judge` unless nothing else is there.
        """
        if self.calibration is None:
            return self.judge
        return self.calibration.part(self.searched) if self.searched else self.calibration

    @property
    def further(self) -> Sequence[Feed]:
        """Samples that factors are fitted to while ranks are searched; `search` is without them."""
        if self.calibration is None or not self.searched:
            return ()
        aside = set(self.searched)
        places = [n for n in range(len(self.calibration.feeds)) if n not in aside]
        return self.calibration.part(places).feeds

    @property
    def spare(self) -> Samples | None:
        """Samples for the search of a tolerance alone: what is left of the source, if anything."""
        return self._parts[2]

    @cached_property
    def _parts(self) -> tuple[Samples, Samples | None, Samples | None]:
        """What judges, what the factors are fitted to, and what is left for a search."""
        model, settings = self._model, self._settings
        specs = input_specs(model)
        judge, fit = settings.data, settings.calibration
        shapes = runnable_shapes(
            self._runs,
            model,
            specs,
            settings.input_shapes,
            settings.dims,
            lengths=judge is None and fit is None,
        )

        def loaded(source: SampleSource, limit: int) -> Samples:
            option = "data" if source is judge else "calibration"
            return load_source(
                source,
                model,
                specs,
                shapes,
                limit=limit,
                seed=settings.seed,
                option=option,
                labels=None if settings.labels is None else Path(settings.labels),
            )

        if judge is None and fit is None:
            self.notes.update(dict.fromkeys(shapes.notes))
            judged = random_samples(
                model, specs, shapes, count=settings.judging, seed=settings.seed
            )
            parts: tuple[Samples, Samples | None, Samples | None] = (judged, None, None)
        elif judge is not None and not settings.calibrate:
            parts = loaded(judge, settings.judging), None, None
        elif judge is not None and fit is not None and not same_source(judge, fit):
            fitting = loaded(fit, settings.calibration_samples + self._wanted_spare)
            judging = loaded(judge, settings.judging)
            count, own = len(fitting.feeds), settings.calibration_samples
            spare = None
            if count > own:  # a file may be in the order of its classes
                order = np.random.default_rng(settings.seed).permutation(count)
                spare = self._spare(fitting, order[own:])
                fitting = fitting.part(sorted(int(index) for index in order[:own]))
            parts = judging.part(range(self._judging(judging))), fitting, spare
        else:
            source = judge if judge is not None else fit
            assert source is not None
            wanted = settings.judging + settings.calibration_samples + self._wanted_spare
            parts = self._split(loaded(source, wanted))
        for part in parts:
            if part is not None:
                self.notes.update(dict.fromkeys(part.notes))
        return parts

    @property
    def _wanted_spare(self) -> int:
        return _SPARE if self._settings.limited else 0

    def _judging(self, samples: Samples) -> int:
        """How many of these judge: a default counts rows where samples are whole batches."""
        wanted, count = self._settings.judging, len(samples.feeds)
        if self._settings.samples is None:
            wanted = max(min(wanted, _FEWEST), wanted // _rows(samples))
        return min(wanted, count)

    def _spare(self, samples: Samples, order: npt.NDArray[np.intp]) -> Samples | None:
        """Those of the samples that a search of a tolerance may have beside; None without any."""
        most = max(_BATCHES_SEARCHED, len(order) // _rows(samples))
        chosen = sorted(int(index) for index in order[:most])
        return samples.part(chosen) if chosen and self._wanted_spare else None

    def _split(self, both: Samples) -> tuple[Samples, Samples | None, Samples | None]:
        """A held-out quarter, at most as many as are to judge, samples to fit to, and the rest."""
        settings, count = self._settings, len(both.feeds)
        if count == 1:
            note = f"{both.source}: one sample cannot both calibrate and judge: "
            if settings.calibration is None:
                fitted = "the sample judges, and the factors are fitted to the weights alone"
                self.notes[note + fitted] = None
                return both, None, None
            self.notes[note + "the sample does both, so the check is too optimistic"] = None
            return both, both, None
        order = np.random.default_rng(settings.seed).permutation(count)
        held = min(self._judging(both), max(1, count // 4))
        fitting = order[held:]
        judge = sorted(int(index) for index in order[:held])
        fit = sorted(int(index) for index in fitting[: settings.calibration_samples])
        spare = self._spare(both, fitting[settings.calibration_samples :])
        searching = ""
        if spare is not None:
            searching = f", {len(spare.feeds)} more take part in the search"
        self.notes[
            f"{both.source}: {len(fit)} samples calibrate, {len(judge)} others judge{searching}"
        ] = None
        return both.part(judge), both.part(fit), spare


def _rows(samples: Samples) -> int:
    """How many rows a sample holds, by the first one: its inputs' common size of axis 0."""
    leading = {array.shape[:1] for array in samples.feeds[0].values()}
    (rows,) = leading.pop() if len(leading) == 1 and () not in leading else (1,)
    return max(int(rows), 1)
