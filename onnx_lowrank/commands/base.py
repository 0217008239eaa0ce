"""What the verbs share: kinds of options, and how they meet the screen."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from onnx_lowrank.progress import Progress

__all__ = ["Decorator", "listed", "number", "reader_may_leave", "terminal_progress"]

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def number(name: str, text: str, **extra: Any) -> Decorator:
    """An option that takes a whole number."""
    return click.option(name, type=int, help=text, **extra)


def listed(text: str | None) -> tuple[str, ...] | None:
    """The parts of a list with commas."""
    return None if text is None else tuple(part.strip() for part in text.split(","))


@contextlib.contextmanager
def reader_may_leave() -> Iterator[None]:
    """Go on when a reader such as head has what it wants, where rich would end the program."""
    with contextlib.suppress(SystemExit, BrokenPipeError):
        yield


def terminal_progress() -> Progress:
    """Bars on a terminal, nothing in a pipe."""
    from onnx_lowrank.console import TerminalProgress
    from onnx_lowrank.progress import Silent

    return TerminalProgress() if sys.stderr.isatty() else Silent()
