"""What the verbs share: kinds of options, and how they meet the screen."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from onnx_lowrank.progress import Progress
    from onnx_lowrank.subjects import Subjects

__all__ = [
    "Decorator",
    "listed",
    "number",
    "reader_may_leave",
    "subjects",
    "terminal_progress",
]

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def number(name: str, text: str, **extra: Any) -> Decorator:
    """An option that takes a whole number."""
    return click.option(name, type=int, help=text, **extra)


@contextlib.contextmanager
def subjects(
    paths: Sequence[Path],
    *,
    input_shape: Sequence[str],
    dim: Sequence[str],
    fix_shapes: bool,
    verbose: bool,
    **options: Any,
) -> Iterator[Subjects]:
    """The models and samples of the options `on_targets`, in a workspace that goes away again."""
    from onnx_lowrank.errors import UsageError
    from onnx_lowrank.runtime import OrtLog
    from onnx_lowrank.save import workspace
    from onnx_lowrank.shapes import parse_dims, parse_input_shapes
    from onnx_lowrank.subjects import SampleOptions, open_subjects

    for name, least in (("samples", 1), ("seed", 0)):
        if options[name] < least:
            raise UsageError(f"--{name}: expected a whole number from {least}, got {options[name]}")
    given = SampleOptions(
        **options,
        input_shapes=parse_input_shapes(input_shape),
        dims=parse_dims(dim),
        fix=fix_shapes,
    )
    log = OrtLog()
    with workspace(None) as folder:
        yield open_subjects(paths, given, folder, log)
    if verbose:
        for line in log.lines:
            click.echo(f"{line.what}: {line.text}", err=True)


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
