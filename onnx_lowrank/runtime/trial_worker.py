"""The child of `onnx_lowrank.runtime.rehearsal`: loads and runs models before the parent does.

It answers requests until its standard input ends.  A crash ends this process and no other.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import onnxruntime as ort

from onnx_lowrank.errors import InputError
from onnx_lowrank.numerics.arrays import Feed
from onnx_lowrank.runtime import custom_ops
from onnx_lowrank.runtime.providers import resolve_provider
from onnx_lowrank.runtime.session import open_session, run

__all__ = ["Request", "main"]


@dataclass(frozen=True)
class Request:
    """A model to load, and to run where there is a feed.

    Attributes:
        model: a file, or a serialized model; None only registers the libraries.
        provider: short name of the execution provider.
        threads: intra-op threads; None for the default.
        optimize: ONNX Runtime's graph optimizations.
        feed: one sample; None only loads.
        keep: whether the session stays open for the next request of the same model.
        libraries: of custom operators.
    """

    model: Path | bytes | None
    provider: str
    threads: int | None
    optimize: bool
    feed: Feed | None
    keep: bool
    libraries: tuple[Path, ...] = ()

    @property
    def name(self) -> str:
        """What to call the model."""
        return str(self.model) if isinstance(self.model, Path) else "the model in memory"

    @property
    def session(self) -> tuple[object, ...]:
        """What two requests that can share a session have in common."""
        return self.model, self.provider, self.threads, self.optimize, self.libraries


class _Sessions:
    """At most one open session."""

    def __init__(self) -> None:
        self._open: tuple[Any, ort.InferenceSession] | None = None

    def answer(self, request: Request) -> str | None:
        """What ONNX Runtime says against the model or the sample; None if nothing."""
        key = request.session
        if self._open is not None and self._open[0] != key:
            self._open = None  # before the next one takes memory
        try:
            if request.model is None:
                with custom_ops.known(request.libraries):
                    custom_ops.register(ort.SessionOptions())
                return None
            if self._open is None:
                with custom_ops.known(request.libraries):
                    session = open_session(
                        request.model,
                        provider=resolve_provider(request.provider),
                        threads=request.threads,
                        optimize=request.optimize,
                    )
                self._open = key, session
            if request.feed is not None:
                run(self._open[1], request.feed, request.name)
        except InputError as error:
            return str(error)
        finally:
            if not request.keep:
                self._open = None
        return None


def main() -> None:
    """Answer requests: a pickled `Request` for a pickled text or None each."""
    requests, replies = _streams()
    _modest()
    waiting: queue.SimpleQueue[Request] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(requests, waiting), daemon=True).start()
    sessions = _Sessions()
    pickle.dump(None, replies)  # all is imported
    replies.flush()
    while True:
        pickle.dump(sessions.answer(waiting.get()), replies)
        replies.flush()


def _streams() -> tuple[IO[bytes], IO[bytes]]:
    """The two pipes, which are out of reach for what libraries print."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    return requests, replies


def _modest() -> None:
    """Leave what happens to this process to the parent."""
    with contextlib.suppress(OSError, ValueError):  # Ctrl-C reaches both
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError):  # Linux takes this process first where memory runs out
        Path("/proc/self/oom_score_adj").write_text("900")
    try:
        import resource
    except ImportError:  # Windows
        return
    with contextlib.suppress(OSError, ValueError):  # a crash that is expected needs no core file
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _receive(requests: IO[bytes], waiting: queue.SimpleQueue[Request]) -> None:
    """Pass requests on; end with the parent, whatever ONNX Runtime is at."""
    while True:
        try:
            waiting.put(pickle.load(requests))
        except (EOFError, OSError, pickle.UnpicklingError):
            os._exit(0)
