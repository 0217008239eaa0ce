"""``ssh://[user@]host[:port][?option&…]``: a board with Python and onnxruntime.

| option | meaning |
|---|---|
| ``key=FILE`` | private key; else what the ssh configuration says |
| ``python=COMMAND`` | what starts Python there, for the shell there; default ``python3`` |
| ``ep=NAME`` | execution provider there, default ``cpu`` |
| ``tmp=FOLDER`` | where the temporary folder is made there; default: what Python there takes |
| ``connect=SECONDS`` | longest wait for the connection, default 10 |
| ``option=NAME=VALUE`` | repeatable: an ``-o`` of ssh, as ``StrictHostKeyChecking=accept-new`` |

``ONNX_LOWRANK_SSH`` holds further arguments of ssh.  Hosts, keys and known hosts are otherwise
those of the ssh configuration; nothing is asked.

One connection does everything: a few words of Python there read `onnx_lowrank.targets.runner` from
their standard input and become it, it receives the job, runs it, sends the result and removes its
folder.  While it runs, signs of life go to it; where they end (this program was killed, the network
is gone) it stops and removes its folder too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any

from onnx_lowrank.errors import InputError, UsageError, named
from onnx_lowrank.numerics.arrays import Feed
from onnx_lowrank.progress import Advance
from onnx_lowrank.targets import runner
from onnx_lowrank.targets.address import parse
from onnx_lowrank.targets.base import (
    Job,
    Offer,
    Outcome,
    Target,
)
from onnx_lowrank.targets.packing import (
    Parcel,
    own_provider,
    packed,
    read_json,
    read_result,
)
from onnx_lowrank.targets.setup import hint, packages

__all__ = ["KINDS", "Ssh", "create", "offers"]

# Understood by every Python, so that an old one can say that it is too old.
_BOOTSTRAP = (
    "import sys; v = sys.version_info; "
    "v >= (3, 8) or sys.exit('expected Python 3.8 or newer, this is %d.%d' % v[:2]); "
    "source = sys.stdin.buffer; exec(source.read(int(source.readline())))"
)
_PREFIX = "onnx-lowrank-"
_SIGN_OF_LIFE = runner.SILENCE / 12
_PATIENCE = 15.0
"""Seconds for the other side to clean up and end once the connection is closed."""
_CHUNK = 1 << 20


KINDS = frozenset({"ssh"})


def create(name: str) -> Target:
    """The target of ``ssh://…``.

    Raises:
        UsageError: the name is not as described above.
        InputError: there is no ssh client.
    """
    if shutil.which("ssh") is None:
        raise InputError(
            f"{named('targets', name)}: no ssh client here{hint(packages('openssh-client'))}"
        )
    return Ssh(name)


def offers() -> list[Offer]:
    """Any host: whether one can be reached is not tried."""
    found = shutil.which("ssh")
    return [
        Offer(
            name="ssh://user@host",
            usable=found is not None,
            version=None,
            found=f"ssh client {found}" if found else "no ssh client on the PATH",
            times="remote",
            install=None if found else packages("openssh-client"),
        )
    ]


class Ssh(Target):
    """A host that is reached over ssh; whether it computes in float16 is known after a run.

    Attributes:
        words: the words of a command that begin every call of ssh.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        known = ("key", "python", "ep", "tmp", "connect")
        address = parse(name, known, repeatable=("option",), separator="://")
        user_host, colon, port = address.rest.rpartition(":")
        if not colon or "]" in port:  # none, or the end of an IPv6 address in brackets
            user_host, port = address.rest, ""
        user, at, host = user_host.rpartition("@")
        host = host.strip("[]")
        if not host or host.startswith("-") or user.startswith("-") or "/" in host:
            raise UsageError(
                f"{named('targets', name)}: expected ssh://[user@]host[:port][?key=value]"
            )
        if port and not port.isdecimal():
            raise UsageError(f"{named('targets', name)}: expected a number as port, got {port!r}")
        wait = address.get("connect") or "10"
        if not wait.isdecimal() or not int(wait):
            raise UsageError(f"{named('targets', name)}: expected connect=SECONDS, got {wait!r}")
        self._python = address.get("python")
        self._provider = address.get("ep") or "cpu"
        self._tmp = address.get("tmp")
        self.own = own_provider(self._provider)
        words = ["ssh", "-T"]
        for option in address.options.get("option", ()):
            words += ["-o", option]
        words += shlex.split(os.environ.get("ONNX_LOWRANK_SSH", ""))
        # ssh takes the first value of an option, so the user's own are given first.
        for option in (
            "BatchMode=yes",
            f"ConnectTimeout={wait}",
            "ServerAliveInterval=15",
            "ServerAliveCountMax=4",
        ):
            words += ["-o", option]
        if key := address.get("key"):
            words += ["-i", str(Path(key).expanduser()), "-o", "IdentitiesOnly=yes"]
        if port:
            words += ["-p", port]
        self.words = [*words, "--", user + at + host]

    def run(
        self, models: Sequence[Path], feeds: Sequence[Feed], job: Job, advance: Advance
    ) -> tuple[Outcome, ...]:
        """Run a job there.

        Raises:
            InputError: the host cannot be reached or used, the connection broke, the time is up.
        """
        end = None if job.seconds is None else time.monotonic() + job.seconds
        python = None
        if self._python is not None:  # what the shell there makes of it, for the children too
            python = ["/bin/sh", "-c", f'exec {self._python} "$@"', "sh"]
        with (
            packed(models, feeds, job, provider=self._provider, python=python) as parcel,
            tempfile.TemporaryDirectory(prefix=_PREFIX) as result,
        ):
            return self._converse(parcel, Path(result), job, end, advance)

    def _converse(
        self, parcel: Parcel, result: Path, job: Job, end: float | None, advance: Advance
    ) -> tuple[Outcome, ...]:
        where = named("targets", self.name)
        command = f"exec {self._python or 'python3'} -c {shlex.quote(_BOOTSTRAP)} serve"
        if self._tmp is not None:
            command += f" {shlex.quote(self._tmp)}"
        with _Connection([*self.words, command], end) as connection:
            folder = None
            try:
                connection.write_runner()
                ready = connection.event("ready")
                folder = _own_folder(ready)
                self._check(ready, parcel)
                connection.send(parcel)
                with connection.signs_of_life():
                    while (event := connection.event("advance", "result"))["event"] == "advance":
                        advance(1)
                connection.receive(event["files"], result)
                connection.finish()
            except _ThereError as error:
                raise InputError(f"{where}: {error}") from error
            except (_BrokenError, OSError, ValueError, KeyError, TypeError) as error:
                why = connection.why(error, job.seconds)
                left = "" if folder is None else self._clear(folder)
                raise InputError(f"{where}: {why}{left}") from error
        outcomes = read_result(result, where)
        self.own = own_provider(self._provider, outcomes)
        version = read_json(result / "result.json", where)["onnxruntime"]
        note = f"Python {ready['python']}, onnxruntime {version}, {ready['machine']}"
        return tuple(
            dataclasses.replace(outcome, notes=(*outcome.notes, note)) for outcome in outcomes
        )

    def _check(self, ready: dict[str, Any], parcel: Parcel) -> None:
        if not ready["onnxruntime"]:
            raise _ThereError(
                f"{ready['executable']} there (Python {ready['python']}) has no onnxruntime; "
                "there: "
                f"{ready['executable']} -m pip install onnxruntime"
            )
        if ready["free"] < parcel.bytes:
            raise _ThereError(
                f"expected {parcel.bytes:,} bytes free in {ready['folder']} there, "
                f"it has {ready['free']:,}"
            )

    def _clear(self, folder: str) -> str:
        """Remove the folder of a runner that may not have done so itself; what to say of it."""
        command = f"rm -rf -- {shlex.quote(folder)}"
        try:
            done = subprocess.run(
                [*self.words, command],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=2 * _PATIENCE,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            done = None
        if done is not None and done.returncode == 0:
            return ""
        return f"; the folder {folder} may be left there"


class _ThereError(Exception):
    """The other side says what is wrong."""


class _BrokenError(Exception):
    """The connection ended."""


def _own_folder(ready: dict[str, Any]) -> str:
    folder = str(ready["folder"])
    path = PurePosixPath(folder)
    if not path.is_absolute() or not path.name.startswith(_PREFIX):
        raise _ThereError(f"expected a folder {_PREFIX}… there, got {folder!r}")
    return folder


class _Connection:
    """A running ssh, with what it says sorted out."""

    def __init__(self, command: Sequence[str], end: float | None) -> None:
        self._command, self._end = command, end
        self._late = False
        self._errors: list[str] = []

    def __enter__(self) -> _Connection:
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
            self._process.wait(_PATIENCE)
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
            _ThereError: the other side reports a fault.
            _BrokenError: it ended instead.
        """
        while line := self._out.readline():
            if not line.startswith(runner.MARK):
                continue
            event: dict[str, Any] = json.loads(line[len(runner.MARK) :])
            if event["event"] == "fault":
                raise _ThereError(" ".join(str(event["text"]).split()))
            if event["event"] not in kinds:
                raise ValueError(f"expected {kinds}, got {event}")
            return event
        raise _BrokenError("it ended before it was done")

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
            raise _BrokenError(str(error)) from error

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
            _BrokenError: the connection ends before they do.
        """
        for name, size in files:
            with (folder / Path(name).name).open("wb") as file:
                while size:
                    data = self._out.read(min(size, _CHUNK))
                    if not data:
                        raise _BrokenError("it ended while the result was sent")
                    file.write(data)
                    size -= len(data)

    def finish(self) -> None:
        """Wait until the other side has cleaned up and ended by itself.

        Raises:
            _BrokenError: it did not.
        """
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_PATIENCE)
        self._close()
        if self._process.returncode != 0:
            raise _BrokenError("it did not end in order")

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
