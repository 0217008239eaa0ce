"""Rehearsal: a model's first load and first run, in a child process.

ONNX Runtime can take its process down with it: by a crash, by a hang, or by the memory that it
asks for.  So whatever was not loaded before is loaded, and run on one sample, in a child.  One
child serves all models of this process; it is started again after a crash, and ends with its
parent.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import onnx
import onnxruntime as ort

from onnx_lowrank.errors import CrashError, InputError, named
from onnx_lowrank.files import is_file, workspace
from onnx_lowrank.numerics.arrays import Feed
from onnx_lowrank.runtime import custom_ops
from onnx_lowrank.runtime.providers import CPU, Provider
from onnx_lowrank.runtime.trial_worker import Request

__all__ = ["LIMIT", "attempt", "child_id", "rehearse", "with_custom_ops"]

LIMIT = 600.0
"""Seconds that the first load and run may take."""

# Without the folder of the program in front, and with the packages of this process.
_START = (
    "import sys; sys.path[:] = sys.argv[1:]; "
    "from onnx_lowrank.runtime.trial_worker import main; main()"
)
_LONGEST_END = 5.0
# To find the node, a model is cut a few times: only where that is quick.
_LARGEST_CUT, _CUT_SECONDS = 100_000_000, 20.0


class _DeathError(Exception):
    """How the child ended."""


class _Child:
    """The process; one request at a time."""

    def __init__(self) -> None:
        self.parent = os.getpid()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self.number = self._process.pid
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests: IO[bytes] = self._process.stdin
        self._replies: queue.SimpleQueue[tuple[str | None] | None] = queue.SimpleQueue()
        self._reader = threading.Thread(
            target=_collect, args=(self._process.stdout, self._replies), daemon=True
        )
        self._reader.start()
        self._started = False

    def ask(self, request: Request, seconds: float) -> str | None:
        """The answer.  Raises _DeathError if there is none."""
        if not self._started:
            self._reply(LIMIT)
            self._started = True
        try:
            pickle.dump(request, self._requests, protocol=pickle.HIGHEST_PROTOCOL)
            self._requests.flush()
        except OSError:  # it is gone; the reader knows
            pass
        return self._reply(seconds)

    def _reply(self, seconds: float) -> str | None:
        try:
            found = self._replies.get(timeout=seconds)
        except queue.Empty:
            raise _DeathError(f"does not end within {seconds:g} s") from None
        if found is None:
            raise _DeathError(_ended(self._process.wait()))
        return found[0]

    def end(self) -> None:
        """Close the pipe, which ends it, or kill it."""
        with contextlib.suppress(OSError):
            self._requests.close()
        try:
            self._process.wait(_LONGEST_END)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """End it, whatever it is at."""
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(OSError):
            self._requests.close()
        self._reader.join(_LONGEST_END)


def _collect(stream: IO[bytes], replies: queue.SimpleQueue[tuple[str | None] | None]) -> None:
    with stream:
        while True:
            try:
                replies.put((pickle.load(stream),))
            except (EOFError, OSError, pickle.UnpicklingError):
                replies.put(None)
                return


def _ended(code: int) -> str:
    if code >= 0:
        return f"ends its process with exit code {code}"
    names = {item.value: item.name for item in signal.Signals}
    name = names.get(-code, f"signal {-code}")
    if name == "SIGKILL":
        return "gets its process killed (SIGKILL), as where memory runs out"
    return f"crashes ({name})"


_children: list[_Child] = []  # none or one
_lock = threading.Lock()


def child_id() -> int | None:
    """The process number of the child, if there is one."""
    return _children[0].number if _children else None


@atexit.register
def _end() -> None:
    while _children:
        child = _children.pop()
        if child.parent == os.getpid():
            child.end()


def _ask(request: Request, seconds: float) -> str | None:
    with _lock:
        if _children and _children[0].parent != os.getpid():
            _children.clear()  # this process was forked: the child is the other one's
        if not _children:
            _children.append(_Child())
        try:
            return _children[0].ask(request, seconds)
        except BaseException:  # also where it was interrupted: an answer would be of no use
            _children.pop().kill()
            raise


def attempt(
    model: Path | bytes,
    feed: Feed | None = None,
    *,
    what: str,
    provider: Provider | str = CPU,
    threads: int | None = None,
    optimize: bool = True,
    keep: bool = False,
    seconds: float | None = None,
) -> str | None:
    """Load a model, and run it on a sample, in the child.

    Args:
        model: a file, or a serialized model that is small.
        feed: the sample; None only loads.
        what: names the model in an error.
        provider: the execution provider, or the name of one that is unknown to this process: a
            plugin is loaded for the first time too.
        threads: intra-op threads.
        optimize: ONNX Runtime's graph optimizations.
        keep: whether the child keeps the session for another sample.
        seconds: time limit; None for `LIMIT`.

    Returns:
        What ONNX Runtime says against it; None if it runs.

    Raises:
        CrashError: the child does not survive it, or does not end.
    """
    limit = LIMIT if seconds is None else seconds
    model = model.absolute() if isinstance(model, Path) else model
    short, full = (provider, provider) if isinstance(provider, str) else provider.names
    libraries = custom_ops.libraries()
    request = Request(model, short, threads, optimize, feed, keep, libraries)
    try:
        return _ask(request, limit)
    except _DeathError as death:
        doing = "loads" if feed is None else "loads or runs"
        raise CrashError(
            f"{what}: ONNX Runtime {ort.__version__} {death} while it {doing} the model on "
            f"{full}{_findings(request)}; another version of onnxruntime may not"
        ) from None


def rehearse(
    model: Path | bytes,
    feed: Feed | None = None,
    *,
    what: str,
    provider: Provider = CPU,
    threads: int | None = None,
    optimize: bool = True,
) -> None:
    """As `attempt`; what ONNX Runtime says is left to be said when this process loads the model.

    Raises:
        CrashError: the child does not survive it, or does not end.
    """
    attempt(model, feed, what=what, provider=provider, threads=threads, optimize=optimize)


@contextlib.contextmanager
def with_custom_ops(paths: Sequence[str | os.PathLike[str]]) -> Iterator[None]:
    """Let every session of a block know libraries of custom operators; first tried in the child.

    Args:
        paths: files that export ``RegisterCustomOps``.

    Raises:
        InputError: one is no file, or ONNX Runtime does not take it.
        CrashError: the child does not survive it.
    """
    libraries = tuple(Path(path).absolute() for path in paths)
    for path in libraries:
        if not is_file(path):
            raise InputError(f"{named('custom_ops', path)}: expected a library, got no such file")
    for path in dict.fromkeys(libraries):
        request = Request(None, CPU.name, None, True, None, False, (path,))
        try:
            why = _ask(request, LIMIT)
        except _DeathError as death:
            raise CrashError(
                f"{named('custom_ops', path)}: ONNX Runtime {ort.__version__} {death} while it "
                "registers the library"
            ) from None
        if why is not None:
            with custom_ops.known((path,)):  # the same reason, in the caller's spelling
                custom_ops.register(ort.SessionOptions())
            raise InputError(why)
    with custom_ops.known(libraries):
        yield


def _findings(request: Request) -> str:
    """What a few more tries tell of a crash."""
    end = time.monotonic() + _CUT_SECONDS
    found = _node(request, end)
    text = "" if found is None else f", at {found}"
    plain = dataclasses.replace(request, optimize=False, keep=False)
    if request.optimize and _survives(plain, end):
        text += "; without graph optimizations (disabled_optimizers, graph_optimization_level) "
        text += "it does not"
    return text


def _survives(request: Request, end: float) -> bool:
    """Whether the child does; False too where the time is over."""
    left = end - time.monotonic()
    if left <= 0:
        return False
    try:
        _ask(request, left)
    except _DeathError:
        return False
    return True


def _node(request: Request, end: float) -> str | None:
    """The first node with which the model crashes; None where that is not found quickly."""
    if request.model is None:
        return None
    try:
        model = _small(request.model)
    except Exception:  # protobuf's errors have no common base but this
        return None
    if model is None:
        return None
    if any(onnx.external_data_helper.uses_external_data(t) for t in model.graph.initializer):
        return None
    nodes = list(model.graph.node)
    with workspace(None) as folder:
        path = folder / "cut.onnx"
        cut = dataclasses.replace(request, model=path, keep=False)

        def survives(count: int) -> bool:
            _cut(model, nodes[:count])
            onnx.save(model, path)
            return _survives(cut, end)

        good, bad = 0, len(nodes)
        if not nodes or survives(bad):
            return None  # it takes the outputs that the model has
        while bad - good > 1:
            middle = (good + bad) // 2
            if survives(middle):
                good = middle
            else:
                bad = middle
            if time.monotonic() >= end:
                return None
    node = nodes[bad - 1]
    name = node.name or next((name for name in node.output if name), "")
    return f"node {name!r} ({node.op_type})"


def _small(model: Path | bytes) -> onnx.ModelProto | None:
    """A model as a protobuf; None where it is too large to be cut often."""
    size = model.stat().st_size if isinstance(model, Path) else len(model)
    if size > _LARGEST_CUT:
        return None
    if isinstance(model, Path):
        return onnx.load(model, load_external_data=False)
    return onnx.load_from_string(model)


def _cut(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> None:
    """Leave only these nodes, the first ones; what none of them reads is an output."""
    read = {name for node in nodes for name in _reads(node)}
    made = [name for node in nodes for name in node.output if name and name not in read]
    del model.graph.node[:], model.graph.output[:]
    model.graph.node.extend(nodes)
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in made)


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    yield from node.input
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                yield from _reads(inner)
            yield from (value.name for value in graph.output)
