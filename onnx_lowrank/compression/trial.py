"""Trial: the original in ONNX Runtime, and other models run against it on the same samples."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime as ort

from onnx_lowrank.compression.sample_split import SampleSplit
from onnx_lowrank.compression.settings import Settings
from onnx_lowrank.data.mask import chosen_mask, mask_note
from onnx_lowrank.data.samples import Samples, largest
from onnx_lowrank.data.shapes import concrete_shapes, input_specs
from onnx_lowrank.errors import CrashError, InputError, named
from onnx_lowrank.evaluation.halves import computes_half, half_note
from onnx_lowrank.evaluation.metrics import Metric, Ran
from onnx_lowrank.evaluation.outputs import compare_outputs, mean_damage, run_check
from onnx_lowrank.evaluation.reading import Reading, reading_of
from onnx_lowrank.evaluation.unchanged import change, same_bits
from onnx_lowrank.evaluation.watched import Watched
from onnx_lowrank.graph.draws import drawing, steady
from onnx_lowrank.graph.load import LoadedModel
from onnx_lowrank.graph.save import runnable_file
from onnx_lowrank.graph.simplify import SIZE_LIMIT
from onnx_lowrank.graph.walk import stored_bytes
from onnx_lowrank.measures import Check, Judged, Latency
from onnx_lowrank.numerics.arrays import Feed
from onnx_lowrank.phrases import listed
from onnx_lowrank.progress import Advance
from onnx_lowrank.runtime.assignment import assignment, assignment_text
from onnx_lowrank.runtime.finite import all_finite, not_finite
from onnx_lowrank.runtime.log import OrtLog
from onnx_lowrank.runtime.memory import UNKNOWN, Memory, gigabytes, growth, held
from onnx_lowrank.runtime.opener import INSIDE, Opener
from onnx_lowrank.runtime.providers import CPU, resolve_provider
from onnx_lowrank.runtime.taps import Runner, give_out
from onnx_lowrank.runtime.timing import time_pair

__all__ = ["Trial"]


class Trial:
    """Runs of one original and of models made from it.

    Sessions and samples are made when they are first needed.

    Attributes:
        notes: assumptions and findings, for the report.
        provider: the execution provider of check and timing; all else runs on the CPU.
        split: which samples judge, and which are for what else.
        memory: what work with samples may hold.
    """

    def __init__(
        self,
        source: LoadedModel,
        settings: Settings,
        folder: Path,
        log: OrtLog,
        judged: ir.Model | None = None,
        at: Sequence[str] = (),
    ) -> None:
        """No run yet.

        Args:
            source: the original.
            settings: the options.
            folder: for copies of models.
            log: collects ONNX Runtime's messages.
            judged: the original with outputs for the values that count as such; None: itself.
            at: the names of these values.
        """
        self._source = source
        self._judged, self._at = judged or source.model, tuple(at)
        self._settings = settings
        self._folder = folder
        self._log = log
        self.notes: dict[str, None] = {}
        with log.capture("registering"):
            self.provider = resolve_provider(settings.ep)
        self._assigned: dict[str, str] = {}
        self._opener = Opener(folder, settings.threads, log, self.notes)
        self.split = SampleSplit(source.model, settings, self._runs, self.notes)
        self.memory = Memory.of(settings.memory_limit, folder)

    @property
    def threads(self) -> int:
        """Intra-op threads."""
        return self._opener.threads

    @cached_property
    def original(self) -> ort.InferenceSession:
        """The original's session.  Raises InputError where ONNX Runtime does not load it."""
        file, name = self._original_file, self._source.name
        self._opener.rehearse(file, what=name, provider=self.provider)
        session = self._opener.open(file, provider=self.provider)
        self._note_nodes(session, "the original")
        return session

    @cached_property
    def _reference(self) -> ort.InferenceSession:
        """The original on the CPU."""
        if self.provider is CPU:
            return self.original
        self._opener.rehearse(self._original_file, what=self._source.name)
        return self._opener.open(self._original_file)

    @cached_property
    def _original_file(self) -> Path:
        return runnable_file(self._source, self._folder / "original")

    @cached_property
    def refused(self) -> str | None:
        """Why ONNX Runtime does not load the original on the CPU; None if it does."""
        try:
            _ = self._reference
        except CrashError:
            raise
        except InputError as error:
            return str(error)
        return None

    @cached_property
    def unavailable(self) -> str | None:
        """Why ONNX Runtime cannot run the original; None if it can."""
        settings = self._settings
        feed, wrong = None, None
        try:
            feed = self.samples.feeds[0]
        except InputError as error:
            wrong = error
        random = settings.data is None and settings.calibration is None
        why = None
        try:
            if random and feed is not None:
                why = self._not_always()
            else:
                self._opener.rehearse(
                    self._original_file, feed, what=self._source.name, provider=self.provider
                )
            if self.provider is not CPU:
                self._opener.rehearse(self._original_file, feed, what=self._source.name)
            session = self.original
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
        self._fits(session)
        try:
            outputs = self._opener.run(session, feed, self._source.name)
            if not self.draws and not same_bits(
                outputs, self._opener.run(session, feed, self._source.name)
            ):
                self.notes[
                    "the original gives other numbers each time on one input, though no node is "
                    "known to draw: that counts as error of the result"
                ] = None
            if self.provider is not CPU and not all_finite(outputs):
                bad = not_finite(outputs, self._opener.run(self._reference, feed, "the original"))
                if bad is not None:
                    return f"{self._source.name}: {self.provider.full} runs it and {bad}"
        except InputError as error:
            if settings.data is not None or settings.calibration is not None:
                raise
            return f"{error} {_random_only()}"
        return None if why is None else f"{why} {_random_only()}"

    def _fits(self, session: ort.InferenceSession) -> None:
        """Look whether one run on the largest sample keeps the memory that the user allows.

        Raises:
            InputError: it does not.
        """
        if not self.memory.given:
            return
        fit = self.split.fitted_to
        parts = [self.samples] if fit is None or fit is self.samples else [self.samples, fit]
        places = [(part, largest(part.feeds)) for part in parts]
        part, number = places[largest([own.feeds[index] for own, index in places])]
        own, room = held(), self.memory.room()
        try:
            _, taken = growth(
                lambda: self._opener.run(session, part.feeds[number], self._source.name)
            )
        except InputError:
            return  # the run that follows says why
        option = named("memory", self._settings.memory)
        if taken is None or room is None or own is None:
            self.notes[f"{option}: {UNKNOWN}"] = None
        elif taken > room:
            raise InputError(
                f"{option}: one run of the model on sample {number} of {part.source} takes "
                f"{gigabytes(taken)} beside the {gigabytes(own)} that the program holds with it"
            )

    def _not_always(self) -> str | None:
        """Why the original, which is tried in the child, fails on a random sample after the first.

        Random integers may be sizes and counts: one sample does not speak for the others.
        """
        feeds = self.samples.feeds
        self._opener.seen(self._original_file, self.provider)
        for number in range(len(feeds)):
            why = self._opener.attempt(
                self._original_file,
                feeds[number],
                what=self._source.name,
                provider=self.provider,
                keep=number + 1 < len(feeds),
            )
            if why is not None:
                return None if number == 0 else f"sample {number + 1} of {len(feeds)}: {why}"
        return None

    @property
    def samples(self) -> Samples:
        """The samples to check and time with; raises as `SampleSplit.judge`."""
        return self.split.judge

    @property
    def sizes(self) -> dict[str, tuple[int, ...]]:
        """Input -> sizes: those of the samples, or without them what was given or is assumed."""
        settings = self._settings
        if (settings.check or settings.bench) and self.unavailable is None:
            return self.samples.shapes
        specs = input_specs(self._source.model)
        shapes = concrete_shapes(specs, settings.input_shapes, settings.dims)
        self.notes.update(dict.fromkeys(shapes.notes))
        return shapes.shapes

    @cached_property
    def draws(self) -> tuple[str, ...]:
        """The nodes of the original that draw numbers: nothing is judged by what they draw."""
        found = drawing(self._source.model)
        if found:
            self.notes[
                f"numbers are drawn by {listed(found, 4)}: models are judged with the mean, or the "
                "likeliest class, in place of what is drawn; they are timed as they are"
            ] = None
        return found

    @cached_property
    def _judge_of_original(self) -> ort.InferenceSession:
        """What others are judged against, on the provider."""
        if not self.draws and not self._at:
            return self.original
        model = self._steady(self._judged)
        return self._opener.made(model, "the original", provider=self.provider)

    def judged(self, model: ir.Model, session: ort.InferenceSession) -> ort.InferenceSession:
        """What a result is judged by: its session, or another one.

        That is where it draws numbers, or where values inside count as outputs.
        """
        if not self.draws and not self._at:
            return session
        model = self._steady(self.giving_out(model))
        return self._opener.made(model, "the result", provider=self.provider)

    def giving_out(self, model: ir.Model) -> ir.Model:
        """A result, or a copy of it that gives out the values inside that count as outputs."""
        if not self._at:
            return model
        copy = model.clone()
        give_out(copy, self._at)
        return copy

    def open(self, path: Path) -> ort.InferenceSession:
        """A session of a result on the same provider."""
        what = "the result"
        self._opener.rehearse(path, self.samples.feeds[0], what=what, provider=self.provider)
        session = self._opener.open(path, provider=self.provider)
        self._note_nodes(session, what)
        return session

    def alone(self, model: bytes, feed: Feed) -> ort.InferenceSession:
        """A session of one layer on the same provider, which a child has run on the feed."""
        return self._opener.alone(model, feed, self.provider)

    def loads(self, path: Path) -> str | None:
        """Load another model, without running it; what to say if the original does not load.

        Raises:
            InputError: the original loads and this one does not.
        """
        try:
            self._opener.rehearse(path, what="the result")  # as a user would load it
            self._opener.open(path, optimize=False)
        except InputError as error:
            try:
                _ = self.original
            except InputError:
                return f"ONNX Runtime loads neither the input nor the result: {error}"
            raise
        return None

    def differs(self, path: Path) -> str | None:
        """What is wrong with a model that should compute the same as the original; or None."""
        if self.unavailable is not None:
            return "the simplified model cannot be compared with the original"
        try:
            feed = self.samples.feeds[0]
            self._opener.rehearse(path, feed, what="the simplified model")
            if self.draws or self._at:
                session = self._opener.made(self._steady(ir.load(path)), INSIDE)
                reference = self._opener.made(self._steady(self._judged), INSIDE)
            else:
                session, reference = self._opener.open(path), self._reference
            checks = compare_outputs(
                self._opener.run(reference, feed, "the original"),
                self._opener.run(session, feed, "the simplified model"),
                self.reading,
                self.reading.kept(feed),
            )
        except InputError as error:
            return str(error)
        types = {value.dtype for value in self._judged.graph.outputs}
        types |= {value.dtype for value in self._source.model.graph.initializers.values()}
        wrong = change(checks, types)
        return None if wrong is None else f"onnxsim {wrong}"

    def runner(self, model: ir.Model | onnx.ModelProto, *, optimize: bool = True) -> Runner:
        """A function from feeds to the outputs of a model made from the original."""
        if self.draws:
            model = ir.from_proto(model) if isinstance(model, onnx.ModelProto) else model
            model = self._steady(model)
        return self._opener.runner(model, optimize=optimize)

    def packed(self, model: ir.Model) -> bytes | None:
        """A model made from the original as the bytes that `runner` would load; None if too large.

        It goes with every part of the samples.
        """
        if stored_bytes(model) > SIZE_LIMIT:
            return None
        found: bytes = ir.to_proto(self._steady(model)).SerializeToString()
        return found

    def outputs(self, model: ir.Model) -> Feed:
        """Outputs of a model with the original's inputs on the first sample."""
        return self.runner(model, optimize=False)(self.samples.feeds[0])

    def check(self, candidate: ort.InferenceSession, advance: Advance) -> Check:
        """Outputs of a model against the original's on every sample."""
        with self._log.capture("running"):
            figures, damage, notes = run_check(
                self._judge_of_original,
                candidate,
                self.samples,
                provider=self.provider.full,
                reading=self.reading,
                progress=lambda _: advance(1),
            )
        self.notes.update(dict.fromkeys(notes))
        if computes_half(self._source.model) and not self.provider.half:
            self.notes[half_note([self.provider.title])] = None
        return Check(self.samples.source, len(self.samples.feeds), (figures,), damage)

    def damage(
        self, seen: Watched, before: ir.Model, after: ir.Model, advance: Advance
    ) -> float | None:
        """Mean damage of a model, where its outputs alone do not tell it."""
        runners = [self.runner(seen.opened(model)) for model in (before, after)]
        found = []
        for feed in self.samples.feeds:
            found.append(seen.damage(runners[0](feed), runners[1](feed), feed))
            advance(1)
        return mean_damage(found)

    @cached_property
    def mask(self) -> str | None:
        """The input that marks padding in all of the run: the one that was given, or found.

        Raises:
            InputError: the one that was given is no input, or the data do not fit the model.
        """
        found = chosen_mask(self.samples.feeds[0], self._settings.mask)
        if found is not None:
            self.notes[mask_note(found)] = None
        return found

    @cached_property
    def reading(self) -> Reading:
        """How the outputs are read in every comparison of the run."""
        return reading_of(self._judged, self.mask, at=self._at)

    def judge(self, candidate: ort.InferenceSession, metric: Metric) -> Judged:
        """A model by a metric, on the samples of the check."""
        runs = (
            Ran(
                feed,
                labels,
                self._opener.run(self._judge_of_original, feed, "the original"),
                self._opener.run(candidate, feed, "the result"),
            )
            for feed, labels in self.samples.labelled()
        )
        judged, notes = metric.judge(runs, self.reading)
        self.notes.update(dict.fromkeys(notes))
        return judged

    def time(self, candidate: ort.InferenceSession, pairs: int, advance: Advance) -> Latency | None:
        """Latency of a model against the original's, run in turns; none of an emulator."""
        if self.provider.emulated:
            self.notes[f"not timed: {self.provider.title} is emulated, its times mean nothing"] = (
                None
            )
            return None
        with self._log.capture("running"):
            return time_pair(
                self.original,
                candidate,
                self.samples.feeds,
                provider=self.provider.full,
                threads=self.threads,
                pairs=pairs,
                progress=lambda _: advance(1),
            )

    def _steady(self, model: ir.Model) -> ir.Model:
        """A model, or a copy of it with means in place of what it draws."""
        if not self.draws:
            return model
        copy = model.clone()
        steady(copy)
        return copy

    def _note_nodes(self, session: ort.InferenceSession, what: str) -> None:
        """Note which nodes the provider took, of the last session of a kind."""
        nodes = None if self.provider is CPU else assignment(session)
        if nodes is not None:
            self.notes.pop(self._assigned.pop(what, ""), None)
            text = assignment_text(nodes, self.provider.full, self.provider.title)
            self._assigned[what] = f"{what}: {text}"
            self.notes[self._assigned[what]] = None

    def _runs(self, feed: Feed) -> bool | None:
        """Whether the original runs on a feed, on the CPU; None where a child did not survive."""
        file, name = self._original_file, self._source.name
        try:
            return self._opener.attempt(file, feed, what=name, keep=True) is None
        except CrashError:
            return None


def _random_only() -> str:
    sizes = named("input_shapes")
    return f"(on random input; try real samples with {named('data')}, or sizes with {sizes})"
