"""What can go wrong, and the exit code each kind has on the command line.

Every message is one line that names the file, node or option, what was expected and what
came.  The command prints it after ``onnx-lowrank: error:`` and exits with the code below.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from onnx_lowrank.report import Report

__all__ = [
    "DerivativeError",
    "GateError",
    "InputError",
    "LimitError",
    "LowRankError",
    "Terminated",
    "UsageError",
]


class LowRankError(Exception):
    """Base of every error that this package raises on purpose."""

    exit_code: ClassVar[int] = 1


class InputError(LowRankError):
    """A file, a model, data or the machine is not what was asked for (exit code 1)."""


class DerivativeError(InputError):
    """There is no gradient of this model; who asked for one says what follows."""


class UsageError(LowRankError, ValueError):
    """An option's value is wrong whatever the model is (exit code 2)."""

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
