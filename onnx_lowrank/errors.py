"""What can go wrong, and the exit code each kind has on the command line.

Every message is one line that names the file, node or option, what was expected and what it
got.  The command prints it after ``onnx-lowrank: error:`` and exits with the code below.

An option has two spellings: ``tolerance=…`` for who calls a function, ``--tolerance`` for who types
the command.  A message writes it with `named`; the command has its own spelling in force while it
runs (`spelled`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from onnx_lowrank.schema.report import Report

__all__ = [
    "CrashError",
    "DerivativeError",
    "GateError",
    "InputError",
    "LimitError",
    "LowRankError",
    "ShortError",
    "Spelling",
    "Terminated",
    "UsageError",
    "named",
    "spelled",
]

Spelling = Callable[[str, tuple[Any, ...]], str]
"""How an option is written: of its argument's name and of its value, if the message names one."""


def _as_argument(name: str, value: tuple[Any, ...]) -> str:
    if not value:
        return f"{name}=…"
    shown = os.fspath(value[0]) if isinstance(value[0], os.PathLike) else value[0]
    return f"{name}={shown!r}"


# Not one for each thread: a message may be made in any of them.
_spelling: Spelling = _as_argument


def named(name: str, *value: Any) -> str:
    """An option in a message, with the value that matters or without one.

    Args:
        name: of the Python argument.
        value: at most one; True or False for a switch.
    """
    return _spelling(name, value)


@contextmanager
def spelled(spelling: Spelling) -> Iterator[None]:
    """Options are written in another way while the block runs."""
    global _spelling
    before, _spelling = _spelling, spelling
    try:
        yield
    finally:
        _spelling = before


class LowRankError(Exception):
    """Base of every error that this package raises on purpose."""

    exit_code: ClassVar[int] = 1


class InputError(LowRankError):
    """A file, a model, data or the machine is not what was asked for (exit code 1)."""


class CrashError(InputError):
    """ONNX Runtime does not survive a model or does not end; a child process found that out."""


class DerivativeError(InputError):
    """There is no gradient of this model; the caller decides whether that ends the run."""


class ShortError(DerivativeError):
    """Derivatives of a single sample do not fit in the memory that may be held."""


class UsageError(LowRankError, ValueError):
    """An option's value is wrong whatever the model is, or two do not go together (exit code 2)."""

    exit_code: ClassVar[int] = 2


class LimitError(LowRankError):
    """A limit that the user set was missed (exit code 3)."""

    exit_code: ClassVar[int] = 3


class GateError(LimitError):
    """A limit that the user set was missed; nothing was written (exit code 3).

    Attributes:
        report: everything that was found out before the gate closed.
    """

    def __init__(self, message: str, report: Report) -> None:
        super().__init__(message)
        self.report = report


class Terminated(KeyboardInterrupt):
    """The system asks the program to end: as Ctrl-C, but no stage goes on with what it has."""
