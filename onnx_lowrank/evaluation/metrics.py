"""Metrics: how much worse a model's outputs are than the original's, which a tolerance limits.

``relative-l2``         mean relative L2 error over all outputs and samples
``cosine``              mean cosine of the outputs to the original's
``top1``                share of rows whose largest element is the label's; without labels, the
                        original's
``file.py:function``    mean of a score of the user's, called for every sample
``module:function``     the same, from a module

A function gets the outputs of one sample (one feed of the model, whatever its batch), those of the
original, both as dicts from names to arrays, and the sample's labels or None; it returns a number,
higher is better.  All metrics end in a `Judged` whose loss is what a tolerance limits: the error
itself, or how far the score drops below the original's own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from onnx_lowrank.data.usercode import UserCode, failure
from onnx_lowrank.errors import InputError, UsageError, named
from onnx_lowrank.evaluation.outputs import Comparison, same_top
from onnx_lowrank.evaluation.reading import PLAIN, Reading
from onnx_lowrank.numerics.arrays import Array, Feed

__all__ = ["Judged", "Meter", "Metric", "Score"]

Score = Callable[[Feed, Feed, Array | None], Any]
MetricKind = Literal["relative-l2", "cosine", "top1", "function"]

_KINDS: dict[str, MetricKind] = {"relative-l2": "relative-l2", "cosine": "cosine", "top1": "top1"}


@dataclass(frozen=True)
class Judged:
    """One model by one metric.

    Attributes:
        loss: how much worse it is than the original, from 0; may be negative where a score with
            labels or of the user's rises.
        before: the metric's own figure for the original.
        after: the same for the model.
        samples: how many it is the mean of.
        standard_error: of the loss as a mean over samples, for top1 over rows; None where one
            sample does not tell.
    """

    loss: float
    before: float
    after: float
    samples: int
    standard_error: float | None = None


@dataclass(frozen=True)
class Metric:
    """A metric of the loss.

    Attributes:
        text: as the user wrote it.
        kind: which one it is.
        code: where the function is, for one that a text names.
        function: the function itself, where the caller gave it.
    """

    text: str = "relative-l2"
    kind: MetricKind = "relative-l2"
    code: UserCode | None = None
    function: Score | None = None

    @classmethod
    def parse(cls, metric: str | Score) -> Metric:
        """The metric of a text or a function; what a text names is loaded when it is needed.

        Raises:
            UsageError: it is neither a built-in metric, nor a function or the place of one.
        """
        if callable(metric):
            name = getattr(metric, "__qualname__", type(metric).__qualname__)
            return cls(f"{metric.__module__}:{name}", "function", None, metric)
        if metric in _KINDS:
            return cls(metric, _KINDS[metric])
        code = UserCode.parse(metric) if isinstance(metric, str) else None
        if code is None:
            raise UsageError(
                f"{named('metric')}: expected {', '.join(_KINDS)}, file.py:function or "
                f"module:function, got {metric!r}"
            )
        return cls(metric, "function", code)

    def load(self) -> None:
        """Load the function of a text now, before any work.

        Raises:
            InputError: there is no such function, or its module fails.
        """
        if self.kind == "function":
            _ = self._score

    @property
    def higher_is_better(self) -> bool:
        """Whether its figure is a score; the loss is always to be small."""
        return self.kind != "relative-l2"

    @cached_property
    def _score(self) -> Score:
        """The user's function, loaded once: its module may do much."""
        if self.code is None:
            assert self.function is not None
            return self.function
        with self.code.importable():
            score = self.code.load()
        if not callable(score):
            raise InputError(
                f"{named('metric', self.text)}: expected a function, got {type(score).__name__}"
            )
        return cast(Score, score)

    def meter(self, reading: Reading = PLAIN) -> Meter:
        """What adds up the metric over samples.

        Args:
            reading: what is known of the outputs; top1 looks at the classifiers among them, and
                where there are none at the model's only output of a suitable shape.

        Raises:
            InputError: the function cannot be loaded.
        """
        if self.kind == "function":
            return _Function(self.text, self.code, self._score)
        if self.kind == "top1":
            return _Top1(reading)
        return _Distance(self.kind, reading)

    def evaluate(
        self,
        outputs: Sequence[Feed],
        reference: Sequence[Feed],
        labels: Sequence[Array] | None = None,
        reading: Reading = PLAIN,
    ) -> float:
        """The loss of a model whose outputs are all at hand; see `Meter.add`.

        Args:
            outputs: of the model, one for each sample.
            reference: of the original.
            labels: one for each sample, or None.
            reading: as for `meter`.

        Raises:
            InputError: as `Meter.add`; or there is no sample.
        """
        meter = self.meter(reading)
        for number, (own, original) in enumerate(zip(outputs, reference, strict=True)):
            meter.add(own, original, None if labels is None else labels[number])
        return meter.result().loss


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
        if self.samples < 2:
            return None
        return float(np.std(np.diff(self._sums), ddof=1) / math.sqrt(self.samples))

    @abstractmethod
    def _add(
        self, outputs: Feed, reference: Feed, labels: Array | None, keep: Array | None
    ) -> None: ...

    @abstractmethod
    def _result(self) -> Judged: ...


