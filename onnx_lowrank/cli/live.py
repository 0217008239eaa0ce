"""Live: the stages of a run while it works, as bars on a terminal or as lines in a pipe."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from onnx_lowrank.phrases import printable
from onnx_lowrank.progress import Advance

__all__ = ["LineProgress", "Route", "TerminalProgress", "seconds_between", "time_text"]

# The environment variable that says how many seconds lie between two lines; 0 for no lines.
_VARIABLE, _SECONDS = "ONNX_LOWRANK_PROGRESS", 20.0
# A stage that ran for less tells nothing of the time that it still takes.
_ESTIMATED = 3.0


def seconds_between() -> float:
    """How many seconds lie between two lines in a pipe, at least; 0 for no lines."""
    try:
        return max(float(os.environ.get(_VARIABLE, _SECONDS)), 0.0)
    except ValueError:
        return _SECONDS


def time_text(seconds: float) -> str:
    """Such as "45 s" or "12 min"."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


class Route:
    """Which stage of how many is reached."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._part = ""
        self._reached = 0

    def plan(self, names: Sequence[str], part: str = "") -> None:
        """Take what comes."""
        self._names, self._part, self._reached = tuple(names), part, 0

    def place(self, name: str) -> str:
        """Such as "3/9 measure"; what was not planned is a part of the stage before."""
        if name in self._names:
            self._reached = self._names.index(name) + 1
        count = f"{self._reached}/{len(self._names)} " if self._reached else ""
        part = f"{self._part}, " if self._part else ""
        return f"{part}{count}{name}"


class TerminalProgress:
    """Shows stages on standard error while they run, and leaves no trace.

    It writes to a copy of the descriptor, because standard error itself is redirected while ONNX
    Runtime works (see `onnx_lowrank.runtime.log`).
    """

    def __init__(self) -> None:
        # Names are shown as they are: neither brackets nor what the terminal cannot encode stop it.
        stream = os.fdopen(os.dup(2), "w", errors="replace")
        self._console = Console(file=stream, markup=False, emoji=False)
        self._say: Callable[[str], None] = lambda _: None
        self._route = Route()

    def plan(self, names: Sequence[str], part: str = "") -> None:
        """Take which stages come."""
        self._route.plan(names, part)

    @contextmanager
    def stage(self, name: str, total: int | None) -> Iterator[Advance]:
        """Show a bar with the time that remains, or a spinner where the work is not known."""
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            *((BarColumn(bar_width=20), TaskProgressColumn()) if total else ()),
            TimeElapsedColumn(),
            *((TextColumn("left"), TimeRemainingColumn()) if total else ()),
        )
        place = printable(self._route.place(name))
        before = self._say
        with Progress(*columns, console=self._console, transient=True) as bar:
            task = bar.add_task(place, total=total)
            self._say = lambda text: bar.update(task, description=f"{place}: {printable(text)}")
            try:
                yield lambda done: bar.update(task, advance=done)
            finally:
                self._say = before

    def detail(self, text: str) -> None:
        """Put the text behind the stage's name."""
        self._say(text)


@dataclass
class _Running:
    """A stage that runs."""

    place: str
    total: int | None
    start: float = field(default_factory=time.monotonic)
    done: int = 0
    detail: str = ""

    def line(self) -> str:
        """How far it is."""
        seconds = time.monotonic() - self.start
        text = self.place
        if self.total:
            text += f": {100 * min(self.done / self.total, 1.0):.0f} %"
        text += f", {time_text(seconds)}"
        if self.total and 0 < self.done < self.total and seconds > _ESTIMATED:
            left = seconds / self.done * (self.total - self.done)
            text += f", about {time_text(left)} left"
        return f"{text}, {self.detail}" if self.detail else text


class LineProgress:
    """Writes a line on standard error now and then, so that long work is not silent in a pipe.

    Short work writes nothing.
    """

    def __init__(self, every: float) -> None:
        """Wait for work.

        Args:
            every: seconds between two lines, and before the first.
        """
        self._every = every
        self._start = self._last = time.monotonic()
        self._route = Route()
        self._running: list[_Running] = []

    def plan(self, names: Sequence[str], part: str = "") -> None:
        """Take which stages come."""
        self._route.plan(names, part)

    @contextmanager
    def stage(self, name: str, total: int | None) -> Iterator[Advance]:
        """Watch a stage."""
        running = _Running(printable(self._route.place(name)), total)
        self._running.append(running)

        def advance(done: int) -> None:
            running.done += done

        try:
            if len(self._running) > 1:  # a part of a stage that is watched
                yield advance
                return
            with self._watched():
                yield advance
        finally:
            self._running.pop()

    def detail(self, text: str) -> None:
        """Put the text behind the stage's line."""
        if self._running:
            self._running[-1].detail = printable(text)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        over = threading.Event()
        # A copy, because standard error is redirected while ONNX Runtime works.
        with os.fdopen(os.dup(2), "w", errors="replace") as stream:
            thread = threading.Thread(target=self._watch, args=(over, stream), daemon=True)
            thread.start()
            try:
                yield
            finally:
                over.set()
                thread.join()

    def _watch(self, over: threading.Event, stream: TextIO) -> None:
        while not over.wait(max(self._last + self._every - time.monotonic(), 0.0)):
            self._last = time.monotonic()
            running = self._running[-1:]
            for stage in running:
                try:
                    whole = time_text(self._last - self._start)
                    print(f"onnx-lowrank: {stage.line()}; {whole} in all", file=stream, flush=True)
                except OSError:  # the reader has left
                    return
