"""A Dask cluster of processes on this machine, for the time of a test."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.places import ROOT

__all__ = ["Cluster", "cluster"]

_PATIENCE = 120.0


@dataclass(frozen=True)
class Cluster:
    """A scheduler and its workers.

    Attributes:
        address: as ``--executor`` takes it.
        workers: their processes.
    """

    address: str
    workers: tuple[subprocess.Popen[bytes], ...]


@contextlib.contextmanager
def cluster(folder: Path, workers: int) -> Iterator[Cluster]:
    """A scheduler and some workers of one thread each; killed afterwards.

    Args:
        folder: for their files.
        workers: how many there are.
    """
    with contextlib.ExitStack() as stack:
        file = folder / "scheduler.json"
        where = ["--scheduler-file", str(file), "--no-dashboard"]
        _started(stack, folder, "scheduler", [*where, "--host", "127.0.0.1", "--port", "0"])
        end = time.monotonic() + _PATIENCE
        while not file.exists() or not file.read_text(encoding="utf-8").strip():
            assert time.monotonic() < end, "the scheduler did not start"
            time.sleep(0.05)
        address = json.loads(file.read_text(encoding="utf-8"))["address"]
        own = ["--no-nanny", "--nthreads", "1", "--local-directory", str(folder)]
        processes = [_started(stack, folder, "worker", [*where, *own]) for _ in range(workers)]
        yield Cluster(address.replace("tcp://", "dask://"), tuple(processes))


def _started(
    stack: contextlib.ExitStack, folder: Path, what: str, arguments: Sequence[str]
) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", f"distributed.cli.dask_{what}", *arguments]
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def end() -> None:
        process.kill()
        process.wait()

    stack.callback(end)
    return process
