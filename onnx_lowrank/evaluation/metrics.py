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
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast

import numpy as np

from onnx_lowrank.data.usercode import UserCode, failure
from onnx_lowrank.errors import InputError, UsageError, named
from onnx_lowrank.evaluation.outputs import Comparison, same_top
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
    """

    loss: float
    before: float
    after: float
    samples: int


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

    def meter(self, classifiers: Collection[str] = frozenset()) -> Meter:
        """What adds up the metric over samples.

        Args:
            classifiers: outputs that top1 looks at (see
                `onnx_lowrank.evaluation.classifiers`); where there are none, the
                model's only output of a suitable shape.

        Raises:
            InputError: the function cannot be loaded.
        """
        if self.kind == "function":
            return _Function(self.text, self.code, self._score)
        if self.kind == "top1":
            return _Top1(frozenset(classifiers))
        return _Distance(self.kind)

    def evaluate(
        self,
        outputs: Sequence[Feed],
        reference: Sequence[Feed],
        labels: Sequence[Array] | None = None,
        classifiers: Collection[str] = frozenset(),
    ) -> float:
        """The loss of a model whose outputs are all at hand; see `Meter.add`.

        Args:
            outputs: of the model, one for each sample.
            reference: of the original.
            labels: one for each sample, or None.
            classifiers: as for `meter`.

        Raises:
            InputError: as `Meter.add`; or there is no sample.
        """
        meter = self.meter(classifiers)
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

    def add(self, outputs: Feed, reference: Feed, labels: Array | None = None) -> None:
        """Add one sample.

        Args:
            outputs: of the model, name -> array.
            reference: of the original.
            labels: of the sample, shape [rows, …], or None.

        Raises:
            InputError: the outputs do not fit each other, the metric or the labels; or the user's
                function fails.  It names the sample, counted from 0.
        """
        self._add(outputs, reference, labels)
        self.samples += 1

    def result(self) -> Judged:
        """The metric over all samples.

        Raises:
            InputError: there was no sample.
        """
        if not self.samples:
            raise InputError(f"{named('metric')}: expected at least one sample, got none")
        return self._result()

    @abstractmethod
    def _add(self, outputs: Feed, reference: Feed, labels: Array | None) -> None: ...

    @abstractmethod
    def _result(self) -> Judged: ...


class _Distance(Meter):
    """Relative L2 error, or cosine: the means over the outputs of what the check says of each."""

    def __init__(self, kind: MetricKind) -> None:
        super().__init__()
        self._kind = kind
        self._comparison = Comparison()
        self.notes = self._comparison.notes

    def _add(self, outputs: Feed, reference: Feed, labels: Array | None) -> None:  # noqa: ARG002
        try:
            self._comparison.add(reference, outputs)
        except InputError as error:
            raise InputError(f"sample {self.samples}: {error}") from error

    def _result(self) -> Judged:
        results = self._comparison.results()
        if not results:
            raise InputError(f"{named('metric', self._kind)}: the model has no output")
        if self._kind == "cosine":
            cosine = math.fsum(output.cosine for output in results) / len(results)
            return Judged(1.0 - cosine, 1.0, cosine, self.samples)
        error = sum(output.relative_l2 for output in results) / len(results)
        return Judged(error, 0.0, error, self.samples)


class _Top1(Meter):
    """The largest element of each row ``[…, classes]``: is it the label's, or the original's?"""

    def __init__(self, classifiers: frozenset[str]) -> None:
        super().__init__()
        self._classifiers = classifiers
        self._rows = self._before = self._after = 0
        self._labelled: bool | None = None

    def _add(self, outputs: Feed, reference: Feed, labels: Array | None) -> None:
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
            if labels is None:
                same = same_top(original, own)
                self._rows += same.size
                self._before += same.size
                self._after += int(np.count_nonzero(same))
                continue
            right = _one_hot(labels, original, f"{where}: output {name!r}")
            judged = right.any(axis=-1)  # [...]; a row without a label counts nowhere
            self._rows += int(np.count_nonzero(judged))
            self._before += int(np.count_nonzero(same_top(original, right)[judged]))
            self._after += int(np.count_nonzero(same_top(own, right)[judged]))

    def _chosen(self, reference: Feed, where: str) -> list[str]:
        chosen = [name for name in reference if name in self._classifiers]
        suitable = [
            name
            for name in (chosen or reference)
            if reference[name].ndim and reference[name].shape[-1] > 1
            if np.issubdtype(reference[name].dtype, np.number) or reference[name].dtype.kind == "V"
        ]
        if not chosen and len(suitable) == 1:
            note = f"{named('metric', 'top1')}: output {suitable[0]!r} is taken for a classifier's"
            self.notes[note] = None
            return suitable
        if not chosen or not suitable:
            shapes = ", ".join(f"{name} {list(a.shape)}" for name, a in reference.items())
            raise InputError(
                f"{where}: expected one output [rows, classes] of a classifier, got {shapes}"
            )
        return suitable

    def _result(self) -> Judged:
        if not self._rows:
            raise InputError(f"{named('metric', 'top1')}: expected rows with labels, got none")
        before, after = self._before / self._rows, self._after / self._rows
        return Judged(before - after, before, after, self.samples)


def _one_hot(labels: Array, scores: Array, where: str) -> Array:
    """1 at each row's label, shape [..., classes]; rows with a negative label have none."""
    rows, classes = scores.shape[:-1], scores.shape[-1]
    if labels.size != math.prod(rows):
        raise InputError(
            f"{where}: expected {math.prod(rows)} labels, one for each row of "
            f"{list(scores.shape)}, got {labels.size}"
        )
    if labels.dtype.kind not in "iubf":
        shown = str(labels.reshape(-1)[0])
        raise InputError(f"{where}: expected numbers of classes as labels, got {shown!r}")
    numbers = labels.reshape(rows)
    with np.errstate(invalid="ignore"):
        classes_of = numbers.astype(np.int64)
    odd = (classes_of != numbers) | (classes_of >= classes)
    if odd.any():
        raise InputError(
            f"{where}: expected labels from 0 to {classes - 1} (below 0: no label), "
            f"got {numbers[odd].reshape(-1)[0]}"
        )
    return np.asarray(np.arange(classes) == classes_of[..., np.newaxis], np.int8)


class _Function(Meter):
    """The mean of a score of the user's."""

    def __init__(self, text: str, code: UserCode | None, score: Score) -> None:
        super().__init__()
        self._text, self._code, self._score = text, code, score
        self._before: list[float] = []
        self._after: list[float] = []

    def _add(self, outputs: Feed, reference: Feed, labels: Array | None) -> None:
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
