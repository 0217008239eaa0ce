"""Time models against each other.

Runs alternate, and the order within a round changes every time, so that a machine that is slow for
a while, or an advantage of the second run, affects all models.  Ratios are taken round by round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from onnx_lowrank.errors import InputError
from onnx_lowrank.numerics.intervals import kept_values, median_interval
from onnx_lowrank.runtime.session import prepare, run
from onnx_lowrank.schema.measures import Latency, Milliseconds, Speedup

__all__ = ["FEWEST_PAIRS", "MOST_FEEDS", "Clock", "interleave", "latency_of", "time_pair"]

FEWEST_PAIRS = 5
"""Pairs that are timed whatever the time limit, unless fewer were asked for."""
MOST_FEEDS = 8
"""Feeds held in memory while timing."""
Clock = Callable[[], int]
"""Gives nanoseconds, from any start."""

# So many models are timed in every order.
_ALL_ORDERS = 3


def time_pair(
    before: ort.InferenceSession,
    after: ort.InferenceSession,
    feeds: Sequence[Mapping[str, npt.NDArray[Any]]],
    *,
    provider: str,
    threads: int,
    warmup: int = 3,
    pairs: int = 30,
    seconds: float = 10.0,
    progress: Callable[[int], None] | None = None,
) -> Latency:
    """Time one inference of each model, in turns.

    Args:
        before: the original.
        after: the result.
        feeds: samples; the first few are used in turn, both runs of a pair on the same one.
        provider: for the report.
        threads: for the report; the sessions have theirs already.
        warmup: runs of each model that are not timed, after a first one.
        pairs: how many pairs to time at most, at least one.
        seconds: time after which no further pair is begun, once there are `FEWEST_PAIRS`.
        progress: called after each pair with the number of pairs done.

    Raises:
        InputError: there is no sample, or a model does not run on one.
    """
    used = [feeds[index] for index in range(min(len(feeds), MOST_FEEDS))]
    if not used:
        raise InputError("timing: expected at least one sample, got none")
    calls = [(prepare(before, feed), prepare(after, feed)) for feed in used]
    # The first run of a shape allocates; `run` also names the model that fails.
    for feed in used[:1] if _same_shapes(used) else used:
        run(before, feed, "the original")
        run(after, feed, "the result")
    times = interleave(calls, rounds=pairs, warmup=warmup, seconds=seconds, progress=progress)
    return latency_of(times, provider, threads)


def interleave(
    calls: Sequence[Sequence[Callable[[], Any]]],
    *,
    rounds: int,
    warmup: int,
    seconds: float | None,
    progress: Callable[[int], None] | None = None,
    clock: Clock = time.perf_counter_ns,
    first: int = 0,
) -> list[tuple[int, ...]]:
    """Time every model once a round, in an order that changes from round to round.

    Args:
        calls: for each sample, one call for each model; round n takes the n-th sample in turn.
        rounds: how many rounds to time at most.
        warmup: rounds before that are not timed.
        seconds: time after which no further round is begun, once there are `FEWEST_PAIRS`;
            None for no limit.
        progress: called after each round with the number of rounds done.
        clock: nanoseconds.
        first: number of the first round, where others were timed before.

    Returns:
        For each round the nanoseconds of every model.
    """
    for number in range(warmup):
        for call in calls[number % len(calls)]:
            call()
    times: list[tuple[int, ...]] = []
    end = None if seconds is None else time.perf_counter() + seconds
    for number in range(first, first + rounds):
        if end is not None and len(times) >= FEWEST_PAIRS and time.perf_counter() >= end:
            break
        row = calls[number % len(calls)]
        took = [0] * len(row)
        for index in _order(number, len(row)):
            start = clock()
            row[index]()
            took[index] = clock() - start
        times.append(tuple(took))
        if progress is not None:
            progress(len(times))
    return times


def _order(number: int, count: int) -> list[int]:
    """The order of a round: of up to three models all orders in turn, of more any."""
    if count > _ALL_ORDERS:  # in turns each would always follow the same one
        return [int(index) for index in np.random.default_rng(number).permutation(count)]
    first = number % count if count else 0
    order = [*range(first, count), *range(first)]
    return order[::-1] if count > 2 and (number // count) % 2 else order


def _same_shapes(feeds: Sequence[Mapping[str, npt.NDArray[Any]]]) -> bool:
    return len({tuple((name, feed[name].shape) for name in feed) for feed in feeds}) == 1


def latency_of(times: Sequence[tuple[int, ...]], provider: str, threads: int) -> Latency:
    """Medians and percentiles of (before, after) in nanoseconds."""
    both = np.maximum(np.asarray(times, dtype=np.float64), 1.0)  # [pairs, 2]; a clock may stand
    low, middle, high = np.percentile(both[:, 0] / both[:, 1], [10, 50, 90])
    certain = median_interval(both[:, 0] / both[:, 1])
    return Latency(
        provider=provider,
        threads=threads,
        pairs=len(times),
        before_ms=_milliseconds(both[:, 0] / 1e6),
        after_ms=_milliseconds(both[:, 1] / 1e6),
        speedup=Speedup(float(middle), float(low), float(high), (certain[1], certain[2])),
    )


def _milliseconds(times: npt.NDArray[np.float64]) -> Milliseconds:
    median, low, high = median_interval(times)
    return Milliseconds(median, float(np.percentile(times, 90)), (low, high), kept_values(times))
