"""Opener: the sessions of one run; whatever ONNX Runtime has not seen, it sees in a child first.

Models that are made on the way (with activations as outputs, with gradients, one layer alone) are
no safer than the one that the user gave: they are rehearsed alike, on the feed of their first run.
"""

from __future__ import annotations

import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Collection
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime as ort

from onnx_lowrank.errors import CrashError
from onnx_lowrank.graph.save import write
from onnx_lowrank.graph.walk import stored_bytes
from onnx_lowrank.numerics.arrays import Array, Feed
from onnx_lowrank.runtime.memory import Memory
from onnx_lowrank.runtime.providers import CPU, Provider
from onnx_lowrank.runtime.rehearsal import attempt, rehearse
from onnx_lowrank.runtime.session import OrtLog, default_threads, open_session, run
from onnx_lowrank.runtime.taps import Runner

__all__ = ["BESIDE", "INSIDE", "UNPACKED", "Opener", "Waiting"]

INSIDE = "the model with its activations as outputs"
"""What messages call a model that is made to look inside another one."""

_NAME = "made.onnx"
BESIDE = 1 << 24
"""Weights above this many bytes stand beside a model that is made: ONNX Runtime maps them where it
would copy them twice."""
# How often the session of one model is closed for others: two that take turns would close each
# other for every sample.
_CLOSINGS = 4
# A session takes so many times the bytes of its file, about: weights, and their copies in the order
# that products like best.
_COPIES = 2
UNPACKED = 1 << 28
"""Weights above this many bytes stay in that file while a model is looked into: several such models
are open at a time, and each would hold a copy, of derivatives two."""


class Waiting:
    """A runner whose model is loaded at its first call, or before it on demand.

    Attributes:
        used: when it was called last, on a clock of its own.
    """

    def __init__(self, wanted: Collection[str | None], load: Callable[[Feed], Runner]) -> None:
        """A model that is not loaded.

        Args:
            wanted: its inputs.
            load: loads it, after a child has run it on the feed.
        """
        self._wanted, self._load = frozenset(wanted), load
        self._run: Runner | None = None
        self._closed = 0
        self.used = 0.0

    def load(self, feed: Feed) -> Runner:
        """Load the model, if it is not."""
        if self._run is None:
            self._run = self._load(self._given(feed))
        self.used = time.monotonic()
        return self._run

    def rest(self) -> None:
        """Close a session that can be opened again, unless it was closed often already."""
        if self._run is not None and self._closed < _CLOSINGS:
            self._run, self._closed = None, self._closed + 1

    def __call__(self, feed: Feed) -> Feed:
        """Outputs of a sample, of whose arrays those are taken that the model reads."""
        return self.load(feed)(self._given(feed))

    def _given(self, feed: Feed) -> Feed:
        return {name: array for name, array in feed.items() if name in self._wanted}


