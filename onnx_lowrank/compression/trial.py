"""Trial: the original in ONNX Runtime, and other models run against it on the same samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime as ort

from onnx_lowrank.compression.original import Original
from onnx_lowrank.compression.sample_split import SampleSplit
from onnx_lowrank.compression.settings import Settings
from onnx_lowrank.data.declared import input_specs
from onnx_lowrank.data.joining import APART, Joining
from onnx_lowrank.data.mask import chosen_mask, mask_note
from onnx_lowrank.data.samples import Samples
from onnx_lowrank.data.shapes import concrete_shapes
from onnx_lowrank.errors import InputError, named
from onnx_lowrank.evaluation.halves import computes_half, half_note
from onnx_lowrank.evaluation.joinable import joinable
from onnx_lowrank.evaluation.metrics import Metric, Ran
from onnx_lowrank.evaluation.outputs import MeanDamage, compare_outputs, mean_damage, run_check
from onnx_lowrank.evaluation.reading import Reading, reading_of
from onnx_lowrank.evaluation.unchanged import change
from onnx_lowrank.evaluation.watched import Watched
from onnx_lowrank.graph.draws import drawing, steady
from onnx_lowrank.graph.load import LoadedModel
from onnx_lowrank.graph.simplify import SIZE_LIMIT
from onnx_lowrank.graph.walk import stored_bytes
from onnx_lowrank.numerics.arrays import Feed
from onnx_lowrank.phrases import listed
from onnx_lowrank.progress import Advance
from onnx_lowrank.runtime.assignment import assignment, assignment_text
from onnx_lowrank.runtime.log import OrtLog
from onnx_lowrank.runtime.memory import Memory
from onnx_lowrank.runtime.opener import INSIDE, Opener
from onnx_lowrank.runtime.providers import CPU, resolve_provider
from onnx_lowrank.runtime.taps import Runner, give_out
from onnx_lowrank.runtime.timing import time_pair
from onnx_lowrank.schema.measures import Check, Judged, Latency

__all__ = ["Trial"]

# Samples of one run, at most, and the memory that they may take together: with more at once, or
# where one takes that much already, rows are enough to reuse weights, and nothing is saved.
_TOGETHER, _TOGETHER_BYTES = 8, 1 << 28


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
        self.memory = Memory.of(settings.memory_limit, folder)
        self._opener = Opener(folder, settings.threads, log, self.notes, self.memory)
        self._original = Original(
            source,
            settings,
            folder,
            self._opener,
            self.provider,
            lambda session: self._note_nodes(session, "the original"),
        )
        self.split = SampleSplit(source.model, settings, self._original.runs, self.notes)

    @property
    def threads(self) -> int:
        """Intra-op threads."""
        return self._opener.threads

    @property
    def refused(self) -> str | None:
        """Why ONNX Runtime does not load the original on the CPU; None if it does."""
        return self._original.refused

    @cached_property
    def unavailable(self) -> str | None:
        """Why ONNX Runtime cannot run the original on its samples; None if it can.

        Raises:
            As `Original.unavailable`.
        """
        return self._original.unavailable(self.split, self.memory, self.notes)

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

    @property
    def _judge_of_original(self) -> ort.InferenceSession:
        """What others are judged against, on the provider."""
        return self._made_judge if self.draws or self._at else self._original.session

    @cached_property
    def _made_judge(self) -> ort.InferenceSession:
        """The original without draws, which gives out what counts as an output."""
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
                _ = self._original.session
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
                session, reference = self._opener.open(path), self._original.on_cpu
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
        self._original.rest()
        if self.draws:
            model = ir.from_proto(model) if isinstance(model, onnx.ModelProto) else model
            model = self._steady(model)
        return self._opener.runner(model, optimize=optimize)

    def rest(self) -> None:
        """Close what nobody uses during work that holds much, where the user's limit is near."""
        self._original.rest()
        self._opener.rest()

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

    def check(
        self, candidate: ort.InferenceSession, advance: Advance, seen: Watched | None = None
    ) -> Check:
        """Outputs of a model against the original's on every sample.

        Args:
            candidate: the model.
            advance: called with 1 for every sample.
            seen: what the damage is told by, of outputs alone; default: all outputs alike.
        """
        with self._log.capture("running"):
            figures, damage, notes = run_check(
                self._judge_of_original,
                candidate,
                self.samples,
                provider=self.provider.full,
                reading=self.reading,
                progress=lambda _: advance(1),
                damage=None if seen is None else seen.damage,
            )
        self.notes.update(dict.fromkeys(notes))
        if computes_half(self._source.model) and not self.provider.half:
            self.notes[half_note([self.provider.title])] = None
        return Check(
            self.samples.source, len(self.samples.feeds), (figures,), damage.mean, damage.error
        )

    def damage(
        self, seen: Watched, before: ir.Model, after: ir.Model, advance: Advance
    ) -> MeanDamage:
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
    def joining(self) -> Joining:
        """How the samples go together in runs that nobody times; see `joinable`."""
        fitted = self.split.calibration
        feeds = (self.samples if fitted is None else fitted).feeds
        if self.draws or self.unavailable is not None:
            return APART
        session, memory, taken = self._original.on_cpu, self.memory, self._original.taken
        return joinable(
            self._source.model,
            feeds,
            self.reading,
            lambda feed: self._opener.run(session, feed, self._source.name),
            lambda: memory.times(taken, min(_TOGETHER, _TOGETHER_BYTES // max(taken or 1, 1))),
        )

    def joined(self, times: int) -> Joining:
        """The same for work that holds about so many times what a plain run takes."""
        joining, taken = self.joining, self._original.taken
        each = None if taken is None else times * taken
        return replace(joining, size=max(1, self.memory.times(each, joining.size)))

    @cached_property
    def reading(self) -> Reading:
        """How the outputs are read in every comparison of the run."""
        found = reading_of(self._judged, self.mask, at=self._at)
        if len(found.cache) > 1 and not self._settings.metric_used.of_classes:
            self.notes[
                f"{listed(sorted(found.cache), 2)} are a cache: together they count as one output; "
                f"with {named('metric', 'kl')} only classes count"
            ] = None
        return found

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
                self._original.session,
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
