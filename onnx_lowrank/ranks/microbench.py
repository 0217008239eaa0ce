"""How long one linear map alone takes, in several variants in turns.

All models of one comparison run once in each round, in an order that changes every time, and ratios
are taken round by round, so that a machine that is slow for a while affects all of them.
Two things differ from the whole model: weights stay in the cache between the runs, and each time
holds the call itself (some microseconds, equal for all, so that differences are free of it).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

from onnx_lowrank.numerics.arrays import Feed
from onnx_lowrank.numerics.intervals import median_interval
from onnx_lowrank.numerics.ranks import break_even
from onnx_lowrank.ranks.specimen import Specimen
from onnx_lowrank.runtime.session import prepare, run
from onnx_lowrank.runtime.timing import Clock, interleave

__all__ = [
    "Alignment",
    "Limits",
    "Rounds",
    "Timer",
    "Timing",
    "alignment",
    "clock_for",
    "compare",
    "session_timer",
]

Rounds = Callable[[int], npt.NDArray[np.float64]]
"""Runs so many further rounds and gives nanoseconds, shape [rounds, models]."""
Timer = Callable[[Sequence[bytes], Feed], Rounds]
"""Loads serialized models, runs each once on the feed, and gives what times them in turns."""

_WARMUP = 2
_STEP = 10


def clock_for(provider: str, threads: int) -> Clock:
    """The clock to time with: nanoseconds of this thread where one thread does all the work.

    They leave out what other programs take from it meanwhile, which on a busy machine is most of
    the noise.  Several threads, or another processor, are only seen by the clock on the wall.
    """
    alone = provider == "CPUExecutionProvider" and threads == 1
    return time.thread_time_ns if alone else time.perf_counter_ns


def session_timer(
    open_session: Callable[[bytes, Feed], ort.InferenceSession], clock: Clock = time.perf_counter_ns
) -> Timer:
    """A timer on this machine.

    Args:
        open_session: opens a serialized model on the provider and threads wanted, which is going
            to run on that feed (see `onnx_lowrank.runtime.opener.Opener.alone`).
        clock: nanoseconds, see `clock_for`.
    """

    def timer(models: Sequence[bytes], feed: Feed) -> Rounds:
        sessions = [open_session(model, feed) for model in models]
        for session in sessions:
            run(session, feed, "the map alone")  # the first run allocates, and names what fails
        calls = [prepare(session, feed) for session in sessions]
        done = 0

        def rounds(count: int) -> npt.NDArray[np.float64]:
            nonlocal done
            times = interleave(
                [calls],
                rounds=count,
                warmup=0 if done else _WARMUP,
                seconds=None,
                clock=clock,
                first=done,
            )
            done += count
            return np.array(times, np.float64)

        return rounds

    return timer


@dataclass(frozen=True)
class Limits:
    """How long a comparison goes on.

    Attributes:
        fewest: rounds that are run whatever they take.
        enough: rounds after which it ends if the ratios are certain enough.
        most: rounds after which it ends in any case.
        seconds: time after which no further rounds begin.
        width: what is certain enough: half the width of the 95 % interval of the median ratio,
            relative to it.
    """

    fewest: int = 5
    enough: int = 15
    most: int = 155
    seconds: float = 2.0
    width: float = 0.02


@dataclass(frozen=True)
class Timing:
    """Several models timed against the first of them.

    Attributes:
        base_ns: lower quartile of the first model's times, nanoseconds: whatever else the machine
            does only adds to them.
        ratios: median over the rounds of each other model's time over the first one's.
        widths: half the 95 % interval of each ratio, relative to it.
        rounds: how many were run.
    """

    base_ns: float
    ratios: tuple[float, ...]
    widths: tuple[float, ...]
    rounds: int

    @property
    def noise(self) -> float:
        """The largest of the widths."""
        return max(self.widths, default=0.0)


def compare(rounds: Rounds, limits: Limits) -> Timing:
    """Run rounds until the ratios are certain, or a limit is reached."""
    end = time.perf_counter() + limits.seconds
    times = rounds(limits.fewest)
    while True:
        timing = _timing(times)
        if len(times) >= limits.most or time.perf_counter() >= end:
            return timing
        if len(times) >= limits.enough and timing.noise <= limits.width:
            return timing
        times = np.concatenate([times, rounds(min(_STEP, limits.most - len(times)))])


def _timing(times: npt.NDArray[np.float64]) -> Timing:
    """Medians of the ratios, and how certain they are."""
    times = np.maximum(times, 1.0)  # a clock may stand
    ratios = [median_interval(own) for own in (times[:, 1:] / times[:, :1]).T]
    return Timing(
        base_ns=float(np.percentile(times[:, 0], 25)),
        ratios=tuple(middle for middle, _, _ in ratios),
        widths=tuple((high - low) / 2 / middle for middle, low, high in ratios),
        rounds=len(times),
    )


# Ranks above the lower end of a window, by the largest power of two (of those tried) in them.
_OFFSETS = {1: (3, 21), 4: (4, 20), 8: (8, 24), 16: (16,)}
_WINDOWS = (32, 16, 8)
# More time than its share, relative, that a rank may take; and noise that would hide it.
_NOTICED = 0.03
_NOISIEST = 0.06


@dataclass(frozen=True)
class Alignment:
    """On which ranks a map's pair is fastest.

    Attributes:
        multiple: the smallest of 1, 4, 8, 16 and 32 whose multiples cost no more than their share;
            up to 8 or 16 for small maps.
        excess: multiple -> how much more time ranks take that are on no larger one, relative to
            what their place between the two ends of the window says; the worst of those tried.
        noise: largest relative half-width of the 95 % intervals behind `excess`.
    """

    multiple: int
    excess: Mapping[int, float]
    noise: float


def alignment(specimen: Specimen, timer: Timer, limits: Limits) -> Alignment | None:
    """Measure which multiple a rank should be on.

    A kernel that works on blocks takes as long for a rank just above a multiple as for the next
    one.  Near half of break-even the ranks in a window between two multiples of 32 (16 or 8 for
    small maps) are timed; a multiple is good if none of the ranks on it, but on no larger one,
    takes noticeably more than its share.

    Returns:
        What was found; None where the map is too small, or the machine too busy, to tell.

    Raises:
        InputError: the map does not run alone.
    """
    m, n = specimen.site.m, specimen.site.n
    starts = {w: max(w, int(break_even(m, n) / 2) // w * w) for w in _WINDOWS}
    window = next((w for w in _WINDOWS if starts[w] + w <= min(m, n)), None)
    if window is None:
        return None
    start = starts[window]
    tried = {
        size: [offset for offset in chosen if offset < window]
        for size, chosen in _OFFSETS.items()
        if size < window
    }
    offsets = [offset for chosen in tried.values() for offset in chosen]
    ranks = [start, start + window, *(start + offset for offset in offsets)]
    models = [serialized(specimen.pair(rank)) for rank in ranks]
    timing = compare(timer(models, specimen.feed()), limits)
    upper, *between = timing.ratios
    over = {
        offset: ratio / (1.0 + (upper - 1.0) * offset / window) - 1.0
        for offset, ratio in zip(offsets, between, strict=True)
    }
    excess = {size: max(over[offset] for offset in chosen) for size, chosen in tried.items()}
    if timing.noise > _NOISIEST:
        return None
    tolerance = max(_NOTICED, timing.noise)
    multiple = window
    for size in sorted(excess, reverse=True):
        if excess[size] > tolerance:
            break
        multiple = size
    return Alignment(multiple, excess, timing.noise)


def serialized(model: ir.Model) -> bytes:
    """The model as a protobuf."""
    return bytes(ir.to_proto(model).SerializeToString())
