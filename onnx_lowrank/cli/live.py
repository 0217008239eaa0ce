"""Live: the stages of a run on a terminal while it works."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)

from onnx_lowrank.progress import Advance

__all__ = ["TerminalProgress"]


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

    @contextmanager
    def stage(self, name: str, total: int | None) -> Iterator[Advance]:
        """Show a bar, or a spinner where the amount of work is not known."""
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            *((BarColumn(), TaskProgressColumn()) if total else ()),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self._console, transient=True) as bar:
            task = bar.add_task(name, total=total)
            self._say = lambda text: bar.update(task, description=f"{name}: {text}")
            yield lambda done: bar.update(task, advance=done)

    def detail(self, text: str) -> None:
        """Put the text behind the stage's name."""
        self._say(text)
