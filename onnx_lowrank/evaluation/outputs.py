"""Run the original and the result on the same inputs and say how far they are apart.

All figures are in double precision.  Where both outputs hold the same NaN or Inf at the same place
they agree there; where only one does, the error is infinite.  Strings, truths and integers of 32 or
64 bits are the same or not: their error is the share that differs.  Padding counts nowhere.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from onnx_lowrank.data.samples import Samples
from onnx_lowrank.errors import InputError
from onnx_lowrank.evaluation.distances import (
    TEXTS,
    apart,
    largest_of,
    padded,
    squares,
    things,
    unequal,
)
from onnx_lowrank.evaluation.reading import PLAIN, Reading
from onnx_lowrank.numerics.arrays import Array, Feed
from onnx_lowrank.phrases import counted
from onnx_lowrank.runtime.session import run
from onnx_lowrank.schema.measures import OutputCheck, ProviderCheck

__all__ = [
    "Comparison",
    "MeanDamage",
    "compare_outputs",
    "damage_of",
    "mean_damage",
    "run_check",
    "same_top",
    "worst_error",
]

_AGREES = 1e-3
"""Relative error up to which the original is said to agree with stored outputs."""


@dataclass
class _Sums:
    """What is kept of one output, whatever the number of samples.

    ``samples`` counts those in which there was something to compare.
    """

    samples: int = 0
    max_abs_error: float = 0.0
    relative_l2: float = 0.0
    angles: int = 0
    cosine: float = 0.0
    rows: int = 0
    agreeing: int = 0
    classifier: bool = False

    def result(self, name: str) -> OutputCheck:
        classes = self.classifier and self.rows > 0
        return OutputCheck(
            name=name,
            max_abs_error=self.max_abs_error,
            relative_l2=self.relative_l2 / self.samples,
            cosine=self.cosine / self.angles if self.angles else None,
            top1_agreement=self.agreeing / self.rows if classes else None,
            top1_rows=self.rows if classes else None,
        )


@dataclass
class Comparison:
    """Adds up the differences of two models' outputs, sample by sample.

    Attributes:
        reading: what is known of the outputs.
        what: names the second model in messages.
        notes: what else the user should know, each once.
    """

    reading: Reading = PLAIN
    what: str = "the result"
    notes: dict[str, None] = field(default_factory=dict)
    _sums: dict[str, _Sums] = field(default_factory=dict)

    def add(
        self,
        reference: Mapping[str, Array],
        candidate: Mapping[str, Array],
        keep: Array | None = None,
    ) -> None:
        """Add one sample.

        Args:
            reference: output -> array, of the first model.
            candidate: the same of the second.
            keep: which rows count (see `Reading.kept`); None for all of them.

        Raises:
            InputError: an output is missing, or has another shape or kind of type.
        """
        for name, expected in reference.items():
            if name not in candidate:
                raise InputError(f"output {name!r}: {self.what} has no such output")
            found = candidate[name]
            self._look(name, expected, found)
            self._add(
                name,
                self.reading.counted(name, expected, keep),
                self.reading.counted(name, found, keep),
            )

    def results(self) -> tuple[OutputCheck, ...]:
        """One entry for each output that holds anything, in the order of the model."""
        return tuple(sums.result(name) for name, sums in self._sums.items() if sums.samples)

    @property
    def empty(self) -> tuple[str, ...]:
        """The outputs in which no sample had anything to compare."""
        return tuple(name for name, sums in self._sums.items() if not sums.samples)

    def _look(self, name: str, expected: Array, found: Array) -> None:
        """Raise InputError where an output has a shape or type that it must not have."""
        texts = [array.dtype.kind in TEXTS for array in (expected, found)]
        if texts[0] != texts[1] and expected.size and found.size:
            raise InputError(
                f"output {name!r}: {self.what} has type {found.dtype}, expected {expected.dtype}"
            )
        if expected.shape == found.shape:
            return
        if name not in self.reading.loose or expected.ndim != found.ndim:
            raise InputError(
                f"output {name!r}: {self.what} has shape {list(found.shape)}, "
                f"expected {list(expected.shape)}"
            )
        self.notes[
            f"output {name!r}: its size depends on what the model computes, and differs in "
            f"{self.what}: what only one of the two gives counts as wrong"
        ] = None

    def _add(self, name: str, expected: Array, found: Array) -> None:
        sums = self._sums.setdefault(name, _Sums(classifier=name in self.reading.classifiers))
        if not expected.size and not found.size:
            return
        exact = things(expected) or things(found)
        if exact:
            kind = "strings" if expected.dtype.kind in TEXTS else "integers"
            self.notes[f"output {name!r} holds {kind}: relative_l2 is the share that differs"] = (
                None
            )
            largest, error = unequal(expected, found)
            cosine = None
        else:
            expected, found = padded(expected, found)
            largest, error, cosine = self._figures(name, expected, found)
            if sums.classifier and expected.ndim and expected.shape[-1] > 1:
                same = same_top(expected, found)
                sums.rows += int(same.size)
                sums.agreeing += int(np.count_nonzero(same))
        sums.samples += 1
        sums.max_abs_error = max(sums.max_abs_error, largest)
        sums.relative_l2 += error
        if cosine is not None and expected.size > 1:  # one number has no direction
            sums.angles += 1
            sums.cosine += cosine

    def _figures(self, name: str, expected: Array, found: Array) -> tuple[float, float, float]:
        """Largest absolute difference, relative L2 error and cosine of one sample."""
        wide = np.complex128 if "c" in (expected.dtype.kind, found.dtype.kind) else np.float64
        a, b = expected.reshape(-1), found.reshape(-1)  # [elements]
        scale = max(largest_of(a, wide), largest_of(b, wide))
        if not math.isfinite(scale):
            a, b = a.astype(wide), b.astype(wide)
            finite = np.isfinite(a) & np.isfinite(b)
            odd_a, odd_b = a[~finite], b[~finite]
            agree = bool(np.all((odd_a == odd_b) | (np.isnan(odd_a) & np.isnan(odd_b))))
            if not agree:
                self.notes[f"output {name!r}: NaN or Inf in only one of the two models"] = None
                return math.inf, math.inf, 0.0
            self.notes[f"output {name!r}: both models give the same NaN or Inf in places"] = None
            a, b = a[finite], b[finite]
            scale = max(largest_of(a, wide), largest_of(b, wide))
        if scale == 0.0:
            return 0.0, 0.0, 1.0
        return apart(a, b, scale, wide)


def same_top(expected: Array, found: Array) -> npt.NDArray[np.bool_]:
    """Whether the largest of each row is the same one; any of several equally large will do.

    Args:
        expected: shape [..., classes].
        found: the same shape.

    Returns:
        shape [...].
    """
    top = found.argmax(axis=-1)[..., np.newaxis]  # [..., 1]
    first = expected.argmax(axis=-1)[..., np.newaxis]
    largest = np.take_along_axis(expected, first, axis=-1)
    same = (top == first) | (np.take_along_axis(expected, top, axis=-1) == largest)
    odd = np.isnan(expected).any(axis=-1) != np.isnan(found).any(axis=-1)  # argmax is the NaN's
    return np.asarray(same[..., 0] & ~odd)


def compare_outputs(
    reference: Mapping[str, Array],
    candidate: Mapping[str, Array],
    reading: Reading = PLAIN,
    keep: Array | None = None,
) -> tuple[OutputCheck, ...]:
    """Compare the outputs of one sample; see `Comparison`.

    Raises:
        InputError: an output is missing, or has another shape or kind of type.
    """
    comparison = Comparison(reading)
    comparison.add(reference, candidate, keep)
    return comparison.results()


def run_check(
    reference: ort.InferenceSession,
    candidate: ort.InferenceSession,
    samples: Samples,
    *,
    provider: str,
    reading: Reading,
    progress: Callable[[int], None] | None = None,
    damage: Callable[[Feed, Feed, Feed], float | None] | None = None,
) -> tuple[ProviderCheck, MeanDamage, tuple[str, ...]]:
    """Run both models on every sample; outputs of one sample at a time are in memory.

    Args:
        reference: the original.
        candidate: the result.
        samples: the inputs, and stored outputs where there are any.
        provider: the execution provider, for the report.
        reading: what is known of the outputs.
        progress: called after each sample with the number of samples done.
        damage: from what both give for a sample, and the sample, to its damage; default:
            `damage_of`.

    Returns:
        The figures, `mean_damage`, and notes.

    Raises:
        InputError: a model does not run on a sample, or an output changed its shape.
    """
    comparison = Comparison(reading)
    stored = Comparison(dataclasses.replace(reading, mask=None), what="the original")
    with_stored = 0
    damages: list[float | None] = []
    for index, (feed, expected) in enumerate(zip(samples.feeds, samples.expected, strict=True)):
        before = run(reference, feed, "the original")
        if expected is not None:
            try:
                stored.add(expected, before)
                with_stored += 1
            except InputError as error:  # says something about the data, not about the result
                comparison.notes[f"stored outputs do not fit the model: {error}"] = None
        after = run(candidate, feed, "the result")
        keep = reading.kept(feed)
        comparison.add(before, after, keep)
        if damage is None:
            damages.append(damage_of(before, after, reading, keep))
        else:
            damages.append(damage(before, after, feed))
        if progress is not None:
            progress(index + 1)
    check = ProviderCheck(provider, comparison.results())
    notes = list(comparison.notes)
    if comparison.empty:
        notes.append(f"not compared, empty on every sample: {', '.join(comparison.empty)}")
    if with_stored:
        notes.append(_stored_note(stored.results(), with_stored))
    return check, mean_damage(damages), tuple(notes)


def _stored_note(outputs: Sequence[OutputCheck], samples: int) -> str:
    name, error = _worst(outputs)
    agrees = error <= _AGREES
    return (
        f"the original {'agrees with' if agrees else 'deviates from'} the stored outputs of "
        f"{counted(samples, 'sample')} {'to' if agrees else 'by'} {error:.1e} "
        f"relative (worst output {name!r})"
        + ("" if agrees else ": they may belong to another version of the model")
    )


def worst_error(checks: Iterable[ProviderCheck]) -> tuple[str, float]:
    """Name and mean relative L2 error of the output that is furthest off, on any provider."""
    return _worst([output for check in checks for output in check.outputs])


def _worst(outputs: Sequence[OutputCheck]) -> tuple[str, float]:
    worst = max(outputs, key=lambda output: output.relative_l2, default=None)
    return ("", 0.0) if worst is None else (worst.name, worst.relative_l2)


def damage_of(
    reference: Mapping[str, Array],
    candidate: Mapping[str, Array],
    reading: Reading = PLAIN,
    keep: Array | None = None,
) -> float | None:
    """Mean over the outputs of ``‖b − a‖² / ‖a‖²``, of those that are floats and not all zero.

    The outputs of a cache count as one (see `Reading.shares`).
    Squares of independent errors add up, so that the damage of many layers is about the sum of
    theirs.  Infinite where only the candidate holds NaN or Inf; None where no output can be
    compared.

    Args:
        reference: output -> array.
        candidate: the same of another model.
        reading: what is known of the outputs.
        keep: which rows count (see `Reading.kept`); None for all of them.
    """
    found: dict[str, float] = {}
    for name, before in reference.items():
        if before.dtype.kind not in "fV" or before.shape != candidate[name].shape:
            continue  # V: bfloat16 and smaller
        a, b = (reading.counted(name, given[name], keep) for given in (reference, candidate))
        norm, error = squares(a.reshape(-1), b.reshape(-1))
        if norm > 0.0:
            found[name] = error / norm if np.isfinite(error) else np.inf
    shares = reading.shares(found)
    return math.fsum(shares[name] * error for name, error in found.items()) if found else None


@dataclass(frozen=True)
class MeanDamage:
    """A mean over samples of `damage_of`.

    Attributes:
        mean: of those that have one; None where none has, or one is NaN.
        error: its standard error; None where fewer than two have one, or one is infinite.
    """

    mean: float | None
    error: float | None = None


def mean_damage(damages: Iterable[float | None]) -> MeanDamage:
    """The mean over samples of `damage_of`, and how sure it is."""
    known = np.array([damage for damage in damages if damage is not None])
    if not known.size or np.isnan(known).any():
        return MeanDamage(None)
    sure = len(known) > 1 and bool(np.isfinite(known).all())
    error = float(known.std(ddof=1) / np.sqrt(len(known))) if sure else None
    return MeanDamage(float(known.mean()), error)
