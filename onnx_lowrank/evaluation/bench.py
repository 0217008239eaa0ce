"""``bench``: latency, memory and deterministic costs of models on several targets."""

from __future__ import annotations

import csv
import io
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from onnx_lowrank.errors import named
from onnx_lowrank.evaluation.subjects import Subjects
from onnx_lowrank.numerics.intervals import kept_values, median_interval
from onnx_lowrank.progress import Progress, Stages
from onnx_lowrank.runtime.assignment import nodes_elsewhere
from onnx_lowrank.schema.json_report import File, Origin, TargetsReport, tool_name
from onnx_lowrank.schema.measures import Verdict, verdict_of
from onnx_lowrank.targets.base import Job, Outcome, Target, outcome_text

__all__ = [
    "BenchReport",
    "ModelBench",
    "Noise",
    "Ratio",
    "TargetBench",
    "bench_models",
    "missed_speedup",
]

_LEVEL = 0.95
_QUIET, _NOISY = 0.05, 0.2


@dataclass(frozen=True)
class ModelBench:
    """One model on one target; times in milliseconds, None where there are none.

    Attributes:
        model: its file.
        error: why it did not run; None if it did.
        runs: how many runs were timed.
        median_ms: half of the runs took at most this long.
        p90_ms: nine tenths of them.
        p99_ms: 99 of 100 of them.
        load_ms: until the session was there.
        first_ms: the first run, which allocates and compiles.
        peak_bytes: largest resident memory of a process that only loads and runs this model.
        nodes: provider -> names of the nodes that it ran; None where the target does not tell.
        assignment: the same in a sentence; "" where it is not known.
        elsewhere: how many nodes the target left to the CPU; None where it does not tell.
        costs: deterministic costs by name.
        certain_ms: 95 % confidence interval of the median, from order statistics.
        runs_ms: the runs, rising; of more than 256 so many, evenly chosen.
    """

    model: str
    error: str | None
    runs: int
    median_ms: float | None
    p90_ms: float | None
    p99_ms: float | None
    load_ms: float | None
    first_ms: float | None
    peak_bytes: int | None
    nodes: Mapping[str, tuple[str, ...]] | None
    assignment: str
    elsewhere: int | None
    costs: Mapping[str, float]
    certain_ms: tuple[float, float] | None = None
    runs_ms: tuple[float, ...] = ()


@dataclass(frozen=True)
class Ratio:
    """How much faster one model is than another, round by round.

    Attributes:
        before: the first model.
        after: the second model.
        median: median of time(before) / time(after); above 1 the second is faster.
        low: lower end of the 95 % interval of that median.
        high: upper end.
        verdict: what that interval says, see `onnx_lowrank.schema.measures.verdict_of`.
    """

    before: str
    after: str
    median: float
    low: float
    high: float
    verdict: Verdict = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "verdict", verdict_of(self.low, self.high))


@dataclass(frozen=True)
class TargetBench:
    """All models on one target with one number of threads (None: the target's default)."""

    target: str
    emulated: bool
    threads: int | None
    models: tuple[ModelBench, ...]
    ratios: tuple[Ratio, ...]


@dataclass(frozen=True)
class Noise:
    """How quiet this machine was.

    Attributes:
        spread: quartile distance of the runs of a model over their median, the median of all
            models and targets; None where nothing was timed.
        load: load average of the last minute, None where the system does not tell.
        cores: processors.
    """

    spread: float | None
    load: float | None
    cores: int

    def __str__(self) -> str:
        """One line."""
        if self.spread is None:
            return "noise: nothing was timed"
        word = "quiet" if self.spread < _QUIET else "noisy" if self.spread > _NOISY else "fair"
        busy = "" if self.load is None else f"; load {self.load:.1f} on {self.cores} processors"
        return (
            f"noise: {word}, the middle half of the runs of a model lies within "
            f"{100 * self.spread:.0f} % of its median{busy}"
        )


@dataclass(frozen=True)
class BenchReport(TargetsReport):
    """What `bench_models` found; also the schema of the JSON report of ``bench``.

    Attributes:
        tool: name and version of the program.
        data: "random", or the path of the samples.
        shapes: input -> sizes of the first sample.
        targets: one entry for each target and number of threads.
        noise: how quiet the machine was.
        notes: what else the user should know.
        files: the models.
        origin: what it takes to do it again; None where it was not kept.
        missed: the limit that was missed, or None.
    """

    tool: str
    data: str
    shapes: Mapping[str, tuple[int, ...]]
    targets: tuple[TargetBench, ...]
    noise: Noise
    notes: tuple[str, ...]
    files: tuple[File, ...] = ()
    origin: Origin | None = None
    missed: str | None = None

    def to_csv(self) -> str:
        """One row for each model on each target; ratios are against the first model."""
        costs = sorted(
            {name for entry in self.targets for model in entry.models for name in model.costs}
        )
        times = ["runs", "median_ms", "p90_ms", "p99_ms", "load_ms", "first_ms", "peak_bytes"]
        head = ["target", "emulated", "threads", "model", *times]
        head += ["ratio", "ratio_low", "ratio_high", "elsewhere", *costs, "error"]
        text = io.StringIO()
        writer = csv.DictWriter(text, head, lineterminator="\n")
        writer.writeheader()
        for entry in self.targets:
            first = entry.models[0].model
            for number, model in enumerate(entry.models):
                row: dict[str, object] = {
                    "target": entry.target,
                    "emulated": entry.emulated,
                    "threads": entry.threads,
                    "model": model.model,
                    "elsewhere": model.elsewhere,
                    "error": model.error,
                    **{name: getattr(model, name) for name in times},
                    **model.costs,
                }
                for ratio in entry.ratios:
                    if number and (ratio.before, ratio.after) == (first, model.model):
                        row |= {
                            "ratio": ratio.median,
                            "ratio_low": ratio.low,
                            "ratio_high": ratio.high,
                        }
                writer.writerow(row)
        return text.getvalue()


