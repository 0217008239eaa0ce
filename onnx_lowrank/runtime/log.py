"""ONNX Runtime's own log, collected instead of flooding the console."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
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

        May be nested; then the outermost block names the records.  Where several threads capture
        at once, each gets every record of that time: a record does not name its thread.
        """
        if self._depth:
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
            return
        reserve_stderr()
        block = _STDERR.begin()
        self._depth = 1
        try:
            yield
        finally:
            self._depth = 0
            text = _STDERR.end(block).decode("utf-8", errors="surrogateescape")
            for match in _RECORD.finditer(text):
                record = " ".join(_COLOUR.sub("", match[0]).split())
                self.lines.append(LogLine(_SEVERITIES[match["severity"]], what, record))


@dataclass(eq=False)
class _Block:
    """A part of what goes to a file: from ``start``, but for what blocks inside took."""

    start: int
    taken: list[tuple[int, int]] = field(default_factory=list)

    def own(self, text: bytes, offset: int) -> bytes:
        """What of a text that begins at an offset of the file is this block's."""
        parts, at = [], self.start
        for start, end in [*self.taken, (offset + len(text), 0)]:
            parts.append(text[at - offset : start - offset])
            at = end
        return b"".join(parts)


class _Redirection:
    """A descriptor of the process that leads to a file while at least one block wants it to.

    Descriptors belong to the process, not to a thread: blocks of several threads share one
    redirection.  The first one makes it, the last one takes it back.
    """

    def __init__(self, number: int, stream: str, opened: Callable[[], IO[bytes]]) -> None:
        """Redirect a descriptor.

        Args:
            number: the descriptor.
            stream: the name of the stream in `sys` that writes to it.
            opened: opens the file that it leads to.
        """
        self._number, self._stream, self._opened = number, stream, opened
        self._lock = threading.Lock()
        self._blocks = 0
        self._within = threading.local()  # the blocks of a thread, the innermost last

    def begin(self) -> _Block:
        """Begin a block.

        Raises:
            OSError: the descriptor is closed, or there is no file to redirect it to.
        """
        with self._lock:
            self._flush()
            if not self._blocks:
                real = os.dup(self._number)
                try:
                    self._file = self._opened()
                except BaseException:
                    os.close(real)
                    raise
                self._real = real
                os.dup2(self._file.fileno(), self._number)
            self._blocks += 1
            block = _Block(os.fstat(self._file.fileno()).st_size)
            self._mine.append(block)
            return block

    @property
    def _mine(self) -> list[_Block]:
        if not hasattr(self._within, "blocks"):
            self._within.blocks = []
        blocks: list[_Block] = self._within.blocks
        return blocks

    def end(self, block: _Block) -> bytes:
        """End a block; what was written since it began, but for what blocks inside got.

        After the last block the real descriptor gets whatever is no record of ONNX Runtime's.
        """
        with self._lock:
            self._flush()
            self._blocks -= 1
            outer = self._mine[: self._mine.index(block)]
            self._mine.remove(block)
            text = self._read(block.start)
            if outer:
                outer[-1].taken.append((block.start, block.start + len(text)))
            own = block.own(text, block.start)
            if self._blocks:
                return own
            os.dup2(self._real, self._number)
            with self._file:
                whole = self._read(0)
            try:
                self._write(_RECORD.sub("", whole.decode("utf-8", errors="surrogateescape")))
            finally:
                os.close(self._real)
            return own

    def _read(self, start: int) -> bytes:
        """What the file holds from a place on; the place of the next write stays where it is."""
        number = self._file.fileno()
        if hasattr(os, "pread"):
            return os.pread(number, os.fstat(number).st_size - start, start)
        here = self._file.tell()  # Windows: what another thread writes meanwhile may be lost
        self._file.seek(start)
        text = self._file.read()
        self._file.seek(here)
        return text

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a reader that went away is no reason to stop
            data = memoryview(text.encode("utf-8", errors="surrogateescape"))
            while data:
                data = data[os.write(self._real, data) :]

    def _flush(self) -> None:
        stream = getattr(sys, self._stream)
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):  # closed
                stream.flush()


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
    try:
        block = _STDOUT.begin()
    except OSError:  # closed
        yield
        return
    try:
        yield
    finally:
        _STDOUT.end(block)


def _collecting() -> IO[bytes]:
    return tempfile.TemporaryFile(buffering=0)


def _dropping() -> IO[bytes]:
    return Path(os.devnull).open("r+b", buffering=0)


_STDERR = _Redirection(2, "stderr", _collecting)
_STDOUT = _Redirection(1, "stdout", _dropping)
