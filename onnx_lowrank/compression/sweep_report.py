"""The result of a sweep as plain values."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from onnx_lowrank.schema.json_report import File, JsonReport, Origin
from onnx_lowrank.schema.measures import Verdict

__all__ = ["Point", "SweepReport"]


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
        verdict: what that interval says, see `onnx_lowrank.schema.measures.verdict_of`.
        predicted_damage: of all pairs together, on the samples of the search, and where these leave
            it unsure on those that factors are fitted to as well.
        summed_damage: sum of the layers' damages, each measured alone.
        damage: achieved on the samples of the check: mean relative square error of the outputs.
        predicted_error: standard error of the predicted damage; None where one sample does not
            tell.
        damage_error: the same of the achieved one.
        error: mean relative L2 error of the worst output; NaN where none could be compared.
        cosine: of the worst output.
        loss: by the metric that was asked for; None without one.
        model: the file, where models are kept.
        command: what makes this model by itself; None for the model with all layers dense, and
            where a part of it is in memory.
    """

    keep: float
    bytes: int
    parameters: int
    linear_parameters: int
    macs: int | None
    speedup: float | None
    certain: tuple[float, float] | None
    verdict: Verdict | None
    predicted_damage: float | None
    summed_damage: float | None
    damage: float | None
    error: float
    cosine: float | None
    loss: float | None
    model: str | None
    command: str | None = None
    predicted_error: float | None = None
    damage_error: float | None = None


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
        file: the model.
        settings: the options of every point, but for the share to keep.
        origin: what it takes to do it again; None where it was not kept.
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
    file: File | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    origin: Origin | None = None

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
