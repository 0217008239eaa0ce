"""``check``: outputs of one model against another's on several targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from onnx_lowrank.data.mask import chosen_mask, mask_note
from onnx_lowrank.errors import InputError, UsageError, named
from onnx_lowrank.evaluation.halves import computes_half, half_note
from onnx_lowrank.evaluation.metrics import Metric, Ran
from onnx_lowrank.evaluation.outputs import Comparison, worst_error
from onnx_lowrank.evaluation.reading import Reading, reading_of
from onnx_lowrank.evaluation.subjects import Subject, Subjects
from onnx_lowrank.graph.face import differences
from onnx_lowrank.numerics.arrays import Feed
from onnx_lowrank.progress import Progress, Stages
from onnx_lowrank.schema.json_report import File, Origin, TargetsReport, tool_name
from onnx_lowrank.schema.measures import Judged, OutputCheck, ProviderCheck
from onnx_lowrank.targets import open_target
from onnx_lowrank.targets.base import (
    Job,
    Outcome,
    Target,
    outcome_text,
)
from onnx_lowrank.targets.local import LocalTarget

__all__ = ["CheckReport", "ModelOnTarget", "TargetCheck", "check_models", "open_targets"]

_CPU = "cpu"


@dataclass(frozen=True)
class ModelOnTarget:
    """One model on one target.

    Attributes:
        model: its file.
        error: why it did not run; None if it did.
        nodes: provider -> names of the nodes that it ran; None where the target does not tell.
        assignment: the same in a sentence; "" where it is not known.
        costs: deterministic costs by name.
        against_cpu: its outputs against its own on the CPU; empty where the target is the CPU.
    """

    model: str
    error: str | None
    nodes: Mapping[str, tuple[str, ...]] | None
    assignment: str
    costs: Mapping[str, float]
    against_cpu: tuple[OutputCheck, ...]


@dataclass(frozen=True)
class TargetCheck:
    """Two models on one target.

    Attributes:
        target: as the user wrote it.
        emulated: whether its times mean nothing.
        outputs: the second model against the first, both on this target; empty where one of them
            did not run.
        models: both models.
        judged: the second model by a metric; None without one, or where one of them did not run.
    """

    target: str
    emulated: bool
    outputs: tuple[OutputCheck, ...]
    models: tuple[ModelOnTarget, ...]
    judged: Judged | None = None


@dataclass(frozen=True)
class CheckReport(TargetsReport):
    """What `check_models` found; also the schema of the JSON report of ``check``.

    Attributes:
        tool: name and version of the program.
        models: the files, the reference first.
        data: "random", or the path of the samples.
        samples: how many were run.
        targets: one entry for each target.
        max_error: the limit that was set, or None.
        missed: what is beyond the limit, or None.
        notes: what else the user should know.
        files: the models, the reference first.
        origin: what it takes to do it again; None where it was not kept.
    """

    tool: str
    models: tuple[str, ...]
    data: str
    samples: int
    targets: tuple[TargetCheck, ...]
    max_error: float | None = None
    missed: str | None = None
    notes: tuple[str, ...] = field(default=())
    files: tuple[File, ...] = ()
    origin: Origin | None = None


def open_targets(names: Sequence[str], *, custom_ops: bool = False) -> tuple[Target, ...]:
    """The targets of these names, before any work is done.

    Args:
        names: of targets, each once.
        custom_ops: whether the models need libraries of custom operators, which are built for
            this machine.

    Raises:
        InputError: one is not there or cannot be used.
        UsageError: one is named twice.
    """
    for name in names:
        if names.count(name) > 1:
            raise UsageError(
                f"{named('targets', name)}: expected each target once, it is given twice"
            )
    found = tuple(open_target(name) for name in names)
    for target in found:
        if custom_ops and not isinstance(target, LocalTarget):
            raise InputError(
                f"{named('targets', target.name)}: expected a provider of this machine with "
                f"{named('custom_ops')}: a library of custom operators cannot be shipped"
            )
    return found


def check_models(
    subjects: Subjects,
    targets: Sequence[Target],
    *,
    strict: bool,
    threads: int | None,
    max_error: float | None,
    max_size: int | None = None,
    mask: str | None = None,
    metric: Metric | None = None,
    progress: Progress,
) -> CheckReport:
    """Run two models on every target and compare: with each other, and each with the CPU.

    Args:
        subjects: the reference, the other model, and the samples.
        targets: where.
        strict: whether a node that a target leaves to the CPU is an error there.
        threads: intra-op threads; None for each target's default.
        max_error: limit of the mean relative L2 error of every output, on every target.
        max_size: limit of the bytes of the second model, with external data.
        mask: the input that marks padding, where the user names one.
        metric: what the second model is judged by beside; None for nothing else.
        progress: shows the stages.

    Raises:
        InputError: a target cannot be reached, the models have different outputs, or the mask is
            no input.
    """
    files = [subject.file for subject in subjects.models]
    feeds = subjects.samples.feeds
    job = Job(outputs=True, strict=strict, threads=threads)
    stages = Stages(progress)
    stages.plan([target.name for target in targets])

    def run(target: Target) -> tuple[Outcome, ...]:
        with stages(target.name, len(files) * len(feeds)) as advance:
            return target.run(files, feeds, job, advance)

    cpu = next((target for target in targets if target.name == _CPU), None)
    reference = run(cpu if cpu is not None else open_target(_CPU))
    notes: dict[str, None] = dict.fromkeys(subjects.notes)
    first, other = subjects.models
    runs_only = first.source.runs_only or other.source.runs_only
    faces = differences(first.source.model, other.source.model, versions=not runs_only)
    notes.update(dict.fromkeys(f"{other.name} beside {first.name}: {face}" for face in faces))
    reading = reading_of(first.judged, chosen_mask(feeds[0], mask), at=subjects.at)
    if reading.mask is not None and reading.masked:
        notes[mask_note(reading.mask)] = None
    elif mask is not None:
        notes[f"{named('mask', mask)}: no output declares its axes, so that all rows count"] = None
    entries, halves = [], False
    for target in targets:
        outcomes = reference if target is cpu else run(target)
        for outcome in outcomes:
            halves = halves or (outcome.half is True and outcome.error is None)
            notes.update(dict.fromkeys(f"{target.name}: {note}" for note in outcome.notes))
        entry = _entry(target, subjects.models, outcomes, reference, feeds, reading, notes)
        if metric is not None and entry.outputs:
            entry = replace(entry, judged=_judged(metric, subjects, outcomes, reading, notes))
        entries.append(entry)
    if not halves and any(computes_half(subject.source.model) for subject in subjects.models):
        notes[half_note([target.name for target in targets])] = None
    return CheckReport(
        tool=tool_name(),
        models=tuple(subject.name for subject in subjects.models),
        data=subjects.samples.source,
        samples=len(feeds),
        targets=tuple(entries),
        max_error=max_error,
        missed=_missed(entries, max_error) or _too_large(other, max_size),
        notes=tuple(notes),
        files=tuple(subject.source.described for subject in subjects.models),
    )


def _entry(
    target: Target,
    models: Sequence[Subject],
    outcomes: Sequence[Outcome],
    reference: Sequence[Outcome],
    feeds: Sequence[Feed],
    reading: Reading,
    notes: dict[str, None],
) -> TargetCheck:
    after = models[1]

    def compared(a: Outcome, b: Outcome, what: str) -> tuple[OutputCheck, ...]:
        if a.error is not None or b.error is not None:
            return ()
        comparison = Comparison(reading, what)
        for feed, expected, found in zip(feeds, a.outputs, b.outputs, strict=True):
            comparison.add(expected, found, reading.kept(feed))
        notes.update(dict.fromkeys(f"{what}: {note}" for note in comparison.notes))
        return comparison.results()

    rows = tuple(
        ModelOnTarget(
            model=subject.name,
            error=outcome.error,
            nodes=outcome.nodes,
            assignment=outcome_text(target, outcome),
            costs=dict(outcome.costs),
            against_cpu=()
            if outcome is own
            else compared(own, outcome, f"{subject.name} on {target.name}"),
        )
        for subject, outcome, own in zip(models, outcomes, reference, strict=True)
    )
    outputs = compared(outcomes[0], outcomes[1], after.name)
    return TargetCheck(target.name, target.emulated, outputs, rows)


def _judged(
    metric: Metric,
    subjects: Subjects,
    outcomes: Sequence[Outcome],
    reading: Reading,
    notes: dict[str, None],
) -> Judged:
    """The second model by a metric, on one target."""
    before, after = outcomes
    runs = (
        Ran(feed, labels, original, own)
        for (feed, labels), original, own in zip(
            subjects.samples.labelled(), before.outputs, after.outputs, strict=True
        )
    )
    judged, found = metric.judge(runs, reading)
    notes.update(dict.fromkeys(found))
    return judged


def _missed(entries: Sequence[TargetCheck], limit: float | None) -> str | None:
    if limit is None:
        return None
    for entry in entries:
        if not entry.outputs and all(model.error is None for model in entry.models):
            return (
                f"{entry.target}: no output holds anything that could be compared "
                f"({named('max_error', limit)})"
            )
        name, error = worst_error([ProviderCheck(entry.target, entry.outputs)])
        if not error <= limit:
            return (
                f"{entry.target}: output {name!r} differs by {error:.3g} (mean relative L2), "
                f"more than {named('max_error', limit)}"
            )
    return None


def _too_large(model: Subject, limit: int | None) -> str | None:
    size = model.source.bytes
    if limit is None or size <= limit:
        return None
    return f"{model.name}: has {size:,} bytes, more than {named('max_size', limit)}"