class Opener:
    """Opens models in this process after a child has opened them.

    Attributes:
        threads: intra-op threads of every session.
        notes: what had to be done in another way.
    """

    def __init__(
        self,
        folder: Path,
        threads: int | None,
        log: OrtLog,
        notes: dict[str, None],
        memory: Memory | None = None,
    ) -> None:
        """An opener that has seen no model yet.

        Args:
            folder: for files of models that are made on the way.
            threads: intra-op threads; None for `default_threads`.
            log: collects ONNX Runtime's messages.
            notes: gets what the user should know.
            memory: the limit; where the user set one, runners that were not used for longest are
                closed for others.
        """
        self._folder, self._log, self.notes = folder, log, notes
        self._memory = memory or Memory()
        self._runners = weakref.WeakSet[Waiting]()
        self.threads = threads or default_threads()
        self._rehearsed: set[tuple[Path, str, bool]] = set()

    def rehearse(
        self,
        path: Path,
        feed: Feed | None = None,
        *,
        what: str,
        provider: Provider = CPU,
        optimize: bool = True,
    ) -> None:
        """The first load of a file, and a run of it where there is a feed, in a child.

        What ONNX Runtime says against the file is left to be said by `open`.

        Raises:
            CrashError: the child did not survive it.
        """
        if feed is None and (path, provider.name, optimize) in self._rehearsed:
            return
        rehearse(path, feed, what=what, provider=provider, threads=self.threads, optimize=optimize)
        self.seen(path, provider, optimize)

    def seen(self, path: Path, provider: Provider = CPU, optimize: bool = True) -> None:
        """Say that a child has loaded a file."""
        self._rehearsed.add((path, provider.name, optimize))

    def attempt(
        self,
        path: Path,
        feed: Feed,
        *,
        what: str,
        provider: Provider = CPU,
        keep: bool,
    ) -> str | None:
        """Run a file in the child alone: `onnx_lowrank.runtime.rehearsal.attempt`.

        Raises:
            CrashError: the child did not survive it.
        """
        return attempt(path, feed, what=what, provider=provider, threads=self.threads, keep=keep)

    def open(
        self,
        model: Path | bytes,
        *,
        optimize: bool = True,
        provider: Provider = CPU,
        planned: bool = True,
        packed: bool = True,
        spinning: bool = True,
    ) -> ort.InferenceSession:
        """A session in this process, of a model that was rehearsed.

        Args:
            model: a file, or a serialized model.
            optimize: ONNX Runtime's graph optimizations.
            provider: the execution provider.
            planned: see `onnx_lowrank.runtime.session.open_session`, also for the next one.
            packed: whether weights are copied.
            spinning: whether threads that wait keep their cores busy.

        Raises:
            InputError: ONNX Runtime does not load it.
        """
        return open_session(
            model,
            provider=provider,
            threads=self.threads,
            optimize=optimize,
            planned=planned,
            packed=packed,
            spinning=spinning,
            log=self._log,
        )

    def alone(self, model: bytes, feed: Feed, provider: Provider = CPU) -> ort.InferenceSession:
        """A session of a little model that a child has run on the feed.

        Raises:
            InputError: ONNX Runtime does not load it, or does not survive it.
        """
        rehearse(model, feed, what="a layer alone", provider=provider, threads=self.threads)
        return self.open(model, provider=provider)

    def run(self, session: ort.InferenceSession, feed: Feed, what: str) -> dict[str, Array]:
        """Outputs of a sample by name.

        Raises:
            InputError: ONNX Runtime does not run it; `what` names the model.
        """
        with self._log.capture("running"):
            return run(session, feed, what)

    def made(
        self, model: ir.Model, what: str, *, optimize: bool = True, provider: Provider = CPU
    ) -> ort.InferenceSession:
        """A session of a model that was made on the way, loaded by a child first.

        Raises:
            InputError: ONNX Runtime does not load it, or does not survive it.
        """
        # A folder for each: sessions that are open may still read their file.
        with tempfile.TemporaryDirectory(dir=self._folder, ignore_cleanup_errors=True) as own:
            path = _written(model, Path(own))
            rehearse(path, what=what, provider=provider, threads=self.threads, optimize=optimize)
            return self.open(path, optimize=optimize, provider=provider)

    def runner(self, model: ir.Model | onnx.ModelProto, *, optimize: bool = True) -> Runner:
        """A function from feeds to the outputs of a model, which is loaded at the first call.

        Feeds may hold more than the inputs of the model.  Where ONNX Runtime does not survive its
        own optimizations of the model, it is run without them, which is noted.

        Args:
            model: made from one that runs.
            optimize: ONNX Runtime's graph optimizations.

        The function raises InputError where ONNX Runtime does not load, run or survive the model.
        """
        folder, packed = Path(tempfile.mkdtemp(dir=self._folder)), True
        if isinstance(model, onnx.ModelProto) and model.ByteSize() > BESIDE:
            model = ir.from_proto(model)  # which is written without a copy of its bytes
        if isinstance(model, ir.Model):
            packed = stored_bytes(model) <= UNPACKED
            wanted = {value.name for value in model.graph.inputs}
            path = _written(model, folder)
        else:
            wanted = {value.name for value in model.graph.input}
            path = folder / _NAME
            path.write_bytes(model.SerializeToString())

        survived: list[bool] = []

        def load(given: Feed) -> Runner:
            if not survived:
                survived.append(self._survived(path, given, optimize))
            self._make_room(_COPIES * sum(own.stat().st_size for own in folder.iterdir()))
            session = self.open(
                path, optimize=survived[0], planned=False, packed=packed, spinning=False
            )
            if not self._memory.given:
                remove()  # it is not opened again
            return lambda feed: self.run(session, feed, INSIDE)

        waiting = Waiting(wanted, load)
        remove = weakref.finalize(waiting, shutil.rmtree, folder, ignore_errors=True)
        self._runners.add(waiting)
        return waiting

    def rest(self) -> None:
        """Close runners until half of the limit that the user set is free, as far as they go.

        They are opened again when they are needed.
        """
        self._make_room((self._memory.limit or 0) // 2)

    def _make_room(self, taken: int) -> None:
        """Close other runners where the user's limit leaves no room for so many bytes."""
        if not self._memory.given:
            return
        for waiting in sorted(self._runners, key=lambda own: own.used):
            room = self._memory.room()
            if room is None or room >= taken:
                return
            waiting.rest()

    def _survived(self, path: Path, feed: Feed, optimize: bool) -> bool:
        """Rehearse a model; whether the graph optimizations that are asked for can stay."""
        try:
            rehearse(path, feed, what=INSIDE, threads=self.threads, optimize=optimize)
        except CrashError:
            if not optimize:
                raise
            rehearse(path, feed, what=INSIDE, threads=self.threads, optimize=False)
            self.notes[
                f"ONNX Runtime {ort.__version__} crashes where it optimizes {INSIDE}: it ran "
                "without its graph optimizations"
            ] = None
            return False
        return optimize


def _written(model: ir.Model, folder: Path) -> Path:
    return write(model, folder, _NAME, "always" if stored_bytes(model) > BESIDE else "auto")[-1]
