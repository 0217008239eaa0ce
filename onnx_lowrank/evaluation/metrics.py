"""Metrics: how much worse a model's outputs are than the original's, which a tolerance limits.

``relative-l2``         mean relative L2 error over all outputs and samples
``cosine``              mean cosine of the outputs to the original's
``top1``                share of rows whose largest element is the label's; without labels, the
                        original's
``kl``                  mean Kullback-Leibler divergence of the original's classes from the
                        model's, in nats a row, where the outputs are logits or shares
``perplexity``          that of the right classes, exp of the mean of -log p; without labels the
                        right class of a position is the token that follows it
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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, cast

import numpy as np

from onnx_lowrank.data.usercode import UserCode, failure
from onnx_lowrank.errors import InputError, UsageError, named
from onnx_lowrank.evaluation.likelihood import Divergence, Perplexity, next_tokens
from onnx_lowrank.evaluation.meter import Meter
from onnx_lowrank.evaluation.outputs import Comparison
from onnx_lowrank.evaluation.reading import PLAIN, Reading
from onnx_lowrank.evaluation.top1 import Top1
from onnx_lowrank.numerics.arrays import Array, Feed
from onnx_lowrank.schema.measures import Judged

__all__ = ["Metric", "Ran", "Score"]

Score = Callable[[Feed, Feed, Array | None], Any]
MetricKind = Literal["relative-l2", "cosine", "top1", "kl", "perplexity", "function"]

_KINDS: dict[str, MetricKind] = {
    "relative-l2": "relative-l2",
    "cosine": "cosine",
    "top1": "top1",
    "kl": "kl",
    "perplexity": "perplexity",
}


class Ran(NamedTuple):
    """One sample, its labels if it has any, and what the original and the model gave for it."""

    feed: Feed
    labels: Array | None
    before: Feed
    after: Feed


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
        return self.kind not in ("relative-l2", "kl", "perplexity")

    @property
    def of_classes(self) -> bool:
        """Whether it compares shares of classes: damage and healing do so then as well."""
        return self.kind in ("kl", "perplexity")

    def labels(self, feed: Feed, given: Array | None, mask: str | None) -> Array | None:
        """The labels of a sample: those that were given, or for perplexity its next tokens.

        Args:
            feed: the sample.
            given: its labels, or None.
            mask: the input whose zeros mark padding, or None.

        Raises:
            InputError: there are none, and no input could be token ids.
        """
        if self.kind != "perplexity" or given is not None:
            return given
        return next_tokens(feed, mask, named("metric", self.kind))

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
            return Top1(reading)
        if self.kind == "kl":
            return Divergence(reading)
        if self.kind == "perplexity":
            return Perplexity(reading)
        return _Distance(self.kind, reading)

    def judge(self, runs: Iterable[Ran], reading: Reading) -> tuple[Judged, tuple[str, ...]]:
        """A model by this metric; one sample at a time is in memory.

        Args:
            runs: of each sample what both models gave.
            reading: what is known of the outputs.

        Returns:
            The figures, and notes for the user.

        Raises:
            InputError: as `Meter.add`, or there are no labels where they are needed.
        """
        meter = self.meter(reading)
        for run in runs:
            labels = self.labels(run.feed, run.labels, reading.mask)
            meter.add(run.after, run.before, labels, reading.kept(run.feed))
        return dataclasses.replace(meter.result(), metric=self.text), tuple(meter.notes)

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


class _Distance(Meter):
    """Relative L2 error, or cosine: the means over the outputs of what the check says of each.

    The outputs of a cache count as one.
    """

    def __init__(self, kind: MetricKind, reading: Reading) -> None:
        super().__init__()
        self._kind, self._reading = kind, reading
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
            cosines = {own.name: own.cosine for own in results if own.cosine is not None}
            if not cosines:
                raise InputError(
                    f"{named('metric', 'cosine')}: expected an output of floats with more than one "
                    "element in a sample, got none"
                )
            cosine = self._mean(cosines)
            return Judged(1.0 - cosine, 1.0, cosine, self.samples)
        error = self._mean({output.name: output.relative_l2 for output in results})
        return Judged(error, 0.0, error, self.samples)

    def _mean(self, figures: Mapping[str, float]) -> float:
        """Over outputs, of which those of a cache count as one."""
        shares = self._reading.shares(figures)
        return math.fsum(shares[name] * figure for name, figure in figures.items())


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
