"""Sweep: the trade-off of size and speed against error, at several budgets in one run.

What does not depend on the budget, the statistics and the layers' damage, is measured once.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from onnx_lowrank.compression.candidates import Candidates
from onnx_lowrank.compression.context import Context
from onnx_lowrank.compression.places import read_files, side_outputs
from onnx_lowrank.compression.plan import searching_for
from onnx_lowrank.compression.prepare import prepare
from onnx_lowrank.compression.result import Destination
from onnx_lowrank.compression.settings import Settings
from onnx_lowrank.compression.summary import layers, totals
from onnx_lowrank.errors import InputError, UsageError
from onnx_lowrank.evaluation.metrics import Metric
from onnx_lowrank.evaluation.outputs import worst_error
from onnx_lowrank.files import Output, check_outputs, workspace
from onnx_lowrank.graph.load import load
from onnx_lowrank.graph.walk import elements
from onnx_lowrank.progress import Progress, Silent, Stages
from onnx_lowrank.ranks.budget_strategies import Keep
from onnx_lowrank.ranks.goals import Budget
from onnx_lowrank.ranks.macs import Macs
from onnx_lowrank.ranks.prepared import Prepared
from onnx_lowrank.ranks.search import Searching
from onnx_lowrank.ranks.strategy import Plan, Unreachable
from onnx_lowrank.report import JsonReport, tool_name
from onnx_lowrank.runtime.session import OrtLog

__all__ = ["SHARES", "Point", "SweepReport", "sweep"]

SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
"""Shares of the linear parameters that are kept unless others are asked for."""


@dataclass(frozen=True)
class Point:
    """One budget.

    Attributes:
        keep: share of the linear parameters asked for; 1 for the model with all layers dense.
        bytes: of the model, external data included.
        parameters: of the model.
        linear_parameters: of its linear layers.
        macs: multiply-accumulates of one inference; None if not counted.
        speedup: median ratio of the original's latency to the model's; None if not timed.
        certain: 95 % interval of that median.
        predicted_damage: of all pairs together, on the samples of the search.
        summed_damage: sum of the layers' damages, each measured alone.
        damage: achieved on the samples of the check: mean relative square error of the outputs.
        error: mean relative L2 error of the worst output.
        cosine: of the worst output.
        loss: by the metric that was asked for; None without one.
        model: the file, where models are kept.
    """

    keep: float
    bytes: int
    parameters: int
    linear_parameters: int
    macs: int | None
    speedup: float | None
    certain: tuple[float, float] | None
    predicted_damage: float | None
    summed_damage: float | None
    damage: float | None
    error: float
    cosine: float
    loss: float | None
    model: str | None


@dataclass(frozen=True)
class SweepReport(JsonReport):
    """A sweep.

    Attributes:
        tool: name and version of the program.
        input: the model file; None for one in memory.
        metric: of the losses, or None.
        data: what the errors were measured on: "random" or a path.
        samples: how many samples.
        provider: execution provider of check and timing.
        threads: intra-op threads.
        points: by falling share.
        missed: budgets that cannot be had, and why.
        notes: what else the user should know.
    """

    tool: str
    input: str | None
    metric: str | None
    data: str
    samples: int
    provider: str
    threads: int
    points: tuple[Point, ...]
    missed: tuple[str, ...]
    notes: tuple[str, ...]

    def to_csv(self) -> str:
        """One line for each point."""
        text = io.StringIO()
        names = [field.name for field in dataclasses.fields(Point)]
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(names)
        for point in self.points:
            row = dataclasses.asdict(point)
            row["certain"] = "" if point.certain is None else "–".join(map(str, point.certain))
            writer.writerow(["" if row[name] is None else row[name] for name in names])
        return text.getvalue()


def sweep(
    model: str | os.PathLike[str] | onnx.ModelProto | ir.Model,
    *,
    shares: Sequence[float] = SHARES,
    metric: str | None = None,
    models: str | os.PathLike[str] | None = None,
    force: bool = False,
    progress: Progress | None = None,
    log: OrtLog | None = None,
    outputs: Sequence[Output] = (),
    **options: Any,
) -> SweepReport:
    """Compress a model at several budgets.

    Args:
        model: a path, a protobuf or an `onnx_ir.Model`; it is not changed.
        shares: of the linear layers' parameters to keep, each in (0, 1].
        metric: a further measure of the loss, as for `compress`.
        models: folder for the models, ``keep-0.80.onnx`` and so on; None keeps none.
        force: overwrite models there.
        progress: shows the stages.
        log: collects ONNX Runtime's messages.
        outputs: what the caller writes of the curve, checked with the rest before the work.
        options: of `onnx_lowrank.compress`, but for goals.

    Raises:
        InputError: the model or the data are not what they should be, the model does not run, or
            a file cannot or must not be written.
        UsageError: an option is out of its range.
    """
    if not shares:
        raise UsageError("--budgets: expected at least one share to keep")
    budgets = [Settings(keep=share).budget for share in sorted(set(shares), reverse=True)]
    settings = Settings(keep=float(shares[0]), **options)
    stages = Stages(progress or Silent())
    with stages("load"):
        source = load(model)
    inputs = read_files(source, settings, metric)
    places = {}
    if models is not None:
        shown = (1.0, *(budget.value for budget in budgets if budget is not None))
        places = {keep: Destination(_model_path(Path(models), keep), force=force) for keep in shown}
    check_outputs(
        [*(place.output for place in places.values()), *side_outputs(settings), *outputs], inputs
    )
    with workspace(None if models is None else Path(models)) as folder:
        context = Context(source, settings, folder, stages, log or OrtLog())
        prepared = prepare(context)
        if not context.runs():
            why = context.trial.unavailable or "neither check nor timing may run it"
            raise InputError(f"sweep needs a model that runs: {why}")
        searching = searching_for(context, prepared)
        judged = Metric.parse(metric) if metric else None
        work = _Sweep(context, prepared, judged, places, inputs)
        points, missed = [work.point(1.0, searching.plan(None, None))], []
        for budget in budgets:
            assert budget is not None
            try:
                points.append(work.point(budget.value, _planned(searching, budget)))
            except Unreachable as error:
                missed.append(str(error))
        samples = context.trial.samples
        return SweepReport(
            tool=tool_name(),
            input=None if source.path is None else str(source.path),
            metric=metric,
            data=samples.source,
            samples=len(samples.feeds),
            provider=context.trial.provider.full,
            threads=context.trial.threads,
            points=tuple(points),
            missed=tuple(missed),
            notes=(*context.notes, *context.trial.notes),
        )


def _model_path(folder: Path, keep: float) -> Path:
    return folder / f"keep-{keep:.2f}.onnx"


def _planned(searching: Searching, budget: Budget) -> Plan:
    return Keep(searching, budget).first()


class _Sweep:
    """Makes the points."""

    def __init__(
        self,
        context: Context,
        prepared: Prepared,
        metric: Metric | None,
        places: Mapping[float, Destination],
        inputs: tuple[Path, ...],
    ) -> None:
        self._context, self._metric = context, metric
        self._candidates = Candidates(context, prepared)
        self._places, self._inputs = places, inputs
        self._macs: Macs | None = prepared.macs

    def point(self, keep: float, plan: Plan) -> Point:
        """Assemble and measure one budget."""
        destination = self._places.get(keep)
        found = self._candidates.make(plan, self._metric, destination, heal=True)
        check = self._candidates.check()
        assembled, latency = found.assembled, found.measured.latency
        rows = layers(assembled.decisions, assembled.errors, self._macs)
        parameters = elements(assembled.model)
        sums = totals(assembled.decisions, rows, self._macs, parameters, parameters)
        outputs = [output for provider in check.providers for output in provider.outputs]
        if destination is not None:
            destination.commit(assembled.files, self._inputs)
        return Point(
            keep=keep,
            bytes=found.measured.bytes,
            parameters=parameters,
            linear_parameters=sums.linear_parameters_after,
            macs=sums.macs_after,
            speedup=None if latency is None else latency.speedup.median,
            certain=None if latency is None else latency.speedup.certain,
            predicted_damage=plan.damage,
            summed_damage=plan.summed,
            damage=check.damage,
            error=worst_error(check.providers)[1],
            cosine=min((output.cosine for output in outputs), default=1.0),
            loss=found.measured.loss,
            model=None if destination is None else str(destination.path),
        )
