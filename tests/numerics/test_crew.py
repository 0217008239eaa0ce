"""Who works on layers: threads here, or the workers of any executor."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from onnx_lowrank.errors import InputError
from onnx_lowrank.numerics import crew as module
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.crew import HERE, Crew


def doubled(number: int) -> int:
    return 2 * number


def failing(number: int) -> int:
    if number == 3:
        raise FloatingPointError("3 is wrong")
    return number


def threads(_: int) -> set[int]:
    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


def order(array: Array) -> tuple[bool, bool]:
    return array.flags.c_contiguous, array.flags.f_contiguous


def plain(item: int) -> int:
    return item


class Backwards(Executor):
    """Does nothing before the last task came, and then the last one first."""

    def __init__(self, count: int) -> None:
        self._count, self._tasks = count, list[tuple[Future[Any], Callable[[], Any]]]()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._tasks.append((future, lambda: fn(*args, **kwargs)))
        if len(self._tasks) == self._count:
            for waiting, work in reversed(self._tasks):
                waiting.set_result(work())
        return future


class Broken(Executor):
    """Loses what it gets."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_exception(self._error)
        return future


class Silent(Executor):
    """Never answers."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return Future()


def test_answers_come_in_order_whichever_is_first() -> None:
    for crew in (HERE, Crew(Backwards(9))):
        found = crew.map(doubled, list(range(9)), plain, lambda _: 1)
        assert list(found) == [(n, 2 * n) for n in range(9)]


def test_what_the_work_raises_is_raised() -> None:
    with ThreadPoolExecutor(2) as pool:
        for crew in (HERE, Crew(pool)):
            with pytest.raises(FloatingPointError, match="3 is wrong"):
                list(crew.map(failing, list(range(9)), plain, lambda _: 1))


def test_what_an_executor_raises_is_its_own_failure() -> None:
    for error in (RuntimeError("gone"), TimeoutError("gone"), OSError("gone")):
        with pytest.raises(InputError, match=r"executor=…: expected an answer .*Error: gone"):
            list(Crew(Broken(error)).map(doubled, [1], plain, lambda _: 1))


def test_an_executor_that_takes_nothing() -> None:
    pool = ThreadPoolExecutor(1)
    pool.shutdown()
    with pytest.raises(InputError, match=r"executor=…: .*RuntimeError: cannot schedule"):
        list(Crew(pool).map(doubled, [1], plain, lambda _: 1))


def test_waiting_ends_where_no_answer_can_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.01)
    asked: list[None] = []

    def gone() -> str | None:
        asked.append(None)
        return "nobody is left" if len(asked) == 3 else None

    with pytest.raises(InputError, match="executor=…: nobody is left"):
        list(Crew(Silent(), gone=gone).map(doubled, [1], plain, lambda _: 1))


def test_threads_of_an_executor_have_one_blas_thread() -> None:
    with threadpool_limits(limits=2, user_api="blas"), ThreadPoolExecutor(2) as pool:
        before = threads(0)
        for _, found in Crew(pool).map(threads, [1, 2, 3], plain, lambda _: 1):
            assert found == {1}
        assert threads(0) == before


def test_processes_have_one_blas_thread_and_arrays_in_their_order() -> None:
    given = {
        0: np.ones((3, 4)),
        1: np.ones((3, 4), order="F"),
        2: np.ones((1, 4, 3)).mT,
    }
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        crew = Crew(pool)
        assert [n for _, n in crew.map(threads, [1, 2], plain, lambda _: 1)] == [{1}, {1}]
        for item, found in crew.map(order, list(given), lambda n: given[n], lambda _: 1):
            assert found == order(given[item])


class Notebook:
    """Remembers answers."""

    def __init__(self) -> None:
        self.known: dict[Any, Any] = {}
        self._lock = threading.Lock()

    def find(self, work: Callable[[Any], Any], given: Any) -> Any:
        return self.known.get((work, given))

    def store(self, work: Callable[[Any], Any], given: Any, answer: Any) -> None:
        with self._lock:
            self.known[work, given] = answer


def test_what_is_known_is_not_done_again() -> None:
    with ThreadPoolExecutor(2) as pool:
        for executor in (None, pool):
            keeper = Notebook()
            assert [
                n for _, n in Crew(executor, keeper).map(doubled, [1, 2], plain, lambda _: 1)
            ] == [2, 4]
            assert keeper.known == {(doubled, 1): 2, (doubled, 2): 4}
            keeper.known[doubled, 1] = 7
            found = Crew(executor, keeper).map(doubled, [1, 3], plain, lambda _: 1)
            assert list(found) == [(1, 7), (3, 6)]
            assert keeper.known[doubled, 3] == 6


@pytest.mark.parametrize("room", [5, 10, 25])
def test_no_more_is_begun_than_there_is_room_for(room: int) -> None:
    lock, begun, most = threading.Lock(), 0, 0

    def counted(item: int) -> int:
        nonlocal begun, most
        with lock:
            begun += 1
            most = max(most, begun)
        return item

    for _ in Crew(room=lambda: room).map(counted, list(range(12)), plain, lambda _: 10):
        with lock:
            begun -= 1  # an answer that was used takes no room
    assert most <= max(1, room // 10)
