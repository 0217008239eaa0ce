"""The command `onnx-lowrank`: its verbs (one a module), options, tables and progress."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

from onnx_lowrank.errors import Terminated
from onnx_lowrank.files import pending

__all__ = ["main"]

_INTERRUPTED = 130


def main() -> NoReturn:
    """Run the command and exit; every failure is one line on standard error."""
    signal.signal(signal.SIGTERM, _stop)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else the shell ignores it
        signal.signal(signal.SIGINT, _stop)
    # Imported here, so that an interrupt meanwhile is one line too.
    from onnx_lowrank.cli.program import run

    code = run(sys.argv[1:])
    # What was done is done: an interrupt while the interpreter ends must not say otherwise.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(code)


def _stop(number: int, frame: FrameType | None) -> None:
    """Stop in good order; but at once while a module is imported and nothing is to be removed.

    Modules in C turn an interrupt in the middle of their start into errors of other kinds.
    """
    if _importing(frame) and not pending():
        os.write(2, b"onnx-lowrank: error: interrupted; nothing written\n")
        os._exit(_INTERRUPTED)
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