class _Distance(Meter):
    """Relative L2 error, or cosine: the means over the outputs of what the check says of each."""

    def __init__(self, kind: MetricKind, reading: Reading) -> None:
        super().__init__()
        self._kind = kind
        self._comparison = Comparison(reading)
        self.notes = self._comparison.notes

    def _add(
        self,
        outputs: Feed,
        reference: Feed,
        labels: Array | None,  # noqa: ARG002
        keep: Array | None,
    ) -> None:
        try:
            self._comparison.add(reference, outputs, keep)
        except InputError as error:
            raise InputError(f"sample {self.samples}: {error}") from error

    def _result(self) -> Judged:
        results = self._comparison.results()
        if not results:
            raise InputError(f"{named('metric', self._kind)}: no output holds anything")
        if self._kind == "cosine":
            cosines = [output.cosine for output in results if output.cosine is not None]
            if not cosines:
                raise InputError(
                    f"{named('metric', 'cosine')}: expected an output of floats with more than one "
                    "element in a sample, got none"
                )
            cosine = math.fsum(cosines) / len(cosines)
            return Judged(1.0 - cosine, 1.0, cosine, self.samples)
        error = sum(output.relative_l2 for output in results) / len(results)
        return Judged(error, 0.0, error, self.samples)


class _Top1(Meter):
    """The largest element of each row ``[…, classes]``: is it the label's, or the original's?"""

    def __init__(self, reading: Reading) -> None:
        super().__init__()
        self._reading = reading
        self._rows = self._before = self._after = self._changed = 0
        self._labelled: bool | None = None

    def _add(
        self, outputs: Feed, reference: Feed, labels: Array | None, keep: Array | None
    ) -> None:
        where = f"{named('metric', 'top1')}: sample {self.samples}"
        if self._labelled is None:
            self._labelled = labels is not None
        if self._labelled != (labels is not None):
            raise InputError(f"{where}: expected labels for all samples or for none")
        for name in self._chosen(reference, where):
            original, own = reference[name], outputs.get(name)
            if own is None or own.shape != original.shape:
                got = "none" if own is None else f"shape {list(own.shape)}"
                raise InputError(
                    f"{where}: output {name!r}: expected shape {list(original.shape)}, got {got}"
                )
            where_name = f"{where}: output {name!r}"
            before, after, judged = (
                self._reading.counted(name, found, keep)
                for found in _agreement(original, own, labels, where_name)
            )
            self._rows += int(np.count_nonzero(judged))
            self._before += int(np.count_nonzero(before[judged]))
            self._after += int(np.count_nonzero(after[judged]))
            self._changed += int(np.count_nonzero(before[judged] != after[judged]))

    def _chosen(self, reference: Feed, where: str) -> list[str]:
        reference = {n: a for n, a in reference.items() if n not in self._reading.inside}
        chosen = [name for name in reference if name in self._reading.classifiers]
        suitable = [
            name
            for name in (chosen or reference)
            if reference[name].ndim and reference[name].shape[-1] > 1
            if reference[name].dtype.kind in "fV"
        ]
        # A model that ends in ArgMax gives the classes themselves.
        numbers = [name for name, array in reference.items() if array.dtype.kind in "iu"]
        if not chosen and (len(suitable) == 1 or (not suitable and len(numbers) == 1)):
            (name,) = suitable or numbers
            what = "a classifier's" if suitable else "numbers of classes"
            self.notes[f"{named('metric', 'top1')}: output {name!r} is taken for {what}"] = None
            return [name]
        if not chosen or not suitable:
            shapes = ", ".join(f"{name} {list(a.shape)}" for name, a in reference.items())
            raise InputError(
                f"{where}: expected one output [rows, classes] of a classifier, or one of whole "
                f"numbers, the classes, got {shapes}"
            )
        return suitable

    def _standard_error(self) -> float | None:
        # Of rows that change by -1, 0 or 1.  One more counts as changed: that none of a few rows
        # changes is no proof that none would.
        share = (self._changed + 1) / (self._rows + 1)
        return math.sqrt(share / self._rows)

    def _result(self) -> Judged:
        if not self._rows:
            raise InputError(f"{named('metric', 'top1')}: expected rows with labels, got none")
        before, after = self._before / self._rows, self._after / self._rows
        return Judged(before - after, before, after, self.samples)


