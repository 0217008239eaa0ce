"""The models that a verb compares or times, and the samples that all of them run on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from onnx_lowrank.data.declared import InputSpec, input_specs
from onnx_lowrank.data.runnable import runnable_shapes
from onnx_lowrank.data.samples import Samples, random_samples
from onnx_lowrank.data.sources import SampleSource, load_source, source_files
from onnx_lowrank.errors import CrashError, InputError, named
from onnx_lowrank.evaluation.inside import giving_out, inside_note, values_named
from onnx_lowrank.evaluation.ort_format import load_to_run
from onnx_lowrank.files import Output, check_outputs
from onnx_lowrank.graph.fixed import fix_shapes
from onnx_lowrank.graph.load import LoadedModel, ModelLike
from onnx_lowrank.graph.save import runnable_file, write
from onnx_lowrank.numerics.arrays import Feed
from onnx_lowrank.runtime.log import OrtLog
from onnx_lowrank.runtime.rehearsal import attempt, rehearse
from onnx_lowrank.runtime.session import open_session

__all__ = ["SampleOptions", "Subject", "Subjects", "open_subjects"]


@dataclass(frozen=True)
class SampleOptions:
    """What the models are run on.

    Attributes:
        data: the path of the samples; None for random input.
        samples: how many.
        seed: of random input, and of the choice among more.
        input_shapes: input -> concrete sizes.
        dims: symbolic dimension -> size.
        fix: whether copies are run whose inputs have the sizes of the samples.
        judge_at: values inside the models that count as outputs, or nodes of the first one.
        labels: file of the labels; None where they are among the data, or not needed.
    """

    data: SampleSource | None = None
    samples: int = 16
    seed: int = 0
    input_shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    dims: Mapping[str, int] = dataclasses.field(default_factory=dict)
    fix: bool = False
    judge_at: tuple[str, ...] = ()
    labels: Path | None = None


@dataclass(frozen=True, eq=False)
class Subject:
    """A model.

    Attributes:
        source: as it was given.
        judged: the model that is run: the same, or one that gives out values inside as well.
        file: its file, or that of a copy.
    """

    source: LoadedModel
    judged: ir.Model
    file: Path

    @property
    def name(self) -> str:
        """How it is called."""
        return self.source.name


@dataclass(frozen=True, eq=False)
class Subjects:
    """Models and their samples.

    Attributes:
        models: the first one is what the others are measured against.
        samples: their inputs.
        notes: what the user should know.
        at: values inside that count as outputs.
    """

    models: tuple[Subject, ...]
    samples: Samples
    notes: tuple[str, ...]
    at: tuple[str, ...] = ()


def open_subjects(
    models: Sequence[ModelLike],
    options: SampleOptions,
    folder: Path,
    log: OrtLog,
    outputs: Sequence[Output] = (),
) -> Subjects:
    """Load models that have the same inputs, and the samples for them.

    Args:
        models: the models; the first one is what the others are measured against.
        options: the samples.
        folder: for copies of models.
        log: collects ONNX Runtime's messages.
        outputs: what the caller writes of the result, checked before the work.

    Raises:
        InputError: a model cannot be read, two models have different inputs, the samples do not
            fit them, or a file cannot or must not be written.
    """
    sources = [load_to_run(model, log) for model in models]
    _refuse_what_needs_nodes(sources, options)
    _ = [source.described for source in sources]  # their digests are of the files that were read
    data = () if options.data is None else source_files(options.data)
    data = (*data, *(() if options.labels is None else (options.labels,)))
    check_outputs(outputs, (*(file for source in sources for file in source.files), *data))
    specs = _common_specs(sources)
    at = values_named(sources[0].model, options.judge_at)
    for source in sources[1:]:
        _look_inside(source, at)
    judged = [giving_out(source, at) for source in sources]
    files = []
    for number, model in enumerate(judged):
        place = folder / str(number)
        place.mkdir()
        files.append(runnable_file(model, place))
    first = sources[0].model
    # A dimension that another model fixes needs no size any more.
    left = {axis for spec in specs for axis in spec.shape or ()}
    fixed = {a for s in sources for spec in input_specs(s.model) for a in spec.shape or ()} - left
    dims = {name: size for name, size in options.dims.items() if name not in fixed}
    name = sources[0].name
    rehearse(files[0], what=name, threads=1)
    open_session(files[0], threads=1, log=log)

    def runs(feed: Feed) -> bool | None:
        try:
            return attempt(files[0], feed, what=name, threads=1, keep=True) is None
        except CrashError:
            return None

    shapes = runnable_shapes(
        runs, first, specs, options.input_shapes, dims, lengths=options.data is None
    )
    if options.data is None:
        notes = shapes.notes
        samples = random_samples(first, specs, shapes, count=options.samples, seed=options.seed)
    else:
        notes = ()
        samples = load_source(
            options.data,
            first,
            specs,
            shapes,
            limit=options.samples,
            seed=options.seed,
            labels=options.labels,
        )
    if options.fix:
        files = [_fixed(model, samples, folder / str(n)) for n, model in enumerate(judged)]
        sizes = ", ".join(f"{name} {list(shape)}" for name, shape in samples.shapes.items())
        notes = (*notes, f"copies with fixed inputs are run: {sizes}")
    subjects = (
        Subject(source, own.model, file)
        for source, own, file in zip(sources, judged, files, strict=True)
    )
    inside = (inside_note(at),) if at else ()
    notes = (*_objections(sources), *inside, *notes, *samples.notes)
    return Subjects(tuple(subjects), samples, notes, at)


def _refuse_what_needs_nodes(sources: Sequence[LoadedModel], options: SampleOptions) -> None:
    """Raise InputError where a copy would be made of a model whose nodes cannot be read."""
    changed = {"judge_at": bool(options.judge_at), "fix_shapes": options.fix}
    for source in sources:
        for name in [name for name, wanted in changed.items() if wanted and source.runs_only]:
            raise InputError(
                f"{named(name)}: expected .onnx models, {source.name} is in ONNX Runtime's own "
                "format, which cannot be changed"
            )


def _look_inside(source: LoadedModel, at: Sequence[str]) -> None:
    """Raise InputError where a value that the first model has inside is not in another one."""
    given = [v.name for v in source.model.graph.outputs]
    made = [v.name for node in source.model.graph for v in node.outputs]
    for name in at:
        if name not in made or name in given:
            where = "is an output there" if name in given else "no node there computes it"
            raise InputError(
                f"{named('judge_at', name)}: expected this value inside {source.name} too, {where}"
            )


def _objections(sources: Sequence[LoadedModel]) -> tuple[str, ...]:
    return tuple(
        f"onnx.checker rejects {source.name}: {source.objection}"
        for source in sources
        if source.objection is not None
    )


def _fixed(source: LoadedModel, samples: Samples, folder: Path) -> Path:
    model = source.model.clone()
    fix_shapes(model, samples.shapes)
    return write(model, folder, "fixed.onnx", "auto")[-1]


def _common_specs(sources: Sequence[LoadedModel]) -> tuple[InputSpec, ...]:
    """The inputs that all models have, with every size that one of them fixes."""
    first = sources[0]
    common = {spec.name: spec for spec in input_specs(first.model)}
    for source in sources[1:]:
        own = {spec.name: spec for spec in input_specs(source.model)}
        if set(own) != set(common):
            raise InputError(
                f"{first.name} and {source.name} have different inputs: "
                f"{_texts(common.values())} and {_texts(own.values())}"
            )
        for name, spec in own.items():
            merged = _merged(common[name], spec)
            if merged is None:
                raise InputError(
                    f"{first.name} and {source.name} have different inputs: "
                    f"{_texts([common[name]])} and {_texts([spec])}"
                )
            common[name] = merged
    return tuple(common.values())


def _merged(one: InputSpec, other: InputSpec) -> InputSpec | None:
    """What both declare of an input; None where they contradict each other."""
    if (one.dtype, one.kind) != (other.dtype, other.kind):
        return None
    if one.shape is None or other.shape is None:
        return one if other.shape is None else other
    if len(one.shape) != len(other.shape):
        return None
    axes = []
    for a, b in zip(one.shape, other.shape, strict=True):
        if isinstance(a, int) and isinstance(b, int) and a != b:
            return None
        axes.append(b if isinstance(b, int) else a)
    return dataclasses.replace(one, shape=tuple(axes))


def _texts(specs: object) -> str:
    assert not isinstance(specs, str)
    parts = []
    for spec in specs:  # type: ignore[attr-defined]
        axes = "?" if spec.shape is None else ", ".join(str(d or "?") for d in spec.shape)
        parts.append(f"{spec.name} {spec.dtype}[{axes}]")
    return "; ".join(parts) or "none"
