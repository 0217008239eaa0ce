"""top1: the share of rows whose largest element is the label's, or the original's.

A share of few rows jumps: one row of 50 is 2 %.  What the model does to all of them can be told
more finely by the margins, the right class's score less the largest of the others.  The margins of
the model are those of the original, times a factor and shifted, and off by an error; with the
errors' size σ over all rows, a row with margin M is right with a probability of Φ((a·M + b)/σ).
`Judged.expected` is the loss of these probabilities.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import numpy.typing as npt
import scipy.special

from onnx_lowrank.errors import InputError, named
from onnx_lowrank.evaluation.meter import Meter
from onnx_lowrank.evaluation.outputs import same_top
from onnx_lowrank.evaluation.reading import Reading
from onnx_lowrank.numerics.arrays import Array, Feed
from onnx_lowrank.schema.measures import Judged

__all__ = ["Top1", "both", "classes_of", "rows_of_classes"]

# Rows from which on their margins' errors tell a size.
_ROWS = 4


class Top1(Meter):
    """The largest element of each row ``[…, classes]``: is it the label's, or the original's?"""

    def __init__(self, reading: Reading) -> None:
        super().__init__()
        self._reading = reading
        self._rows = self._before = self._after = self._changed = 0
        self._labelled: bool | None = None
        self._margins: list[tuple[Array, Array]] = []

    def _add(
        self, outputs: Feed, reference: Feed, labels: Array | None, keep: Array | None
    ) -> None:
        where = f"{named('metric', 'top1')}: sample {self.samples}"
        if self._labelled is None:
            self._labelled = labels is not None
        if self._labelled != (labels is not None):
            raise InputError(f"{where}: expected labels for all samples or for none")
        chosen, note = rows_of_classes(reference, self._reading, "top1", where, numbers=True)
        if note is not None:
            self.notes[note] = None
        for name in chosen:
            original, own = both(name, reference, outputs, where)
            where_name = f"{where}: output {name!r}"
            before, after, judged = (
                self._reading.counted(name, found, keep)
                for found in _agreement(original, own, labels, where_name)
            )
            self._rows += int(np.count_nonzero(judged))
            self._before += int(np.count_nonzero(before[judged]))
            self._after += int(np.count_nonzero(after[judged]))
            self._changed += int(np.count_nonzero(before[judged] != after[judged]))
            if original.dtype.kind in "fV":
                margins = _margins(original, own, labels, where_name)
                kept = [self._reading.counted(name, one, keep)[judged] for one in margins]
                self._margins.append((kept[0], kept[1]))

    def result(self) -> Judged:
        """The metric over all samples, with the loss that the margins let expect."""
        return dataclasses.replace(super().result(), expected=self._expected())

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

    def _expected(self) -> float | None:
        """The loss that the margins of all rows let expect; None without any."""
        if not self._margins:
            return None
        before, after = (np.concatenate(own) for own in zip(*self._margins, strict=True))
        known = np.isfinite(before) & np.isfinite(after)
        before, after = before[known], after[known]
        if len(before) < _ROWS or not np.ptp(before):
            return None
        factor, shift = np.polynomial.polynomial.polyfit(before, after, 1)[::-1]
        off = after - (factor * before + shift)
        sigma = max(math.sqrt(float(np.vdot(off, off)) / len(off)), 1e-300)
        right = scipy.special.ndtr(np.clip((factor * before + shift) / sigma, -40.0, 40.0))
        return float(np.mean((before >= 0.0) - right))


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
        expected = classes_of(labels, original.shape, where, scores=False)
        return original == expected, own == expected, expected >= 0
    if labels is None:
        same = same_top(original, own)
        return np.ones_like(same), same, np.ones_like(same)
    right = _one_hot(labels, original, where)
    # A row without a label counts nowhere.
    return same_top(original, right), same_top(own, right), np.asarray(right.any(axis=-1))


def _margins(original: Array, own: Array, labels: Array | None, where: str) -> tuple[Array, Array]:
    """The right class's score less the largest other one's, of both models, shape [...]."""
    if labels is None:
        right = np.asarray(original.argmax(axis=-1))
    else:
        right = np.maximum(classes_of(labels, original.shape, where, scores=True), 0)
    place = right[..., np.newaxis]
    found = []
    for scores in (original, own):
        wide = scores.astype(np.float64)
        score = np.take_along_axis(wide, place, axis=-1)[..., 0]
        np.put_along_axis(wide, place, -np.inf, axis=-1)
        found.append(score - wide.max(axis=-1))
    return found[0], found[1]


def _one_hot(labels: Array, scores: Array, where: str) -> Array:
    """1 at each row's label, shape [..., classes]; rows with a negative label have none."""
    classes = classes_of(labels, scores.shape, where, scores=True)
    return np.asarray(np.arange(scores.shape[-1]) == classes[..., np.newaxis], np.int8)


