"""What all stages of one run share: the input, the options, the trial runs, the notes."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from onnx_lowrank.compression.inlining import with_weights_in_sight
from onnx_lowrank.compression.settings import Settings
from onnx_lowrank.compression.trial import Trial
from onnx_lowrank.data.declared import input_specs
from onnx_lowrank.data.shapes import concrete_shapes
from onnx_lowrank.errors import InputError, named
from onnx_lowrank.evaluation.inside import giving_out, inside_note, values_named
from onnx_lowrank.graph.fingerprint import fingerprint
from onnx_lowrank.graph.fixed import fix_shapes
from onnx_lowrank.graph.load import LoadedModel
from onnx_lowrank.graph.validity import invalid
from onnx_lowrank.graph.wishes import WISHES
from onnx_lowrank.numerics.crew import HERE, Crew
from onnx_lowrank.phrases import listed
from onnx_lowrank.progress import Stages
from onnx_lowrank.ranks.probe import Probe
from onnx_lowrank.runtime.memory import Watch
from onnx_lowrank.runtime.pieces import Pieces
from onnx_lowrank.runtime.session import OrtLog

__all__ = ["Context"]


class Context:
    """One run.

    Attributes:
        source: the model that was given.
        at: values inside it that count as outputs.
        judged: the model that gives these out too, which all stages work on; they are taken back
            from what is written.
        inlined: whether calls of functions that give weights stand inlined in it.
        settings: the options.
        folder: a workspace that is removed at the end.
        stages: times and shows what is being done.
        log: collects ONNX Runtime's messages.
        crew: who works on layers.
        pieces: where finished work of an earlier run is; None: nowhere.
        trial: runs the original and others against it.
        notes: what the user should know.
        probe: a probe of the model for stages that ask the same of it; None before there is one,
            and where a limit of memory was given.
        until: time by `time.monotonic` after which no further step for accuracy begins; None
            without a limit.
    """

    def __init__(
        self,
        source: LoadedModel,
        settings: Settings,
        folder: Path,
        stages: Stages,
        log: OrtLog,
        crew: Crew = HERE,
        pieces: Pieces | None = None,
    ) -> None:
        self.pieces = pieces
        self.source, self.settings, self.folder = source, settings, folder
        self.stages, self.log = stages, log
        self.notes: dict[str, None] = {}
        limit = settings.time_limit_seconds
        self.until = None if limit is None else time.monotonic() + limit
        self.at = values_named(source.model, settings.judge_at)
        shown = with_weights_in_sight(source, constant_inputs=settings.constant_inputs)
        self.inlined = shown is not source
        self.judged = giving_out(shown, self.at)
        if self.at:
            self.say(inside_note(self.at))
        self.trial = Trial(source, settings, folder, log, self.judged.model, self.at)
        self.crew = replace(crew, room=self.trial.memory.planned)
        self.probe: Probe | None = None

    def keep(self, probe: Probe) -> Probe:
        """Keep a probe for later stages, where memory allows for it; gives it back."""
        self.probe = None if self.trial.memory.given else probe
        return probe

    def late(self) -> bool:
        """Whether the time limit has passed."""
        return self.until is not None and time.monotonic() >= self.until

    @cached_property
    def digest(self) -> str:
        """By what the input is known again: the hash of its files, or of a model in memory."""
        known = self.source.described.digest
        return f"graph:{fingerprint(self.source.model)}" if known is None else f"sha256:{known}"

    def say_exceeded(self, watch: Watch) -> None:
        """A note where more memory was held so far than the user's limit allows."""
        why = watch.exceeded()
        self.say(None if why is None else f"{named('memory', self.settings.memory)}: {why}")

    def say(self, note: str | None) -> None:
        """A note, each once."""
        if note is not None:
            self.notes[note] = None

    def question(self) -> None:
        """Say what onnx.checker has against the input.

        Raises:
            InputError: it has something, and ONNX Runtime does not load the model either.
        """
        objection, name = self.source.objection, self.source.name
        if objection is None:
            return
        with self.stages("prepare"):
            refused = self.trial.refused
        if refused is not None:
            raise InputError(f"{name}: expected a valid ONNX model; onnx.checker: {objection}")
        self.say(f"onnx.checker rejects the input, which ONNX Runtime loads: {objection}")

    def fixed_sizes(self) -> None:
        """Check that the sizes which the wanted shape fixes are sizes that the model takes.

        Raises:
            InputError: it does not take them.
        """
        settings, source = self.settings, self.source
        if settings.shape_for is None or not WISHES[settings.shape_for].fixed:
            return
        why = None
        if settings.check or settings.bench:
            with self.stages("prepare"):
                why = self.trial.unavailable
        shapes = concrete_shapes(input_specs(source.model), settings.input_shapes, settings.dims)
        assumed = [name for name, axes in shapes.assumed.items() if axes]
        if settings.data is not None or settings.calibration is not None:
            assumed = []  # the samples have sizes
        # What fails with all sizes given, or does not even load, fails for another reason.
        if why is None or not assumed or self.trial.refused is not None:
            copy = source.model.clone()
            fix_shapes(copy, self.trial.sizes)
            why = None if invalid(source.model) is not None else invalid(copy)
        if why is None:
            return
        sizes = ", ".join(f"{name} {list(sizes)}" for name, sizes in self.trial.sizes.items())
        guess = f" ({listed(assumed, 3)}: assumed)" if assumed else ""
        raise InputError(
            f"{source.name}: {named('shape_for', settings.shape_for)} fixes the inputs to {sizes}"
            f"{guess}, with which the model does not work; expected its sizes from {named('dims')} "
            f"or {named('input_shapes')}: {why}"
        )

    def runs(self) -> bool:
        """Whether the model can and may be run in ONNX Runtime; says why not."""
        settings = self.settings
        if not (settings.check or settings.bench):
            return False
        with self.stages("prepare"):
            unavailable = self.trial.unavailable
        if unavailable is None:
            return True
        if settings.max_error is not None:
            raise InputError(f"{named('max_error')} cannot be judged: {unavailable}")
        self.say(f"neither checked nor timed: {unavailable}")
        return False
