"""kl and perplexity: a model's shares of the classes against the original's, or at the right ones.

They read the rows ``[…, classes]`` of outputs that are logits or shares; those of a sample are in
memory, never those of all samples.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import numpy as np
import numpy.typing as npt

from onnx_lowrank.errors import InputError, named
from onnx_lowrank.evaluation.meter import Meter
from onnx_lowrank.evaluation.reading import Reading
from onnx_lowrank.evaluation.top1 import both, classes_of, rows_of_classes
from onnx_lowrank.numerics.arrays import Array, Feed
from onnx_lowrank.numerics.divergence import are_shares, divergences, surprises
from onnx_lowrank.schema.measures import Judged

__all__ = ["Divergence", "Perplexity", "divergence", "next_tokens"]

# Inputs of token ids by their usual name, and integer inputs that are none.
_TOKENS = ("decoder_input_ids", "input_ids")
_DECODER_MASK = "decoder_attention_mask"
_NO_TOKENS = frozenset(
    {"attention_mask", _DECODER_MASK, "cache_position", "position_ids", "token_type_ids"}
)


def next_tokens(feed: Feed, mask: str | None, where: str) -> Array:
    """The token behind every position, shape [B, T]; −1 where there is none, or it is padding.

    Args:
        feed: a sample with token ids, shape [B, T].
        mask: the input whose zeros mark padding.
        where: begins the error.

    Raises:
        InputError: no input, or more than one, could be token ids.
    """
    whole = [
        name
        for name, array in feed.items()
        if array.ndim == 2 and array.dtype.kind in "iu" and name not in _NO_TOKENS and name != mask
    ]
    chosen = [name for name in _TOKENS if name in whole][:1] or whole
    if len(chosen) != 1:
        found = ", ".join(f"{name} {list(array.shape)}" for name, array in feed.items())
        raise InputError(
            f"{where}: expected labels, or one input of token ids [batch, tokens], whose next "
            f"tokens are the labels, got {found}"
        )
    if chosen[0] == _TOKENS[0]:  # the mask of the encoder's tokens says nothing of these
        mask = _DECODER_MASK if _DECODER_MASK in feed else None
    tokens = feed[chosen[0]].astype(np.int64)
    labels = np.full_like(tokens, -1)
    labels[:, :-1] = tokens[:, 1:]
    keep = None if mask is None else feed[mask]
    if keep is not None and keep.ndim == 2 and len(keep) == len(tokens):
        real = keep[:, -tokens.shape[1] :] != 0  # the first ones are those of a cache
        if real.shape == tokens.shape:
            labels[:, :-1][~real[:, 1:]] = -1
    return labels


def divergence(name: str, before: Array, after: Array, reading: Reading, keep: Array | None) -> (
    npt.NDArray[np.float64]
):  # fmt: skip
    """`divergences` of the rows of an output that count, shape [rows].

    Args:
        name: the output.
        before: of the original, shape [..., classes].
        after: of the model, the same shape.
        reading: what is known of the outputs.
        keep: which rows count (see `Reading.kept`); None for all of them.
    """
    one, other = (_counted(name, array, reading, keep) for array in (before, after))
    return divergences(one, other, are_shares(one) and are_shares(other))


def _counted(name: str, array: Array, reading: Reading, keep: Array | None) -> Array:
    """The rows of classes that count, shape [rows, classes].

    A mask that covers the last axis, as that of a pointer into the tokens does, is one of classes.
    """
    covered = keep is not None and array.ndim <= keep.ndim
    own = array if covered else reading.counted(name, array, keep)
    return own.reshape(-1, own.shape[-1])


class _Likelihood(Meter):
    """Adds up figures of rows of classes, by sample."""

    def __init__(self, reading: Reading, kind: str) -> None:
        super().__init__()
        self._reading, self._kind = reading, kind
        self._rows: list[int] = []
        self._before: list[float] = []
        self._after: list[float] = []

    def _add(
        self, outputs: Feed, reference: Feed, labels: Array | None, keep: Array | None
    ) -> None:
        where = f"{named('metric', self._kind)}: sample {self.samples}"
        rows, before, after = 0, 0.0, 0.0
        chosen, note = rows_of_classes(reference, self._reading, self._kind, where)
        if note is not None:
            self.notes[note] = None
        for name in chosen:
            original, own = both(name, reference, outputs, where)
            first, second = self._figures(name, original, own, labels, keep, where)
            rows += len(first)
            before += float(first.sum())
            after += float(second.sum())
        self._rows.append(rows)
        self._before.append(before)
        self._after.append(after)

    @abstractmethod
    def _figures(
        self,
        name: str,
        original: Array,
        own: Array,
        labels: Array | None,
        keep: Array | None,
        where: str,
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Figures of the rows of an output that count, of the original and of the model."""


