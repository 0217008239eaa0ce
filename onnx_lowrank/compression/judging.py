"""Public functions on models that are there: compare, time, and ask targets about them.

As in `onnx_lowrank.compression.api` the arguments are written by ``tools/write_options.py``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from onnx_lowrank.compression import verbs
from onnx_lowrank.compression.origin import origin_of
from onnx_lowrank.data.sources import SampleSource
from onnx_lowrank.errors import UsageError, named
from onnx_lowrank.evaluation.bench import BenchReport, bench_models
from onnx_lowrank.evaluation.check import CheckReport, check_models, open_targets
from onnx_lowrank.evaluation.metrics import Metric, Score
from onnx_lowrank.evaluation.subjects import SampleOptions, open_subjects
from onnx_lowrank.files import Output, workspace
from onnx_lowrank.graph.load import ModelLike
from onnx_lowrank.progress import Progress, Silent, Stages
from onnx_lowrank.ranks.goals import size_of
from onnx_lowrank.runtime.rehearsal import with_custom_ops
from onnx_lowrank.runtime.session import OrtLog
from onnx_lowrank.targets import all_offers
from onnx_lowrank.targets.base import Offer
from onnx_lowrank.targets.support import SupportReport, support_of

__all__ = ["bench", "check", "providers", "support"]


def check(
    before: ModelLike,
    after: ModelLike,
    *,
    targets: Sequence[str] = ("cpu",),
    data: SampleSource | None = None,
    samples: int = 16,
    seed: int = 0,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    dims: Mapping[str, int] | None = None,
    fix_shapes: bool = False,
    strict: bool = False,
    custom_ops: Sequence[str | os.PathLike[str]] = (),
    mask: str | None = None,
    judge_at: Sequence[str] = (),
    metric: str | Score | None = None,
    labels: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    max_error: float | None = None,
    max_size: int | str | None = None,
    progress: Progress | None = None,
    log: OrtLog | None = None,
    outputs: Sequence[Output] = (),
) -> CheckReport:
    """Compare the outputs of a model with another's on every target, and each with the CPU.

    Args:
        before: the reference, as for `compress`.
        after: the other model, with the same inputs.
        targets: where to run, as providers lists it.
        data: samples, as in the main job. A mapping from inputs to arrays is read as an .npz is; an
            iterable, such as a list or a DataLoader, gives one feed at a time, of which the first
            ones are taken. Default: seeded random input.
        samples: how many samples to use.
        seed: seed of random input and of the choice of samples.
        input_shapes: concrete shape of an input, to run the model with.
        dims: size of a symbolic dimension, to run the model with.
        fix_shapes: run copies whose inputs have fixed sizes, as QNN and NNAPI need.
        strict: a node that a target leaves to the CPU is an error.
        custom_ops: a library of custom operators that the model uses, which every session
            registers.
        mask: input whose zeros mark padding, which counts nowhere. Default: attention_mask.
        judge_at: a value inside both models, or a node of A, that is compared as an output is.
        metric: judge B by this as well: relative-l2, cosine, top1, kl, perplexity, or
            file.py:function, as in the main job. The function itself does as well.
        labels: labels of the samples for ``metric``: .npy, .npz, .txt or .csv. Default: in
            ``data``.
        threads: intra-op threads. Default: each target's own.
        max_error: exit 3 if the mean relative L2 error of an output is above, on any target. A
            function says so in the report's ``missed``.
        max_size: exit 3 if B is larger, with external data. A function says so in the report's
            ``missed``. A whole number is bytes; a text has a unit, such as '20MB'.
        progress: shows the stages; default: nothing is shown.
        log: collects ONNX Runtime's messages.
        outputs: what the caller writes of the result, checked before the work.

    Returns:
        The comparison; ``errors`` says what did not run, ``missed`` what is beyond a limit.

    Raises:
        InputError: a model or the data are not what they should be, or a target is not there.
        UsageError: an option is out of its range.
    """
    options = dict(locals())
    verbs.CHECK.check(options)
    opened = open_targets(targets, custom_ops=bool(custom_ops))
    judge = None if metric is None else Metric.parse(metric)
    if judge is not None:
        judge.load()
    given = SampleOptions(
        data,
        samples,
        seed,
        _shapes(input_shapes),
        dims or {},
        fix_shapes,
        tuple(judge_at),
        None if labels is None else Path(labels),
    )
    with workspace(None) as folder, with_custom_ops(custom_ops):
        subjects = open_subjects((before, after), given, folder, log or OrtLog(), outputs)
        found = check_models(
            subjects,
            opened,
            strict=strict,
            threads=threads,
            max_error=max_error,
            max_size=None if max_size is None else size_of(max_size),
            mask=mask,
            metric=judge,
            progress=progress or Silent(),
        )
    return replace(found, origin=origin_of(verbs.CHECK, options, (before, after)))


def bench(
    *models: ModelLike,
    targets: Sequence[str] = ("cpu",),
    data: SampleSource | None = None,
    samples: int = 16,
    seed: int = 0,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    dims: Mapping[str, int] | None = None,
    fix_shapes: bool = False,
    strict: bool = False,
    custom_ops: Sequence[str | os.PathLike[str]] = (),
    threads: Sequence[int] = (),
    iterations: int = 50,
    warmup: int = 5,
    min_speedup: float | None = None,
    progress: Progress | None = None,
    log: OrtLog | None = None,
    outputs: Sequence[Output] = (),
) -> BenchReport:
    """Time models in turns on every target, and measure their memory.

    Args:
        models: as for `compress`; ratios are to the first one.
        targets: where to run, as providers lists it.
        data: samples, as in the main job. A mapping from inputs to arrays is read as an .npz is; an
            iterable, such as a list or a DataLoader, gives one feed at a time, of which the first
            ones are taken. Default: seeded random input.
        samples: how many samples to use.
        seed: seed of random input and of the choice of samples.
        input_shapes: concrete shape of an input, to run the model with.
        dims: size of a symbolic dimension, to run the model with.
        fix_shapes: run copies whose inputs have fixed sizes, as QNN and NNAPI need.
        strict: a node that a target leaves to the CPU is an error.
        custom_ops: a library of custom operators that the model uses, which every session
            registers.
        threads: intra-op threads. Default: each target's own.
        iterations: timed runs of each model.
        warmup: runs of each model before.
        min_speedup: exit 3 if the last model is surely not so many times as fast as the first,
            which is by the whole 95 % interval, on any target. A function says so in the report's
            ``missed``.
        progress: shows the stages; default: nothing is shown.
        log: collects ONNX Runtime's messages.
        outputs: what the caller writes of the result, checked before the work.

    Returns:
        The times; ``errors`` says what did not run.

    Raises:
        InputError: a model or the data are not what they should be, or a target is not there.
        UsageError: an option is out of its range.
    """
    options = dict(locals())
    verbs.BENCH.check(options)
    if min_speedup is not None and len(models) < 2:
        raise UsageError(f"{named('min_speedup', min_speedup)}: expected at least two models")
    opened = open_targets(targets, custom_ops=bool(custom_ops))
    given = SampleOptions(data, samples, seed, _shapes(input_shapes), dims or {}, fix_shapes)
    with workspace(None) as folder, with_custom_ops(custom_ops):
        subjects = open_subjects(models, given, folder, log or OrtLog(), outputs)
        found = bench_models(
            subjects,
            opened,
            threads=tuple(threads) or (None,),
            iterations=iterations,
            warmup=warmup,
            strict=strict,
            min_speedup=min_speedup,
            progress=progress or Silent(),
        )
    return replace(found, origin=origin_of(verbs.BENCH, options, models))


def support(
    model: ModelLike,
    *,
    before: ModelLike | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    dims: Mapping[str, int] | None = None,
    progress: Progress | None = None,
    outputs: Sequence[Output] = (),
) -> SupportReport:
    """Which nodes of a model NNAPI, CoreML, XNNPACK, QNN, WebGPU and OpenVINO would take.

    Args:
        model: as for `compress`.
        before: the model that MODEL was made from, judged beside it.
        input_shapes: concrete shape of an input, to run the model with.
        dims: size of a symbolic dimension, to run the model with.
        progress: shows the stages; default: nothing is shown.
        outputs: what the caller writes of the result, checked before the work.

    Returns:
        What each provider takes, and which rule the other nodes break.

    Raises:
        InputError: a model cannot be read, or the sizes do not fit it.
        UsageError: an option is not of its type.
    """
    verbs.SUPPORT.check(locals())
    with Stages(progress or Silent())("look"):
        return support_of(model, before, _shapes(input_shapes), dims or {}, outputs)


def providers(*, progress: Progress | None = None) -> list[Offer]:
    """Where a model can be run: every target, usable here or not, and how to get the rest.

    Args:
        progress: shows the stages; default: nothing is shown.
    """
    with Stages(progress or Silent())("look"):
        return all_offers()


def _shapes(shapes: Mapping[str, Sequence[int]] | None) -> dict[str, tuple[int, ...]]:
    return {name: tuple(sizes) for name, sizes in (shapes or {}).items()}
