"""One connection over ssh: a runner that is sent to the other side, the job, and what comes back.

Hosts, keys and known hosts are those of the command; nothing is asked.
"""

from __future__ import annotations

import contextlib
import json
import queue
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from onnx_lowrank.targets import runner
from onnx_lowrank.targets.packing import Parcel

__all__ = ["PATIENCE", "BrokenError", "Connection", "ThereError"]

_SIGN_OF_LIFE = runner.SILENCE / 12
PATIENCE = 15.0
"""Seconds for the other side to clean up and end once the connection is closed."""
_CHUNK = 1 << 20


class ThereError(Exception):
    """The other side says what is wrong."""


class BrokenError(Exception):
    """The connection ended."""


class Connection:
    """A running ssh, with what it says sorted out; to be used in a ``with``."""

    def __init__(self, command: Sequence[str], end: float | None) -> None:
        """Prepare a conversation.

        Args:
            command: ssh with its arguments and the command for the other side.
            end: when it has to be over, by `time.monotonic`; None for no limit.
        """
        self._command, self._end = command, end
        self._late = False
        self._errors: list[str] = []

    def __enter__(self) -> Connection:
        pipe = subprocess.PIPE
        # Not stopped by Ctrl-C itself: it is closed in an orderly way, and so the other side is.
        self._process = subprocess.Popen(
            self._command, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
        )
        assert self._process.stdin
        assert self._process.stdout
        assert self._process.stderr
        self._in, self._out = self._process.stdin, self._process.stdout
        self._reader = threading.Thread(
            target=self._read_errors, args=(self._process.stderr,), daemon=True
        )
        self._reader.start()
        self._timer = None
        if self._end is not None:
            self._timer = threading.Timer(max(0.0, self._end - time.monotonic()), self._too_late)
            self._timer.daemon = True
            self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._close()
        with contextlib.suppress(OSError):
            self._out.close()
        self._reader.join(1.0)

    def _too_late(self) -> None:
        self._late = True
        self._process.terminate()

    def _close(self) -> None:
        """Hang up, and give the other side time to clean up."""
        with contextlib.suppress(OSError):
            self._in.close()
        drained = threading.Thread(target=self._drain, daemon=True)
        drained.start()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        drained.join(1.0)

    def _drain(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            while self._out.read(_CHUNK):
                pass

    def _read_errors(self, stream: IO[bytes]) -> None:
        with stream:
            for line in stream:
                self._errors.append(line.decode("utf-8", "replace").strip())
                del self._errors[:-20]

    def write_runner(self) -> None:
        """Send the program itself."""
        source = Path(runner.__file__).read_bytes()
        self._in.write(b"%d\n" % len(source) + source)
        self._in.flush()

    def event(self, *kinds: str) -> dict[str, Any]:
        """The next event, which is of one of these kinds.

        Raises:
            ThereError: the other side reports a fault.
            BrokenError: it ended instead.
        """
        while line := self._out.readline():
            if not line.startswith(runner.MARK):
                continue
            event: dict[str, Any] = json.loads(line[len(runner.MARK) :])
            if event["event"] == "fault":
                raise ThereError(" ".join(str(event["text"]).split()))
            if event["event"] not in kinds:
                raise ValueError(f"expected {kinds}, got {event}")
            return event
        raise BrokenError("it ended before it was done")

    def send(self, parcel: Parcel) -> None:
        """Send a job; the other side may report a fault meanwhile."""
        files = [[name, path.stat().st_size] for name, path in parcel.files]
        try:
            self._in.write(json.dumps({"files": files}).encode() + b"\n")
            for _, path in parcel.files:
                with path.open("rb") as file:
                    shutil.copyfileobj(file, self._in, _CHUNK)
            self._in.flush()
        except OSError as error:  # it stopped reading; it may have said why
            self.event("result")
            raise BrokenError(str(error)) from error

    @contextlib.contextmanager
    def signs_of_life(self) -> Iterator[None]:
        """Send a byte now and then while the block runs."""
        done: queue.Queue[None] = queue.Queue()

        def beat() -> None:
            while True:
                try:
                    done.get(timeout=_SIGN_OF_LIFE)
                    return
                except queue.Empty:
                    with contextlib.suppress(OSError, ValueError):
                        self._in.write(b"\n")
                        self._in.flush()

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.put(None)
            thread.join()

    def receive(self, files: Sequence[tuple[str, int]], folder: Path) -> None:
        """Write the files that follow an event into a folder.

        Raises:
            BrokenError: the connection ends before they do.
        """
        for name, size in files:
            with (folder / Path(name).name).open("wb") as file:
                while size:
                    data = self._out.read(min(size, _CHUNK))
                    if not data:
                        raise BrokenError("it ended while the result was sent")
                    file.write(data)
                    size -= len(data)

    def finish(self) -> None:
        """Wait until the other side has cleaned up and ended by itself.

        Raises:
            BrokenError: it did not.
        """
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(PATIENCE)
        self._close()
        if self._process.returncode != 0:
            raise BrokenError("it did not end in order")

    def why(self, error: Exception, seconds: float | None) -> str:
        """Why the conversation ended early, in one line."""
        self._close()
        self._reader.join(1.0)
        if self._late:
            return f"not done within {seconds:g} s"
        said = [line for line in self._errors if line]
        last = said[-1] if said else ""
        code = self._process.returncode
        if code == 255:
            return f"no connection: {last}" if last else "the connection broke"
        if code == 127:
            return f"no such Python there ({last}); name one with ?python=COMMAND"
        if code < 0:
            return "the ssh client was killed"
        return f"the runner there ended with status {code}: {last or error}"