class Divergence(_Likelihood):
    """Mean Kullback-Leibler divergence of the model's shares from the original's, in nats.

    It is the mean over the samples of the mean over their rows, as damage is.
    """

    def __init__(self, reading: Reading) -> None:
        super().__init__(reading, "kl")

    def _figures(
        self,
        name: str,
        original: Array,
        own: Array,
        labels: Array | None,  # noqa: ARG002
        keep: Array | None,
        where: str,  # noqa: ARG002
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        found = divergence(name, original, own, self._reading, keep)
        return np.zeros_like(found), found

    def _result(self) -> Judged:
        found = [own / rows for own, rows in zip(self._after, self._rows, strict=True) if rows]
        if not found:
            raise InputError(f"{named('metric', 'kl')}: expected rows that count, got none")
        after = math.fsum(found) / len(found)
        return Judged(after, 0.0, after, self.samples)


class Perplexity(_Likelihood):
    """``exp`` of the mean surprise at the right class; the loss is by which share it rises."""

    def __init__(self, reading: Reading) -> None:
        super().__init__(reading, "perplexity")

    def _figures(
        self,
        name: str,
        original: Array,
        own: Array,
        labels: Array | None,
        keep: Array | None,
        where: str,
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        if labels is None:
            raise InputError(f"{where}: expected labels, got none")
        right = classes_of(labels, original.shape, f"{where}: output {name!r}", scores=True)
        judged = _counted(name, right[..., np.newaxis], self._reading, keep)[:, 0]
        found = []
        for array in (original, own):
            rows = _counted(name, array, self._reading, keep)
            rows = rows[judged >= 0]
            found.append(surprises(rows, judged[judged >= 0], are_shares(rows)))
        return found[0], found[1]

    def _standard_error(self) -> float | None:
        """From sample to sample: the rows of one hang together, those of two do not."""
        loss, rows = self._result().loss, np.asarray(self._rows, np.float64)
        if len(rows) < 2 or not math.isfinite(loss):
            return None
        # Of the quotient of two sums; the loss is exp(it) - 1.
        apart = np.subtract(self._after, self._before)
        rest = apart - rows * apart.sum() / rows.sum()
        error = math.sqrt(np.sum(rest**2) / (len(rows) * (len(rows) - 1))) / rows.mean()
        return float(error) * (1.0 + loss)

    def _result(self) -> Judged:
        rows = sum(self._rows)
        if not rows:
            raise InputError(
                f"{named('metric', 'perplexity')}: expected rows with labels, got none"
            )
        before, after = (_exp(math.fsum(own) / rows) for own in (self._before, self._after))
        if math.isinf(before):
            raise InputError(
                f"{named('metric', 'perplexity')}: expected the original to leave each right class "
                "a share, got none in a row: its perplexity is infinite"
            )
        loss = math.inf if math.isinf(after) else after / before - 1.0
        return Judged(loss, before, after, self.samples)


def _exp(mean: float) -> float:
    try:
        return math.exp(mean)
    except OverflowError:
        return math.inf
