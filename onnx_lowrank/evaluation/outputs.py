"""Run the original and the result on the same inputs and say how far they are apart.

All figures are in double precision.  Where both outputs hold the same NaN or Inf at the same place
they agree there; where only one does, the error is infinite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from onnx_lowrank.data.samples import Samples
from onnx_lowrank.errors import InputError
from onnx_lowrank.evaluation.classifiers import classifier_outputs
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.phrases import counted
from onnx_lowrank.report import OutputCheck, ProviderCheck
from onnx_lowrank.runtime.session import run

__all__ = [
    "Comparison",
    "classifier_outputs",
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
    """What is kept of one output, whatever the number of samples."""

    samples: int = 0
    max_abs_error: float = 0.0
    relative_l2: float = 0.0
    cosine: float = 0.0
    rows: int = 0
    agreeing: int = 0
    classifier: bool = False

    def result(self, name: str) -> OutputCheck:
        count = max(self.samples, 1)
        return OutputCheck(
            name=name,
            max_abs_error=self.max_abs_error,
            relative_l2=self.relative_l2 / count,
            cosine=self.cosine / count if self.samples else 1.0,
            top1_agreement=self.agreeing / self.rows if self.classifier and self.rows else None,
        )


@dataclass
class Comparison:
    """Adds up the differences of two models' outputs, sample by sample.

    Attributes:
        classifiers: outputs for which top-1 agreement is counted.
        what: names the second model in messages.
        notes: what else the user should know, each once.
    """

    classifiers: Collection[str] = frozenset()
    what: str = "the result"
    notes: dict[str, None] = field(default_factory=dict)
    _sums: dict[str, _Sums] = field(default_factory=dict)

    def add(self, reference: Mapping[str, Array], candidate: Mapping[str, Array]) -> None:
        """Add one sample: output -> array, of both models.

        Raises:
            InputError: an output is missing, or has another shape or kind of type.
        """
        for name, expected in reference.items():
            if name not in candidate:
                raise InputError(f"output {name!r}: {self.what} has no such output")
            self._add(name, expected, candidate[name])

    def results(self) -> tuple[OutputCheck, ...]:
        """One entry for each output, in the order in which they were read."""
        return tuple(sums.result(name) for name, sums in self._sums.items())

    def _add(self, name: str, expected: Array, found: Array) -> None:
        if expected.shape != found.shape:
            raise InputError(
                f"output {name!r}: {self.what} has shape {list(found.shape)}, "
                f"expected {list(expected.shape)}"
            )
        texts = [array.dtype.kind in "OUS" for array in (expected, found)]
        if texts[0] != texts[1]:
            raise InputError(
                f"output {name!r}: {self.what} has type {found.dtype}, expected {expected.dtype}"
            )
        sums = self._sums.setdefault(name, _Sums(classifier=name in self.classifiers))
        if texts[0]:
            unequal = float(np.mean(expected != found)) if expected.size else 0.0
            figures = (float(unequal > 0), unequal, 1.0 - unequal)
            self.notes[f"output {name!r} holds strings: relative_l2 is the share that differs"] = (
                None
            )
        else:
            figures = self._figures(name, expected, found)
            if sums.classifier and expected.ndim and expected.shape[-1] > 1 and expected.size:
                same = same_top(expected, found)
                sums.rows += int(same.size)
                sums.agreeing += int(np.count_nonzero(same))
        sums.samples += 1
        sums.max_abs_error = max(sums.max_abs_error, figures[0])
        sums.relative_l2 += figures[1]
        sums.cosine += figures[2]

    def _figures(self, name: str, expected: Array, found: Array) -> tuple[float, float, float]:
        """Largest absolute difference, relative L2 error and cosine of one sample."""
        wide = np.complex128 if "c" in (expected.dtype.kind, found.dtype.kind) else np.float64
        a = expected.reshape(-1).astype(wide)  # [elements]
        b = found.reshape(-1).astype(wide)
        finite = np.isfinite(a) & np.isfinite(b)
        if not finite.all():
            odd_a, odd_b = a[~finite], b[~finite]
            agree = bool(np.all((odd_a == odd_b) | (np.isnan(odd_a) & np.isnan(odd_b))))
            if not agree:
                self.notes[f"output {name!r}: NaN or Inf in only one of the two models"] = None
                return math.inf, math.inf, 0.0
            self.notes[f"output {name!r}: both models give the same NaN or Inf in places"] = None
            a, b = a[finite], b[finite]
        # Scaled to at most 1, so that squares of huge or tiny values neither overflow nor vanish.
        scale = float(max(np.abs(a).max(initial=0.0), np.abs(b).max(initial=0.0)))
        if scale == 0.0:
            return 0.0, 0.0, 1.0
        a, b = a / scale, b / scale
        difference = np.abs(b - a)
        norm_a, norm_b = float(np.linalg.norm(a)), float(np.linalg.norm(b))
        distance = float(np.linalg.norm(difference))
        relative = distance / norm_a if norm_a else math.inf
        cosine = float(np.vdot(a, b).real) / (norm_a * norm_b) if norm_a and norm_b else 0.0
        return float(difference.max()) * scale, relative, min(1.0, max(-1.0, cosine))


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
    classifiers: Collection[str] = frozenset(),
) -> tuple[OutputCheck, ...]:
    """Compare the outputs of one sample.

    Raises:
        InputError: an output is missing, or has another shape or kind of type.
    """
    comparison = Comparison(classifiers)
    comparison.add(reference, candidate)
    return comparison.results()


def run_check(
    reference: ort.InferenceSession,
    candidate: ort.InferenceSession,
    samples: Samples,
    *,
    provider: str,
    classifiers: Collection[str],
    progress: Callable[[int], None] | None = None,
) -> tuple[ProviderCheck, float | None, tuple[str, ...]]:
    """Run both models on every sample; outputs of one sample at a time are in memory.

    Args:
        reference: the original.
        candidate: the result.
        samples: the inputs, and stored outputs where there are any.
        provider: the execution provider, for the report.
        classifiers: outputs for which top-1 agreement is counted.
        progress: called after each sample with the number of samples done.

    Returns:
        The figures, `mean_damage`, and notes.

    Raises:
        InputError: a model does not run on a sample, or an output changed its shape.
    """
    comparison = Comparison(classifiers)
    stored = Comparison(what="the original")
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
        comparison.add(before, after)
        damages.append(damage_of(before, after))
        if progress is not None:
            progress(index + 1)
    check = ProviderCheck(provider, comparison.results())
    notes = list(comparison.notes)
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


def damage_of(reference: Mapping[str, Array], candidate: Mapping[str, Array]) -> float | None:
    """Mean over the outputs of ``‖b − a‖² / ‖a‖²``, of those that are numbers and not all zero.

    Squares of independent errors add up, so that the damage of many layers is about the sum of
    theirs.  Infinite where only the candidate holds NaN or Inf; None where no output can be
    compared.
    """
    found = []
    for name, before in reference.items():
        if before.dtype.kind not in "fV":  # V: bfloat16 and smaller
            continue
        a, b = before.astype(np.float64), candidate[name].astype(np.float64)
        known = np.isfinite(a)
        a, b = a[known], b[known]
        norm = float(np.vdot(a, a))
        if norm > 0.0:
            error = float(np.vdot(b - a, b - a)) / norm
            found.append(error if np.isfinite(error) else np.inf)
    return float(np.mean(found)) if found else None


def mean_damage(damages: Iterable[float | None]) -> float | None:
    """The mean over samples of `damage_of`, of those that have one; None where none has."""
    known = [damage for damage in damages if damage is not None]
    return float(np.mean(known)) if known else None