def bench_models(
    subjects: Subjects,
    targets: Sequence[Target],
    *,
    threads: Sequence[int | None],
    iterations: int,
    warmup: int,
    strict: bool,
    min_speedup: float | None = None,
    progress: Progress,
) -> BenchReport:
    """Time models in turns on every target with every number of threads.

    Args:
        subjects: the models, the reference first, and the samples.
        targets: where.
        threads: intra-op threads; None for a target's default.
        iterations: timed runs of each model.
        warmup: runs before.
        strict: whether a node that a target leaves to the CPU is an error there.
        min_speedup: what the last model has to reach against the first, on every target.
        progress: shows the stages.

    Raises:
        InputError: a target cannot be reached.
    """
    files = [subject.file for subject in subjects.models]
    names = [subject.name for subject in subjects.models]
    notes: dict[str, None] = dict.fromkeys(subjects.notes)
    stages = Stages(progress)
    entries, spreads = [], []
    for target, count in itertools.product(targets, threads):
        job = Job(outputs=False, iterations=iterations, warmup=warmup, threads=count, strict=strict)
        several = f"{count or 'default'} threads" if len(threads) > 1 else ""
        stages.plan([target.name for target in targets], several)
        with stages(target.name, iterations + len(files)) as advance:
            outcomes = target.run(files, subjects.samples.feeds, job, advance)
        for outcome in outcomes:
            notes.update(dict.fromkeys(f"{target.name}: {note}" for note in outcome.notes))
        models = tuple(
            _model(target, name, outcome) for name, outcome in zip(names, outcomes, strict=True)
        )
        ratios = () if target.emulated else _ratios(names, outcomes)
        entries.append(TargetBench(target.name, target.emulated, count, models, ratios))
        if not target.emulated:
            spreads += [_spread(outcome) for outcome in outcomes if outcome.times_ns]
        else:
            notes[f"{target.name} is emulated: its times mean nothing and are not shown"] = None
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    spread = float(np.median(spreads)) if spreads else None
    return BenchReport(
        tool=tool_name(),
        data=subjects.samples.source,
        shapes=subjects.samples.shapes,
        targets=tuple(entries),
        noise=Noise(spread, load, os.cpu_count() or 1),
        notes=tuple(notes),
        files=tuple(subject.source.described for subject in subjects.models),
        missed=missed_speedup(entries, names, min_speedup),
    )


def missed_speedup(
    entries: Sequence[TargetBench], names: Sequence[str], limit: float | None
) -> str | None:
    """What is surely slower than the limit, or cannot be judged for want of times; else None.

    Args:
        entries: the targets.
        names: the models; the last one has to reach the limit against the first.
        limit: the smallest speedup; None for no limit.
    """
    if limit is None:
        return None
    first, last = names[0], names[-1]
    for entry in entries:
        ratio = next((r for r in entry.ratios if (r.before, r.after) == (first, last)), None)
        if ratio is None:
            return f"{entry.target}: no times that {named('min_speedup', limit)} could judge"
        if ratio.high < limit:
            return (
                f"{entry.target}: {last} is {ratio.median:.2f}× as fast as {first} (95 % interval "
                f"{ratio.low:.2f}× to {ratio.high:.2f}×), less than {named('min_speedup', limit)}"
            )
    return None


def _model(target: Target, name: str, outcome: Outcome) -> ModelBench:
    timed = outcome.times_ns and not target.emulated
    times = np.array(outcome.times_ns if timed else (), np.float64) / 1e6
    quantiles = (
        [float(q) for q in np.percentile(times, [50, 90, 99])] if timed else [None, None, None]
    )
    certain = median_interval(times, _LEVEL)[1:] if timed else None
    own = target.own
    elsewhere = None
    if outcome.nodes is not None and own is not None:
        elsewhere = len(nodes_elsewhere(outcome.nodes, own))
    return ModelBench(
        model=name,
        error=outcome.error,
        runs=len(outcome.times_ns) if timed else 0,
        median_ms=quantiles[0],
        p90_ms=quantiles[1],
        p99_ms=quantiles[2],
        load_ms=_milliseconds(target, outcome.load_ns),
        first_ms=_milliseconds(target, outcome.first_ns),
        peak_bytes=outcome.peak_bytes,
        nodes=outcome.nodes,
        assignment=outcome_text(target, outcome),
        elsewhere=elsewhere,
        costs=dict(outcome.costs),
        certain_ms=certain,
        runs_ms=kept_values(times),
    )


def _milliseconds(target: Target, nanoseconds: int | None) -> float | None:
    return None if nanoseconds is None or target.emulated else nanoseconds / 1e6


def _ratios(names: Sequence[str], outcomes: Sequence[Outcome]) -> tuple[Ratio, ...]:
    """Of every two models; rounds are paired, so both must have all of them."""
    found = []
    for (a, first), (b, second) in itertools.combinations(zip(names, outcomes, strict=True), 2):
        if first.times_ns and len(first.times_ns) == len(second.times_ns):
            before = np.maximum(np.array(first.times_ns, np.float64), 1.0)  # a clock may stand
            after = np.maximum(np.array(second.times_ns, np.float64), 1.0)
            found.append(Ratio(a, b, *median_interval(before / after, _LEVEL)))
    return tuple(found)


def _spread(outcome: Outcome) -> float:
    low, middle, high = np.percentile(np.array(outcome.times_ns, np.float64), [25, 50, 75])
    return float((high - low) / max(middle, 1.0))
