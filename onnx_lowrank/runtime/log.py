"""ONNX Runtime's own log, collected instead of flooding the console."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from onnx_lowrank.phrases import counted

__all__ = ["LogLine", "OrtLog", "quiet_stdout", "reserve_stderr"]

_SEVERITIES = {"V": "verbose", "I": "info", "W": "warning", "E": "error", "F": "fatal"}
# A record is "2026-01-31 12:00:00.123 [W:onnxruntime:, graph.cc:125 Function] text", between
# colour codes on Linux and macOS; only those tell where a text of several lines ends.
_RECORD = re.compile(
    r"^(?P<colour>\x1b\[[0-9;]+m)?"
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+ \[(?P<severity>[VIWEF]):onnxruntime"
    r"(?(colour).*?\x1b\[0?m|[^\n]*)\n?",
    re.DOTALL | re.MULTILINE,
)
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class LogLine:
    """One record of ONNX Runtime's log.

    Attributes:
        severity: "verbose", "info", "warning", "error" or "fatal".
        what: what was being done, as given to `OrtLog.capture`.
        text: the record without colours.
    """

    severity: str
    what: str
    text: str


class OrtLog:
    """Collects what ONNX Runtime writes to the process's standard error.

    Its logger is C++ code that writes to file descriptor 2, past ``sys.stderr``; so the
    descriptor itself is redirected.  Whatever else is written meanwhile reaches the real standard
    error when the capture ends.

    Attributes:
        lines: the records, in order.
    """

    def __init__(self) -> None:
        self.lines: list[LogLine] = []
        self._depth = 0

    @property
    def counts(self) -> Counter[str]:
        """Severity -> number of records."""
        return Counter(line.severity for line in self.lines)

    def summary(self) -> str | None:
        """One sentence such as "12 ONNX Runtime warnings, shown with --verbose", or None."""
        counts = self.counts
        errors = counts["error"] + counts["fatal"]
        parts = [
            counted(number, f"ONNX Runtime {word}")
            for number, word in ((counts["warning"], "warning"), (errors, "error"))
            if number
        ]
        return f"{' and '.join(parts)}, shown with --verbose" if parts else None

    @contextlib.contextmanager
    def capture(self, what: str) -> Iterator[None]:
        """Collect records while the block runs; `what` says what it does.

        May be nested; then the outermost block names the records.
        """
        if self._depth:
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
            return
        _flush_stderr()
        reserve_stderr()
        with tempfile.TemporaryFile() as file:
            real = os.dup(2)
            os.dup2(file.fileno(), 2)
            self._depth = 1
            try:
                yield
            finally:
                self._depth = 0
                _flush_stderr()
                os.dup2(real, 2)
                try:
                    self._sort_out(file, what, real)
                finally:
                    os.close(real)

    def _sort_out(self, file: IO[bytes], what: str, real: int) -> None:
        file.seek(0)
        text = file.read().decode("utf-8", errors="surrogateescape")
        for match in _RECORD.finditer(text):
            record = " ".join(_COLOUR.sub("", match[0]).split())
            self.lines.append(LogLine(_SEVERITIES[match["severity"]], what, record))
        rest = _RECORD.sub("", text)
        if rest:
            with contextlib.suppress(OSError):  # a reader that went away is no reason to stop
                data = memoryview(rest.encode("utf-8", errors="surrogateescape"))
                while data:
                    data = data[os.write(real, data) :]


def reserve_stderr() -> None:
    """Open the null device in place of a standard error that was closed before the start.

    Otherwise the next file that anyone opens gets descriptor 2, and the log is written into it.
    Best called before ONNX Runtime is imported; `OrtLog.capture` calls it too.
    """
    try:
        os.fstat(2)
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        if null != 2:
            os.dup2(null, 2)
            os.close(null)


@contextlib.contextmanager
def quiet_stdout() -> Iterator[None]:
    """Drop what libraries print to the process's standard output while the block runs."""
    if sys.stdout is not None:
        with contextlib.suppress(OSError, ValueError):  # closed
            sys.stdout.flush()
    try:
        real = os.dup(1)
    except OSError:  # closed
        yield
        return
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    try:
        yield
    finally:
        os.dup2(real, 1)
        os.close(real)
        os.close(null)


def _flush_stderr() -> None:
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):  # closed
            sys.stderr.flush()
