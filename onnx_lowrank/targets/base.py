"""What a target is: a place where models can be run, on this machine or another.

A target takes a job, several models on the same samples, and says for each model what it gave:
outputs, times, which nodes ran where, deterministic costs, or why it did not run.  Nothing falls
back silently: what a target does not run itself is named in `Outcome.nodes`.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from onnx_lowrank.numerics.arrays import Feed
from onnx_lowrank.phrases import counted
from onnx_lowrank.progress import Advance
from onnx_lowrank.runtime.assignment import PROVIDER_SUFFIX, assignment_text

__all__ = ["Job", "Offer", "Outcome", "Target", "outcome_text"]


@dataclass(frozen=True)
class Job:
    """What is wanted of every model.

    Attributes:
        outputs: whether the outputs of every sample are wanted.
        iterations: timed runs of each model, the models in turns, the order within a round
            changing; 0 does not time.
        warmup: runs of each model before, not timed, after a first one that is timed apart.
        threads: intra-op threads; None for the target's default.
        strict: whether a node that the target does not run itself is an error.
        seconds: longest time for the whole job; None for no limit.
    """

    outputs: bool = True
    iterations: int = 0
    warmup: int = 3
    threads: int | None = None
    strict: bool = False
    seconds: float | None = None


@dataclass(frozen=True, eq=False)
class Outcome:
    """One model on one target.

    Attributes:
        outputs: for each sample, output -> array; empty where not asked for.
        times_ns: nanoseconds of every timed run; place i of all models of a job is one round.
        load_ns: nanoseconds until the session was there.
        first_ns: nanoseconds of the first run.
        peak_bytes: largest resident memory of a process that only loads and runs this model.
        nodes: provider -> names of the nodes that it ran; None where the target does not tell.
        costs: deterministic costs by name, such as "instructions" or "context_bytes".
        error: why it did not run, in one line; the other fields then hold what was known before.
        notes: what else the user should know.
        half: whether float16 was computed in float16 (x86 turns it into float32 and so hides its
            error); None where that is not known.
    """

    outputs: tuple[Feed, ...] = ()
    times_ns: tuple[int, ...] = ()
    load_ns: int | None = None
    first_ns: int | None = None
    peak_bytes: int | None = None
    nodes: Mapping[str, tuple[str, ...]] | None = None
    costs: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None
    notes: tuple[str, ...] = ()
    half: bool | None = None


@dataclass(frozen=True)
class Offer:
    """What `onnx-lowrank providers` says of a target.

    Attributes:
        name: as the user writes it.
        usable: whether it can be used here and now.
        version: of what runs the models; None where it is not there.
        found: how it was found, or why it is not usable.
        times: "real", "emulated" (times mean nothing) or "remote".
        install: the command that installs it; None where there is none.
    """

    name: str
    usable: bool
    version: str | None
    found: str
    times: str
    install: str | None


class Target(abc.ABC):
    """A place where models can be run.

    Attributes:
        name: as the user wrote it.
        emulated: whether its times mean nothing.
        own: key of `Outcome.nodes` for the nodes that the target itself runs; None where it has
            no single one.
    """

    emulated: ClassVar[bool] = False
    own: str | None = None

    def __init__(self, name: str) -> None:
        self.name = name

    @abc.abstractmethod
    def run(
        self, models: Sequence[Path], feeds: Sequence[Feed], job: Job, advance: Advance
    ) -> tuple[Outcome, ...]:
        """Run a job; one outcome for each model, in their order.

        Args:
            models: model files; external data lie beside them.
            feeds: the samples, the same for all models.
            job: what is wanted.
            advance: called with 1 after each model or sample or timed round, as the target can.

        Raises:
            InputError: the target itself cannot be reached or used.  A model that it does not
                run is no exception but an `Outcome.error`.
        """


def outcome_text(target: Target, outcome: Outcome) -> str:
    """What an outcome tells of the nodes, in a sentence; "" where it tells nothing."""
    if outcome.nodes is None:
        return ""
    if target.own is not None:
        return assignment_text(outcome.nodes, target.own, target.own.removesuffix(PROVIDER_SUFFIX))
    counts = {name.removesuffix(PROVIDER_SUFFIX): len(n) for name, n in outcome.nodes.items()}
    return "; ".join(f"{counted(n, 'node')} on {name}" for name, n in counts.items())
