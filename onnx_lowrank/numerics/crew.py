"""Crew: who works on layers, the threads of this process or the workers of an executor.

Work that is a function of arrays alone may be done elsewhere.  Answers are taken in the order of
the items, whichever comes first, and each is computed by one thread with one BLAS thread: it is the
same number wherever that is, as long as processor and libraries are of the same kind.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from threadpoolctl import threadpool_limits

from onnx_lowrank.errors import InputError, named
from onnx_lowrank.numerics.engine import HOST
from onnx_lowrank.numerics.parallel import MEMORY, in_turn, map_layers

__all__ = ["HERE", "PATIENCE", "Crew", "Keeper"]

Work = TypeVar("Work")
Given = TypeVar("Given")
Answer = TypeVar("Answer")

# Arrays that are on their way to other processes and back: far less than the work on them takes.
_SENT = 2 * MEMORY
# Tasks that are handed to an executor before the first answer is waited for.
_AHEAD = 64
# Of this process, and of those that were forked from it.
_HOME = secrets.token_hex(8)
PATIENCE = 15.0
"""How often it is asked whether there are still workers, in seconds."""


class Keeper(Protocol):
    """Remembers answers of work that is a function of what it is given."""

    def find(self, work: Callable[[Any], Any], given: Any) -> Any:
        """The answer of an earlier time; None where it is not known."""

    def store(self, work: Callable[[Any], Any], given: Any, answer: Any) -> None:
        """Keep an answer."""


@dataclass(frozen=True, eq=False)
class Crew:
    """Who works on layers.

    Attributes:
        executor: hands the work on; None for threads of this process.
        keeper: remembers answers; None forgets them.
        gone: says why no answer can come any more, such as when all workers have left; None while
            one may.  It is asked now and then.
        room: bytes that work in this process may take now; None for the usual.
        device: where spectra and factors are computed (`onnx_lowrank.numerics.engine`).
    """

    executor: Executor | None = None
    keeper: Keeper | None = None
    gone: Callable[[], str | None] = lambda: None
    room: Callable[[], int | None] = lambda: None
    device: str = HOST

    def map(
        self,
        work: Callable[[Given], Answer],
        items: Sequence[Work],
        given: Callable[[Work], Given],
        memory: Callable[[Work], int],
    ) -> Iterator[tuple[Work, Answer]]:
        """Run ``work(given(item))`` for every item; yield (item, answer) in the items' order.

        Args:
            work: a function at the top of a module, of arrays alone: it may run in a process that
                knows nothing else.  It has one BLAS thread.
            items: what to work on; the largest first makes the best use of the workers.
            given: reads what the work needs of an item.
            memory: bytes that an item and its answer take while this process works on it.

        Raises:
            InputError: the executor lost a task, or cannot carry it.
            Whatever ``work`` raises.
        """
        if self.executor is None:

            def here(item: Work) -> Answer:
                return self._answer(work, given(item))

            yield from map_layers(here, items, memory, room=self.room())
            return
        executor = self.executor
        # An executor of threads of this process works under this limit too.
        with threadpool_limits(limits=1, user_api="blas"):
            yield from in_turn(
                lambda item: self._sent(executor, work, given(item)),
                self._returned,
                items,
                memory,
                _SENT,
                _AHEAD,
            )

    def _answer(self, work: Callable[[Given], Answer], given: Given) -> Answer:
        """The answer, known from an earlier time or computed here."""
        keeper = self.keeper
        if keeper is None:
            return work(given)
        answer: Answer | None = keeper.find(work, given)
        if answer is None:
            answer = work(given)
            keeper.store(work, given, answer)
        return answer

    def _sent(
        self, executor: Executor, work: Callable[[Given], Answer], given: Given
    ) -> Future[Any]:
        """The answer to come; what is known needs no worker."""
        keeper = self.keeper
        answer = None if keeper is None else keeper.find(work, given)
        if answer is not None:
            known: Future[Any] = Future()
            known.set_result(_Done(answer))
            return known
        try:
            sent: Future[Any] = executor.submit(_elsewhere, (_HOME, os.getpid()), work, given)
        except Exception as error:  # an executor may raise anything
            raise _lost(error) from error
        if keeper is not None:
            return _Keeping(sent, lambda found: keeper.store(work, given, found))
        return sent

    def _returned(self, future: Future[Any]) -> Any:
        """The answer, once it is there."""
        while True:
            try:
                found = future.result(PATIENCE)
                break
            except TimeoutError as error:
                if future.done():  # it is the executor's own
                    raise _lost(error) from error
                why = self.gone()
                if why is not None:
                    raise InputError(f"{named('executor')}: {why}") from error
            except Exception as error:
                raise _lost(error) from error
        if isinstance(found, _Failed):
            raise found.error
        return found.answer


HERE = Crew()
"""The threads of this process."""


@dataclass(frozen=True, eq=False)
class _Done:
    """An answer."""

    answer: Any


@dataclass(frozen=True, eq=False)
class _Failed:
    """What the work raised; whatever else comes out of an executor is its own failure."""

    error: Exception


class _Keeping(Future[Any]):
    """A future whose answer is kept when it is taken."""

    def __init__(self, sent: Future[Any], keep: Callable[[Any], None]) -> None:
        super().__init__()
        self._sent, self._keep = sent, keep

    def result(self, timeout: float | None = None) -> Any:
        """The answer, which is kept."""
        found = self._sent.result(timeout)
        if isinstance(found, _Done):
            self._keep(found.answer)
        return found

    def done(self) -> bool:
        """Whether it is there."""
        return self._sent.done()

    def cancel(self) -> bool:
        """Drop it if it has not begun."""
        return self._sent.cancel()


def _elsewhere(
    home: tuple[str, int], work: Callable[[Given], Answer], given: Given
) -> _Done | _Failed:
    """Do one task in a thread of an executor, with one BLAS thread."""
    if home != (_HOME, os.getpid()):
        # For good: threads of a worker share the limit, and one that ends would lift it.
        threadpool_limits(limits=1, user_api="blas")
    try:
        return _Done(work(given))
    except Exception as error:  # it is raised again where the answer is wanted
        return _Failed(error)


def _lost(error: Exception) -> InputError:
    text = " ".join(str(error).split())
    kind = type(error).__name__
    return InputError(
        f"{named('executor')}: expected an answer of a worker, got {kind}"
        f"{f': {text}' if text else ''}"
    )
