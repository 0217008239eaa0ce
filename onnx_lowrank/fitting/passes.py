"""Passes: which moments are added up in one run over the samples, by the memory there is.

Samples of one kind come after those of another.  Where moments wait in a file, those of one kind
go there before the next ones begin: a pass then holds one matrix for each stream, and what a part
of the samples adds to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnx_lowrank.data.samples import largest
from onnx_lowrank.errors import InputError, named
from onnx_lowrank.fitting.streams import MomentsKey, Stream
from onnx_lowrank.graph.walk import node_name
from onnx_lowrank.numerics.arrays import Feed
from onnx_lowrank.numerics.moments import BLOCK
from onnx_lowrank.runtime.memory import Memory, held
from onnx_lowrank.runtime.taps import OpenModel, look

__all__ = ["MEMORY", "GatheringPlan", "planned_passes", "too_large"]

MEMORY = 1 << 30
"""Moments above this wait in a file; accumulators of one pass over the samples take at most twice
as much, as another pass costs more than a file."""
# Rows that wait to be multiplied take at most this share of what may be held, and so many bytes.
_WAITING, _MOST_WAITING = 0.25, 1 << 28
# Activations of the samples of one run take at most so many bytes, as far as they are read.
_TOGETHER = 1 << 27


@dataclass(frozen=True, eq=False)
class GatheringPlan:
    """How moments are gathered.

    Attributes:
        passes: the streams of each run over the samples.
        block: how many rows may wait until they are multiplied.
        size: how many samples may be in one run of the model.
        waits: whether moments wait in a file.
    """

    passes: tuple[dict[MomentsKey, Stream], ...]
    block: int
    size: int
    waits: bool


def planned_passes(
    model: ir.Model,
    streams: Mapping[MomentsKey, Stream],
    open_model: OpenModel,
    feeds: Sequence[Feed],
    memory: Memory,
    together: int = 1,
    kinds: int = 2,
) -> GatheringPlan:
    """The streams in passes over the samples that fit in memory, and what each pass may hold.

    Args:
        model: the model; it is not changed.
        streams: whose moments are wanted.
        open_model: makes a runner of a model that gives its outputs by name.
        feeds: all samples.
        memory: what may be held.
        together: samples of one run that are wanted.
        kinds: moments of each stream that are wanted: of samples to fit to, of others.

    Raises:
        InputError: what one stream takes on one sample does not fit.
    """
    planned = memory.planned()
    given = dict.fromkeys(streams, 0)  # bytes of activations in the largest sample
    block, room = BLOCK, _TOGETHER
    waiting = too_large(kinds * sum(stream.memory for stream in streams.values()), memory)
    if planned is not None:
        number = largest(feeds)
        names = [name for stream in streams.values() for name in stream.sites]
        shapes = look(model, names, lambda copy: open_model(copy)(feeds[number])).shapes
        for key, stream in streams.items():
            given[key] = sum(4 * math.prod(shapes.get(name, ())) for name in stream.sites)
            what = f"the input of {node_name(stream.site.node)!r} in sample {number}"
            taken = given[key]
            if memory.given:  # without a wish of the user's the largest matrices are tried
                taken += _adding(stream)
                what += ", with its moments,"
            if taken > planned:
                raise InputError(f"{named('memory')}: {memory.short(what, taken, held() or 0)}")
        rows = sum(4 * s.site.m * s.site.slices for s in streams.values())
        most = min(int(_WAITING * planned), _MOST_WAITING)
        block = max(1, min(BLOCK, most // max(rows, 1)))
        planned -= int(_WAITING * planned)
        room = min(room, planned // 8)
    passes = tuple(_passes(list(streams.items()), given, planned))
    largest_pass = max((sum(given[key] for key in chosen) for chosen in passes), default=0)
    size = max(1, min(together, room // max(largest_pass, 1)))
    return GatheringPlan(passes, block, size, waiting or len(passes) > 1)


def too_large(size: int, memory: Memory) -> bool:
    """Whether moments of so many bytes wait in a file."""
    planned = memory.planned()
    return size > MEMORY or (planned is not None and size > planned)


def _adding(stream: Stream) -> int:
    """Bytes that a stream takes while it is added up: the sums, and a part's in float32."""
    return stream.memory + stream.memory // 2


def _passes(
    streams: Sequence[tuple[MomentsKey, Stream]],
    given: Mapping[MomentsKey, int],
    planned: int | None,
) -> Iterator[dict[MomentsKey, Stream]]:
    """The streams in groups whose accumulators fit in the working memory.

    Args:
        streams: all of them.
        given: bytes of the activations that a stream reads at once.
        planned: bytes that accumulators and activations may take; None if that is not known.
    """
    chosen: dict[MomentsKey, Stream] = {}
    used = whole = 0
    for key, stream in streams:
        own = _adding(stream)
        full = planned is not None and whole + own + given[key] > planned
        if chosen and (full or used + own > 2 * MEMORY):
            yield chosen
            chosen, used, whole = {}, 0, 0
        chosen[key] = stream
        used += own
        whole += own + given[key]
    if chosen:
        yield chosen