def rows_of_classes(
    reference: Feed, reading: Reading, metric: str, where: str, *, numbers: bool = False
) -> tuple[list[str], str | None]:
    """The outputs that hold a row of classes each, and a note where that is a guess.

    Args:
        reference: of the original.
        reading: names the classifiers; where there are none the only output of a suitable shape is
            taken.
        metric: for messages.
        where: begins the error.
        numbers: whether an output of whole numbers, the classes themselves, does as well.

    Raises:
        InputError: there is no such output, or more than one could be it.
    """
    reference = {n: a for n, a in reference.items() if n not in reading.inside}
    chosen = [name for name in reference if name in reading.classifiers]
    suitable = [
        name
        for name in (chosen or reference)
        if reference[name].ndim and reference[name].shape[-1] > 1
        if reference[name].dtype.kind in "fV"
    ]
    # A model that ends in ArgMax gives the classes themselves.
    whole = [name for name, a in reference.items() if numbers and a.dtype.kind in "iu"]
    if not chosen and (len(suitable) == 1 or (not suitable and len(whole) == 1)):
        (name,) = suitable or whole
        what = "a classifier's" if suitable else "numbers of classes"
        return [name], f"{named('metric', metric)}: output {name!r} is taken for {what}"
    if not chosen or not suitable:
        shapes = ", ".join(f"{name} {list(a.shape)}" for name, a in reference.items())
        other = ", or one of whole numbers, the classes" if numbers else ""
        raise InputError(
            f"{where}: expected one output [rows, classes] of a classifier{other}, got {shapes}"
        )
    return suitable, None


def both(name: str, reference: Feed, outputs: Feed, where: str) -> tuple[Array, Array]:
    """An output of the original and of the model.

    Raises:
        InputError: the model has none of that name and shape.
    """
    original, own = reference[name], outputs.get(name)
    if own is None or own.shape != original.shape:
        got = "none" if own is None else f"shape {list(own.shape)}"
        raise InputError(
            f"{where}: output {name!r}: expected shape {list(original.shape)}, got {got}"
        )
    return original, own


def classes_of(
    labels: Array, shape: tuple[int, ...], where: str, *, scores: bool
) -> npt.NDArray[np.int64]:
    """Labels as whole numbers, one for each row of scores, or one for each of the classes.

    Args:
        labels: any shape with as many elements.
        shape: of the output: of scores with the classes as last axis.
        where: begins the error.
        scores: whether the output holds scores.

    Raises:
        InputError: there are more or fewer, or one is no class.
    """
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
        whole = numbers.astype(np.int64)
    odd = whole != numbers
    if classes is not None:
        odd |= whole >= classes
    if odd.any():
        most = "" if classes is None else f" to {classes - 1}"
        raise InputError(
            f"{where}: expected labels from 0{most} (below 0: no label), "
            f"got {numbers[odd].reshape(-1)[0]}"
        )
    return np.asarray(whole)
