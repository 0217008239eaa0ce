"""Cluster: a crew that hands layers to an executor of the caller's, or to a running Dask cluster.

There is no scheduler here: Dask's own says who does what, and gives a task to another worker where
one is lost (https://distributed.dask.org).  What a task needs goes with it, so that nothing is lost
with a worker.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from onnx_lowrank.errors import InputError, UsageError, named
from onnx_lowrank.numerics.crew import HERE, Crew

__all__ = ["TIMEOUT", "scheduler_of", "versions", "working"]

TIMEOUT = 10.0
"""Seconds in which a scheduler has to answer, and to have a worker."""

# Seconds in which the workers have to import this package.
_IMPORT = 60.0
_ADDRESS = re.compile(r"dask://(\[[0-9a-fA-F:]+\]|[^:/\[\]\s]+):(\d{1,5})/?")
# What decides on the last bits of an answer.
_DECIDING = ("onnx-lowrank", "numpy", "scipy", "onnxruntime")


def scheduler_of(address: str) -> str:
    """What Dask calls the scheduler at an address ``dask://HOST:PORT``.

    Raises:
        UsageError: the address is none.
    """
    found = _ADDRESS.fullmatch(address)
    if found is None or not 0 < int(found[2]) < 1 << 16:
        raise UsageError(f"{named('executor', address)}: expected dask://HOST:PORT")
    return f"tcp://{found[1]}:{found[2]}"


def versions() -> dict[str, str]:
    """The packages that decide on the last bits, in this process."""
    return {name: version(name) for name in _DECIDING}


@contextlib.contextmanager
def working(executor: str | Executor | None, crew: Crew = HERE) -> Iterator[Crew]:
    """A crew that works in an executor while the block runs.

    Args:
        executor: one of the caller's, which stays open; or the address of a cluster; None for the
            threads of this process.
        crew: what else the crew has.

    Raises:
        InputError: there is no such cluster, it has no worker, a worker has other versions of the
            packages, or Dask is not installed.
    """
    if not isinstance(executor, str):
        yield replace(crew, executor=executor)
        return
    with _connected(executor) as client:
        yield replace(crew, executor=client.get_executor(pure=False), gone=_watch(client))


@contextlib.contextmanager
def _connected(address: str) -> Iterator[Any]:
    """A client of a cluster whose workers can do the work."""
    option, scheduler = named("executor", address), scheduler_of(address)
    try:
        from distributed import Client
    except ImportError as error:
        raise InputError(
            f"{option}: expected the package distributed, which is not installed; "
            "pip install 'onnx-lowrank[dask]'"
        ) from error
    with _quiet():
        try:
            client = _within(
                TIMEOUT, lambda: Client(scheduler, timeout=TIMEOUT, set_as_default=False)
            )
        except (OSError, ValueError) as error:
            text = " ".join(str(error).split())
            raise InputError(
                f"{option}: expected a Dask scheduler that answers within {TIMEOUT:g} s, got "
                f"{type(error).__name__}{f': {text}' if text else ''}"
            ) from error
        try:
            _check(client, option)
            yield client
        finally:
            with contextlib.suppress(OSError):  # such as that of a scheduler that has gone
                client.close(timeout=TIMEOUT)


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """What a call gives; Dask's own limits do not hold where the other side says nothing at all.

    Raises:
        TimeoutError: it takes longer; it is left alone then.
        Whatever the call raises.
    """
    found: Future[Any] = Future()

    def work() -> None:
        try:
            found.set_result(call())
        except Exception as error:  # it is raised where the answer is wanted
            found.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return found.result(seconds + 1.0)


def _check(client: Any, option: str) -> None:
    """Raise InputError where there is no worker, or one computes with other versions."""
    try:
        client.wait_for_workers(1, timeout=TIMEOUT)
    except OSError as error:
        raise InputError(f"{option}: expected a worker within {TIMEOUT:g} s, got none") from error
    try:
        there = _within(_IMPORT, lambda: client.run(versions))
    except Exception as error:  # whatever the import of a package raises there
        raise InputError(
            f"{option}: expected onnx-lowrank on every worker, got {type(error).__name__}: {error}"
        ) from error
    own = versions()
    for worker, found in there.items():
        for name, wanted in own.items():
            if found.get(name) != wanted:
                raise InputError(
                    f"{option}: worker {worker} has {name} {found.get(name)}; expected {wanted}, "
                    "as here: results would differ in their last bits"
                )


def _watch(client: Any) -> Callable[[], str | None]:
    """Says that all workers have gone, where they were gone twice in a row."""
    missed = 0

    def gone() -> str | None:
        nonlocal missed
        try:
            workers = _within(TIMEOUT, client.nthreads)
        except Exception as error:  # of a client that has lost its scheduler
            return f"expected an answer of the scheduler, got {type(error).__name__}: {error}"
        missed = 0 if workers else missed + 1
        return "expected a worker, all of them have gone" if missed > 1 else None

    return gone


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing of what Dask logs; what matters to the user is an error of the run."""
    loggers = [
        logging.getLogger(name)
        for name in list(logging.root.manager.loggerDict)
        if name.partition(".")[0] in ("distributed", "tornado")  # each may have its own handler
    ]
    before = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        yield
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled
