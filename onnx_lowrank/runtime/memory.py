"""How much memory work with samples may take, and how much it takes; measured on Linux only."""

from __future__ import annotations

import contextlib
import ctypes
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from onnx_lowrank.phrases import size

__all__ = ["SHARE", "UNKNOWN", "Memory", "Watch", "available", "growth", "held"]

Answer = TypeVar("Answer")

STATUS, RESET, SYSTEM = (
    Path("/proc/self/status"),
    Path("/proc/self/clear_refs"),
    Path("/proc/meminfo"),
)

UNKNOWN = "this system does not tell how much memory is taken"
"""What a limit is told where it cannot be kept."""

SHARE = 0.7
"""Of the room that is left a piece of work is planned to take this share: what one sample takes
is measured, what several take at once is only near to its multiple."""
# Where no limit was given, of the memory that is free.
_DEFAULT = 0.5
# What is added to a limit that would have been enough: no two runs hold the same.
_SPARE = 1.1
# Seconds between two looks at what is held.
_EVERY = 0.1


@dataclass(frozen=True)
class Memory:
    """The limit that work with samples keeps.

    Attributes:
        limit: bytes that the process may hold at any time; None where the system does not tell
            what it holds and what is free, and nothing is limited.
        given: whether the user set it.
        folder: where values wait that do not fit; None for the system's folder.
    """

    limit: int | None = None
    given: bool = False
    folder: Path | None = None

    @classmethod
    def of(cls, given: int | None, folder: Path | None = None) -> Memory:
        """The given limit, or without one half of what is free beside what is held already.

        Args:
            given: bytes.
            folder: where values wait that do not fit.
        """
        if given is not None:
            return cls(given, True, folder)
        free, own = available(), held()
        if free is None or own is None:
            return cls(folder=folder)
        return cls(own + int(_DEFAULT * free), False, folder)

    def room(self) -> int | None:
        """Bytes that the process may still take; None where that is not known."""
        if self.limit is None:
            return None
        _trim()
        own = held()
        return None if own is None else max(self.limit - own, 0)

    def planned(self) -> int | None:
        """The share of the room that work may plan with."""
        room = self.room()
        return None if room is None else int(SHARE * room)

    def times(self, taken: int | None, most: int, beside: int = 0) -> int:
        """How many like pieces of work fit in memory at once, at most ``most``; 0 if not one.

        Args:
            taken: bytes of one piece; None if that is not known.
            most: how many are wanted.
            beside: bytes that something else will take meanwhile.
        """
        planned = self.planned()
        if planned is None or not taken:
            return most
        return min(most, max(planned - beside, 0) // taken)

    def short(self, what: str, taken: int, own: int, later: int = 0) -> str:
        """What is said of work that does not fit: it is in no way, or the program itself is.

        Args:
            what: the work, such as "the input of 'n' in sample 3".
            taken: bytes of the work.
            own: bytes that the program held before it.
            later: bytes that what follows takes besides, as far as that is known.
        """
        assert self.limit is not None
        if own >= self.limit:
            text = (
                f"the program itself, with the model and its runtime, holds {size(own)} of the "
                f"{size(self.limit)} allowed"
            )
        else:
            text = (
                f"{what} takes {size(taken)} beside the {size(own)} that the program holds, of "
                f"{size(self.limit)} allowed"
            )
        return f"{text}; expected at least about {size(_enough(own + taken / SHARE + later))}"


class Watch:
    """Looks now and then, while the block runs, whether a limit that the user set is kept.

    Attributes:
        most: the most bytes that the process was seen to hold; 0 where nothing was looked at.
    """

    def __init__(self, memory: Memory) -> None:
        """Nothing is looked at yet.

        Args:
            memory: the limit; one that nobody set is not watched.
        """
        self._memory, self.most = memory, 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="memory", daemon=True)

    def __enter__(self) -> Watch:
        if self._memory.given:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._memory.given:
            self._thread.join()

    def exceeded(self) -> str | None:
        """What is said where more was held so far than the limit allows."""
        limit = self._memory.limit
        if limit is None or self.most <= limit:
            return None
        return f"was not kept: the program held {size(self.most)} at most, of {size(limit)} allowed"

    def _look(self) -> None:
        while True:
            self.most = max(self.most, held() or 0)
            if self._ended.wait(_EVERY):
                return


def available() -> int | None:
    """Bytes that the system can hand out without swapping; None where it does not tell."""
    return _field(SYSTEM, "MemAvailable")


def held() -> int | None:
    """Bytes of this process that no file stands behind; None where the system does not tell."""
    own = _field(STATUS, "RssAnon")
    return _field(STATUS, "VmRSS") if own is None else own


def growth(work: Callable[[], Answer]) -> tuple[Answer, int | None]:
    """Do some work, and by how many bytes the process was larger meanwhile.

    Returns:
        what the work gives, and the bytes; None where the system does not tell.
    """
    try:
        RESET.write_text("5", encoding="ascii")  # the largest size so far is forgotten
    except OSError:
        return work(), None
    before = _field(STATUS, "VmRSS")
    answer = work()
    largest = _field(STATUS, "VmHWM")
    if before is None or largest is None:
        return answer, None
    return answer, max(largest - before, 0)


def _enough(needed: float) -> float:
    """Bytes with something to spare, rounded up to two digits."""
    step = 10 ** (math.floor(math.log10(needed)) - 1) if needed >= 10 else 1
    return math.ceil(_SPARE * needed / step) * step


def _trim() -> None:
    """Give back to the system what the C library holds and nobody uses; glibc only."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # other C libraries
        ctypes.CDLL(None).malloc_trim(0)


def _field(path: Path, name: str) -> int | None:
    """A field of a file of lines such as ``VmRSS:  1234 kB``, in bytes."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None
