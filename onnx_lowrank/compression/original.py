"""Original: the input model in ONNX Runtime: its sessions, and why it does not run."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import onnxruntime as ort

from onnx_lowrank.compression.sample_split import SampleSplit
from onnx_lowrank.compression.settings import Settings
from onnx_lowrank.data.samples import Samples, largest
from onnx_lowrank.errors import CrashError, InputError, named
from onnx_lowrank.evaluation.unchanged import same_bits
from onnx_lowrank.graph.draws import drawing
from onnx_lowrank.graph.load import LoadedModel
from onnx_lowrank.graph.save import runnable_file
from onnx_lowrank.graph.walk import stored_bytes
from onnx_lowrank.numerics.arrays import Feed
from onnx_lowrank.runtime.finite import all_finite, not_finite
from onnx_lowrank.runtime.memory import UNKNOWN, Memory, growth, held
from onnx_lowrank.runtime.opener import Opener
from onnx_lowrank.runtime.providers import CPU, Provider

__all__ = ["LARGE", "Original"]

LARGE = 1 << 28
"""A session of more bytes of weights is closed while nobody needs it."""
# So is one of more than this part of the memory that the user allows.
_PART = 16


class Original:
    """The input model, rehearsed in a child process before it is opened in this one.

    The file and the sessions are made when they are first needed.

    Attributes:
        taken: bytes of the first run on a sample; None where there was none, or it is not known.
    """

    def __init__(
        self,
        source: LoadedModel,
        settings: Settings,
        folder: Path,
        opener: Opener,
        provider: Provider,
        opened: Callable[[ort.InferenceSession], None],
    ) -> None:
        """Nothing opened yet.

        Args:
            source: the model.
            settings: the options.
            folder: for a copy of it.
            opener: opens models, and rehearses them.
            provider: the execution provider of check and timing.
            opened: called with the session on it, once there is one.
        """
        self._source, self._settings, self._folder = source, settings, folder
        self._opener, self._provider, self._opened = opener, provider, opened
        self._session: ort.InferenceSession | None = None
        self._opening = 0  # bytes that opening it took
        self.taken: int | None = None

    @cached_property
    def _file(self) -> Path:
        return runnable_file(self._source, self._folder / "original")

    @property
    def session(self) -> ort.InferenceSession:
        """On the provider.  Raises InputError where ONNX Runtime does not load the model."""
        if self._session is None:
            self._opener.rehearse(self._file, what=self._source.name, provider=self._provider)
            self._session, opening = growth(
                lambda: self._opener.open(self._file, provider=self._provider)
            )
            self._opening = opening or 0
            self._opened(self._session)
        return self._session

    def rest(self) -> None:
        """Close the session of a large model on the CPU; it is opened again when it is needed."""
        limit = self._settings.memory_limit
        most = LARGE if limit is None else min(LARGE, limit // _PART)
        if self._provider is CPU and stored_bytes(self._source.model) > most:
            self._session = None

    @property
    def on_cpu(self) -> ort.InferenceSession:
        """On the CPU.  Raises InputError where ONNX Runtime does not load the model."""
        return self.session if self._provider is CPU else self._beside

    @cached_property
    def _beside(self) -> ort.InferenceSession:
        """On the CPU, where the provider is another one."""
        self._opener.rehearse(self._file, what=self._source.name)
        return self._opener.open(self._file)

    @cached_property
    def refused(self) -> str | None:
        """Why ONNX Runtime does not load the model on the CPU; None if it does."""
        try:
            _ = self.on_cpu
        except CrashError:
            raise
        except InputError as error:
            return str(error)
        return None

    def runs(self, feed: Feed) -> bool | None:
        """Whether the model runs on a feed, on the CPU; None where a child did not survive."""
        try:
            why = self._opener.attempt(self._file, feed, what=self._source.name, keep=True)
        except CrashError:
            return None
        return why is None

    def unavailable(self, split: SampleSplit, memory: Memory, notes: dict[str, None]) -> str | None:
        """Why ONNX Runtime cannot run the model on its samples; None if it can.

        Args:
            split: the samples.
            memory: what one run may hold.
            notes: gets findings, for the report.

        Raises:
            CrashError: a child process did not survive the model.
            InputError: what the user said of the input does not fit the model, or one run takes
                more memory than the user allows.
        """
        settings = self._settings
        feed, wrong = None, None
        try:
            feed = split.judge.feeds[0]
        except InputError as error:
            wrong = error
        random = settings.data is None and settings.calibration is None
        why = None
        try:
            if random and feed is not None:
                why = self._not_always(split.judge)
            else:
                self._opener.rehearse(
                    self._file, feed, what=self._source.name, provider=self._provider
                )
            if self._provider is not CPU:
                self._opener.rehearse(self._file, feed, what=self._source.name)
            session = self.session
        except CrashError as error:
            real = f"; {named('data')} gives it real input" if random and feed is not None else ""
            unseen = f"{named('check', False)} {named('bench', False)} converts it without a run"
            raise CrashError(f"{error}{real}; {unseen}") from error
        except InputError as error:
            return str(error)
        if feed is None:
            assert wrong is not None
            # What the user said of the input does not fit the model: that must not pass.
            if (
                settings.data is not None
                or settings.calibration is not None
                or settings.input_shapes
                or settings.dims
            ):
                raise wrong
            return str(wrong)
        self._fits(session, split, memory, notes)
        try:
            outputs, taken = growth(lambda: self._opener.run(session, feed, self._source.name))
            self.taken = self.taken or taken
            if not drawing(self._source.model) and not same_bits(
                outputs, self._opener.run(session, feed, self._source.name)
            ):
                notes[
                    "the original gives other numbers each time on one input, though no node is "
                    "known to draw: that counts as error of the result"
                ] = None
            if self._provider is not CPU and not all_finite(outputs):
                bad = not_finite(outputs, self._opener.run(self.on_cpu, feed, "the original"))
                if bad is not None:
                    return f"{self._source.name}: {self._provider.full} runs it and {bad}"
        except InputError as error:
            if settings.data is not None or settings.calibration is not None:
                raise
            return f"{error} {_random_only()}"
        return None if why is None else f"{why} {_random_only()}"

    def _fits(
        self,
        session: ort.InferenceSession,
        split: SampleSplit,
        memory: Memory,
        notes: dict[str, None],
    ) -> None:
        """Look whether one run on the largest sample keeps the memory that the user allows.

        Raises:
            InputError: it does not.
        """
        if not memory.given:
            return
        fit = split.calibration
        judge = split.judge
        parts = [judge] if fit is None or fit is judge else [judge, fit]
        places = [(part, largest(part.feeds)) for part in parts]
        part, number = places[largest([own.feeds[index] for own, index in places])]
        own, room = held(), memory.room()
        try:
            _, taken = growth(
                lambda: self._opener.run(session, part.feeds[number], self._source.name)
            )
        except InputError:
            return  # the run that follows says why
        self.taken = taken
        option = named("memory", self._settings.memory)
        if taken is None or room is None or own is None:
            notes[f"{option}: {UNKNOWN}"] = None
        elif taken > room:
            # What follows opens the model once more, with other outputs.
            what = f"one run of the model on sample {number} of {part.source}"
            raise InputError(f"{option}: {memory.short(what, taken, own, self._opening)}")

    def _not_always(self, samples: Samples) -> str | None:
        """Why the original, which is tried in the child, fails on a random sample after the first.

        Random integers may be sizes and counts: one sample does not speak for the others.
        """
        feeds = samples.feeds
        self._opener.seen(self._file, self._provider)
        for number in range(len(feeds)):
            why = self._opener.attempt(
                self._file,
                feeds[number],
                what=self._source.name,
                provider=self._provider,
                keep=number + 1 < len(feeds),
            )
            if why is not None:
                return None if number == 0 else f"sample {number + 1} of {len(feeds)}: {why}"
        return None


def _random_only() -> str:
    sizes = named("input_shapes")
    return f"(on random input; try real samples with {named('data')}, or sizes with {sizes})"
