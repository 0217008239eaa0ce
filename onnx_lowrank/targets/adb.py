"""``adb[:serial][?option&…]``: an Android device, with a program that the user put there.

| option | meaning |
|---|---|
| ``perf_test=PATH`` | default ``/data/local/tmp/onnxruntime_perf_test`` |
| ``runner=COMMAND`` | instead of it: a program that gets a job's folder as its last argument |
| ``ep=NAME`` | execution provider, as ``-e`` of onnxruntime_perf_test has it; default ``cpu`` |
| ``tmp=FOLDER`` | where the temporary folder is made there; default ``/data/local/tmp`` |

onnxruntime_perf_test comes with no package: build onnxruntime for Android and push it.  It gives
times, load time, memory and nodes, but no outputs.  A runner, such as an app's own or a Python
there with `onnx_lowrank.targets.runner`, gives what it writes into the folder's ``result``, as that
module describes; ``runner=python3 /data/local/tmp/runner.py run`` is that one itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import secrets
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from onnx_lowrank.errors import InputError, named
from onnx_lowrank.numerics.arrays import Feed
from onnx_lowrank.progress import Advance
from onnx_lowrank.targets import perf_test, runner
from onnx_lowrank.targets.address import parse
from onnx_lowrank.targets.base import (
    Job,
    Offer,
    Outcome,
    Target,
)
from onnx_lowrank.targets.packing import (
    model_files,
    own_provider,
    packed,
    read_result,
)
from onnx_lowrank.targets.setup import hint, packages

__all__ = ["KINDS", "Adb", "create", "offers"]

_STATUS = "onnx-lowrank-status="
_PATIENCE = 30.0
"""Seconds for what only looks or tidies up."""


KINDS = frozenset({"adb"})


def create(name: str) -> Target:
    """The target of ``adb`` and ``adb:SERIAL``.

    Raises:
        InputError: there is no adb.
        UsageError: the name is not as described above.
    """
    if shutil.which("adb") is None:
        raise InputError(f"{named('targets', name)}: no adb on the PATH{hint(packages('adb'))}")
    return Adb(name)


def offers() -> list[Offer]:
    """The client; whether a device is there is not tried."""
    found = shutil.which("adb")
    return [
        Offer(
            name="adb:serial",
            usable=found is not None,
            version=None,
            found=f"client {found}" if found else "no adb on the PATH",
            times="remote",
            install=None if found else packages("adb"),
        )
    ]


class Adb(Target):
    """An Android device.

    Attributes:
        words: the words of a command that begin every call of adb.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        address = parse(name, ("perf_test", "runner", "ep", "tmp"), separator=":")
        self.words = ["adb", *(["-s", address.rest] if address.rest else [])]
        self._perf_test = address.get("perf_test") or "/data/local/tmp/onnxruntime_perf_test"
        self._runner = address.get("runner")
        self._provider = address.get("ep") or "cpu"
        self._tmp = address.get("tmp") or "/data/local/tmp"
        self._end = math.inf
        self.own = own_provider(self._provider)

    def run(
        self, models: Sequence[Path], feeds: Sequence[Feed], job: Job, advance: Advance
    ) -> tuple[Outcome, ...]:
        """Run a job there.

        Raises:
            InputError: there is no device, it has not the program, it went away, or the time is
                up.
        """
        if not len(feeds):
            raise InputError("expected at least one sample, got none")
        self._end = time.monotonic() + (job.seconds or math.inf)
        try:
            self._adb_run(["get-state"], "no device", _PATIENCE)
            if self._runner is not None:
                outcomes = self._run_runner(self._runner, models, feeds, job)
            else:
                outcomes = self._run_perf_test(models, feeds, job, advance)
        except subprocess.TimeoutExpired as error:
            if time.monotonic() < self._end:
                raise InputError(
                    f"{named('targets', self.name)}: the device does not answer"
                ) from error
            text = f"{named('targets', self.name)}: not done within {job.seconds:g} s"
            raise InputError(text) from error
        self.own = own_provider(self._provider, outcomes)
        return outcomes

    def _run_runner(
        self, command: str, models: Sequence[Path], feeds: Sequence[Feed], job: Job
    ) -> tuple[Outcome, ...]:
        where = named("targets", self.name)
        with (
            packed(models, feeds, job, provider=self._provider) as parcel,
            tempfile.TemporaryDirectory(prefix="onnx-lowrank-") as here,
            self._folder() as folder,
        ):
            self._push(dict(parcel.files), folder)
            code, said = self._shell(f"{command} {shlex.quote(folder)}")
            if code != 0:
                raise InputError(f"{where}: {command} ended with status {code}: {_last(said)}")
            self._adb_run(["pull", f"{folder}/result", here], "no result there", self._left())
            return read_result(Path(here) / "result", where)

    def _run_perf_test(
        self, models: Sequence[Path], feeds: Sequence[Feed], job: Job, advance: Advance
    ) -> tuple[Outcome, ...]:
        where = named("targets", self.name)
        if self._shell(f"test -x {shlex.quote(self._perf_test)}")[0] != 0:
            raise InputError(
                f"{where}: no program {self._perf_test} there; build onnxruntime_perf_test for "
                "Android and push it, or name one with ?perf_test=PATH or ?runner=COMMAND"
            )
        with tempfile.TemporaryDirectory(prefix="onnx-lowrank-") as here, self._folder() as folder:
            places = []
            for number, model in enumerate(models):
                (_, path), *external = model_files(model)
                files = {f"model{number}/model.onnx": path}
                files |= {f"model{number}/{inside}": part for inside, part in external}
                for sample in range(min(len(feeds), runner.MOST_FEEDS)):
                    tensors = perf_test.write_sample(feeds[sample], Path(here) / f"set{sample}")
                    for tensor in tensors:
                        files[f"model{number}/test_data_set_{sample}/{tensor.name}"] = tensor
                self._push(files, folder)
                places.append(f"{folder}/model{number}")
            measured = perf_test.PerfTest(
                shell=self._shell,
                program=self._perf_test,
                provider=self._provider,
                job=job,
                advance=advance,
            )
            outcomes = measured.run(places)
        if job.outputs:
            outcomes = tuple(_without_outputs(outcome, job) for outcome in outcomes)
        return outcomes

    @contextlib.contextmanager
    def _folder(self) -> Iterator[str]:
        """A folder there, which is gone afterwards, and what still runs in it too."""
        folder = f"{self._tmp}/onnx-lowrank-{secrets.token_hex(6)}"
        code, said = self._shell(f"mkdir -- {shlex.quote(folder)}")
        if code != 0:
            raise InputError(
                f"{named('targets', self.name)}: {_last(said) or f'no {self._tmp} there'}"
            )
        try:
            yield folder
        except BaseException as error:
            left = self._clear(folder, running=True)
            if left and isinstance(error, InputError):
                raise InputError(f"{error}; {left}") from error
            raise
        left = self._clear(folder, running=False)
        if left:
            raise InputError(f"{named('targets', self.name)}: {left}")

    def _clear(self, folder: str, *, running: bool) -> str:
        """Remove the folder; what to say if that failed."""
        try:
            if running:  # its name, which is unique, is in the arguments of whatever runs in it
                with contextlib.suppress(InputError):  # of the shell that is to say how it went too
                    self._shell(f"pkill -9 -f {PurePosixPath(folder).name}", _PATIENCE)
            code, _ = self._shell(f"rm -rf -- {shlex.quote(folder)}", _PATIENCE)
        except (InputError, subprocess.TimeoutExpired):
            code = 1
        return "" if code == 0 else f"{folder} is left there, since the device does not answer"

    def _push(self, files: Mapping[str, Path], folder: str) -> None:
        folders = {str(PurePosixPath(folder, name).parent) for name in files}
        self._shell(shlex.join(["mkdir", "-p", "--", *sorted(folders)]))
        for name, path in files.items():
            self._adb_run(["push", str(path), f"{folder}/{name}"], f"push {name}", self._left())

    def _left(self) -> float | None:
        return None if self._end == math.inf else max(0.0, self._end - time.monotonic())

    def _shell(self, command: str, patience: float | None = None) -> tuple[int, str]:
        """Run a command there: its status, and what it wrote.

        Old devices do not hand the status over, so the shell there writes it.

        Raises:
            InputError: the device is not there any more.
            TimeoutExpired: the time is up.
        """
        wait = self._left() if patience is None else patience
        said = self._adb_run(["shell", f"{command} 2>&1; echo {_STATUS}$?"], "no answer", wait)
        text, mark, status = said.rpartition(_STATUS)
        if not mark or not status.strip().isdecimal():
            raise InputError(f"{named('targets', self.name)}: the device went away: {_last(said)}")
        return int(status), text

    def _adb_run(self, words: Sequence[str], what: str, wait: float | None) -> str:
        """Run adb; its output."""
        done = subprocess.run(
            [*self.words, *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=wait,
            check=False,
        )
        said = done.stdout.decode("utf-8", "replace")
        if done.returncode != 0 and _STATUS not in said:
            why = _last(done.stderr.decode("utf-8", "replace") or said)
            for noise in ("adb: ", "error: "):
                why = why.removeprefix(noise)
            raise InputError(f"{named('targets', self.name)}: {what}: {why}")
        return said


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _without_outputs(outcome: Outcome, job: Job) -> Outcome:
    """Say that outputs were wanted and are not there: an error where nothing else was wanted."""
    text = "onnxruntime_perf_test gives no outputs; a program that does: ?runner=COMMAND"
    if job.iterations or outcome.error is not None:
        return dataclasses.replace(outcome, notes=(*outcome.notes, text))
    return dataclasses.replace(outcome, error=text)