def _agreement(
    original: Array, own: Array, labels: Array | None, where: str
) -> tuple[Array, Array, Array]:
    """Of each row: is the original right, is the model, and does the row count.

    Right is the label, or without labels what the original says.
    """
    if original.dtype.kind in "iu":
        if labels is None:
            same = np.asarray(own == original)
            return np.ones_like(same), same, np.ones_like(same)
        expected = _classes(labels, original.shape, where, scores=False)
        return original == expected, own == expected, expected >= 0
    if labels is None:
        same = same_top(original, own)
        return np.ones_like(same), same, np.ones_like(same)
    right = _one_hot(labels, original, where)
    # A row without a label counts nowhere.
    return same_top(original, right), same_top(own, right), np.asarray(right.any(axis=-1))


def _one_hot(labels: Array, scores: Array, where: str) -> Array:
    """1 at each row's label, shape [..., classes]; rows with a negative label have none."""
    classes_of = _classes(labels, scores.shape, where, scores=True)
    return np.asarray(np.arange(scores.shape[-1]) == classes_of[..., np.newaxis], np.int8)


def _classes(
    labels: Array, shape: tuple[int, ...], where: str, *, scores: bool
) -> npt.NDArray[np.int64]:
    """Labels as whole numbers, one for each row of scores, or one for each of the classes."""
    rows, classes = (shape[:-1], shape[-1]) if scores else (shape, None)
    if labels.size != math.prod(rows):
        raise InputError(
            f"{where}: expected {math.prod(rows)} labels, one for each row of {list(shape)}, "
            f"got {labels.size}"
        )
    if labels.dtype.kind not in "iubf":
        shown = str(labels.reshape(-1)[0])
        raise InputError(f"{where}: expected numbers of classes as labels, got {shown!r}")
    numbers = labels.reshape(rows)
    with np.errstate(invalid="ignore"):
        classes_of = numbers.astype(np.int64)
    odd = classes_of != numbers
    if classes is not None:
        odd |= classes_of >= classes
    if odd.any():
        most = "" if classes is None else f" to {classes - 1}"
        raise InputError(
            f"{where}: expected labels from 0{most} (below 0: no label), "
            f"got {numbers[odd].reshape(-1)[0]}"
        )
    return np.asarray(classes_of)


class _Function(Meter):
    """The mean of a score of the user's, who gets the outputs whatever their shapes are."""

    def __init__(self, text: str, code: UserCode | None, score: Score) -> None:
        super().__init__()
        self._text, self._code, self._score = text, code, score
        self._before: list[float] = []
        self._after: list[float] = []

    def _add(
        self,
        outputs: Feed,
        reference: Feed,
        labels: Array | None,
        keep: Array | None,  # noqa: ARG002
    ) -> None:
        self._before.append(self._called(reference, reference, labels))
        self._after.append(self._called(outputs, reference, labels))

    def _called(self, outputs: Feed, reference: Feed, labels: Array | None) -> float:
        where = f"{named('metric', self._text)}: sample {self.samples}"
        try:
            with contextlib.nullcontext() if self._code is None else self._code.importable():
                # Copies: what the function does to them must not reach the next call.
                score = self._score(_copied(outputs), _copied(reference), labels)
        except (Exception, SystemExit) as error:  # the user's code
            raise InputError(failure(where, error)) from error
        try:
            plain = np.ndim(score) == 0 and not isinstance(score, str | bytes)
            number = float(score) if plain else math.nan
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            shown = " ".join(repr(score).split())
            shown = shown if len(shown) <= 80 else f"{shown[:79]}…"
            raise InputError(f"{where}: expected a finite number, got {shown}")
        return number

    def _result(self) -> Judged:
        before = math.fsum(self._before) / self.samples
        after = math.fsum(self._after) / self.samples
        return Judged(before - after, before, after, self.samples)


def _copied(outputs: Feed) -> dict[str, Array]:
    return {name: np.array(array) for name, array in outputs.items()}
