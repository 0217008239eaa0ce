"""Layers in parallel, one BLAS thread each, within a fixed working memory.

LAPACK's eigen-solvers gain little from threads on matrices of this size and lose much to them
when several run at once, so each worker gets one BLAS thread and the layers share the cores.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from threadpoolctl import threadpool_limits

__all__ = ["MEMORY", "cores", "in_turn", "map_layers", "working_set"]

Work = TypeVar("Work")
Answer = TypeVar("Answer")

# What the workers may use together.  A single layer may take more; then it runs alone.
MEMORY = 1 << 30


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def working_set(m: int, n: int) -> int:
    """Bytes that factoring one ``W[m, n]`` takes at its peak, about.

    The float64 Gram matrix, the eigen-solver's workspace and vectors of the same size, and both
    factors at full rank.
    """
    size = min(m, n)
    return 8 * (4 * size * size + size * (m + n))


def map_layers(
    work: Callable[[Work], Answer],
    items: Sequence[Work],
    memory: Callable[[Work], int],
    *,
    workers: int | None = None,
    room: int | None = None,
) -> Iterator[tuple[Work, Answer]]:
    """Run ``work`` on every item, in parallel, and yield (item, answer) in the items' order.

    Args:
        work: called in a worker thread under a limit of one BLAS thread.
        items: what to work on; the largest first makes the best use of the cores.
        memory: bytes that an item and its answer take (see `working_set`).
        workers: threads; default: one for each core.
        room: bytes that all may take together; None for `MEMORY`, and never more.

    Raises:
        Whatever ``work`` raises; items that have not begun are then dropped, as they are when
        the caller stops the iteration or the user interrupts it.
    """
    count = max(1, min(workers or cores(), len(items)))
    with threadpool_limits(limits=1, user_api="blas"), ThreadPoolExecutor(count) as pool:
        # Some more than there are workers are begun, so that none idles behind a large one.
        yield from in_turn(
            lambda item: pool.submit(work, item),
            Future.result,
            items,
            memory,
            MEMORY if room is None else min(room, MEMORY),
            2 * count + 1,
        )


def in_turn(
    submit: Callable[[Work], Future[Answer]],
    result: Callable[[Future[Answer]], Answer],
    items: Sequence[Work],
    memory: Callable[[Work], int],
    room: int,
    ahead: int,
) -> Iterator[tuple[Work, Answer]]:
    """Submit items, and yield (item, answer) in their order.

    Args:
        submit: begins the work on an item.
        result: waits for its answer.
        items: what to work on.
        memory: bytes that an item takes until its answer was used.
        room: bytes that all that is begun may take, unless it is a single item.
        ahead: how many are begun at once, at most.

    Raises:
        Whatever ``submit`` and ``result`` raise; what has not begun is then cancelled.
    """
    waiting = deque(items)
    pending: deque[tuple[Work, Future[Answer]]] = deque()
    used = 0
    try:
        while waiting or pending:
            # An item that is too large for the memory left waits until it is alone.
            while (
                waiting
                and len(pending) < ahead
                and (not pending or used + memory(waiting[0]) <= room)
            ):
                used += memory(waiting[0])
                pending.append((waiting[0], submit(waiting[0])))
                waiting.popleft()
            item, future = pending.popleft()
            answer = result(future)
            yield item, answer
            used -= memory(item)
    finally:
        for _, future in pending:
            future.cancel()
