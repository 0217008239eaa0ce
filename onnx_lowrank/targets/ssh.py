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

import dataclasses
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from onnx_lowrank.errors import InputError, UsageError, named
from onnx_lowrank.numerics.arrays import Feed
from onnx_lowrank.progress import Advance
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
from onnx_lowrank.targets.ssh_connection import PATIENCE, BrokenError, Connection, ThereError

__all__ = ["KINDS", "Ssh", "create", "offers"]

# Understood by every Python, so that an old one can say that it is too old.
_BOOTSTRAP = (
    "import sys; v = sys.version_info; "
    "v >= (3, 8) or sys.exit('expected Python 3.8 or newer, this is %d.%d' % v[:2]); "
    "source = sys.stdin.buffer; exec(source.read(int(source.readline())))"
)
_PREFIX = "onnx-lowrank-"

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
        with Connection([*self.words, command], end) as connection:
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
            except ThereError as error:
                raise InputError(f"{where}: {error}") from error
            except (BrokenError, OSError, ValueError, KeyError, TypeError) as error:
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
            raise ThereError(
                f"{ready['executable']} there (Python {ready['python']}) has no onnxruntime; "
                "there: "
                f"{ready['executable']} -m pip install onnxruntime"
            )
        if ready["free"] < parcel.bytes:
            raise ThereError(
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
                timeout=2 * PATIENCE,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            done = None
        if done is not None and done.returncode == 0:
            return ""
        return f"; the folder {folder} may be left there"


def _own_folder(ready: dict[str, Any]) -> str:
    folder = str(ready["folder"])
    path = PurePosixPath(folder)
    if not path.is_absolute() or not path.name.startswith(_PREFIX):
        raise ThereError(f"expected a folder {_PREFIX}… there, got {folder!r}")
    return folder
