"""The page of a trade-off curve."""

from __future__ import annotations

import math
from collections.abc import Sequence

from onnx_lowrank.compression.sweep_report import Point, SweepReport
from onnx_lowrank.phrases import counted, size
from onnx_lowrank.reports.charts import Mark, scatter
from onnx_lowrank.reports.frame import again, notes, page, section, table
from onnx_lowrank.reports.markup import Html, joined, name, tag
from onnx_lowrank.reports.texts import (
    change,
    count,
    file_name,
    percent,
    samples_of,
    sweep_sentence,
)

__all__ = ["sweep_page"]


def sweep_page(report: SweepReport) -> str:
    """The page of a trade-off curve."""
    model = file_name(report.input)
    return page(
        f"sweep: {model}",
        report.tool,
        sweep_sentence(report),
        joined(["sweep ", name(model)]),
        [
            _curves(report),
            _points(report),
            notes(("missed", report.missed), ("note", report.notes)),
            again(report.origin, [] if report.file is None else [report.file], report.settings),
        ],
    )


def _curves(report: SweepReport) -> Html | None:
    finite = [point for point in report.points if math.isfinite(point.error)]
    if not finite:
        return None
    marks = [Mark(point.bytes / 1e6, point.error, f"{point.keep:g}") for point in finite]
    parts = [tag("figure", scatter(marks, "MB", "error of the worst output"))]
    timed = [
        Mark(point.speedup, point.error, f"{point.keep:g}", point.certain)
        for point in finite
        if point.speedup is not None and point.certain is not None
    ]
    if timed:
        threads = counted(report.threads, "thread")
        across = f"times as fast ({report.provider}, {threads})"
        parts.append(tag("figure", scatter(timed, across, "error of the worst output")))
    return section(
        "Trade-off",
        tag("div", *parts, class_="figures"),
        lead=f"A point is labelled with the share of linear parameters that it keeps. Errors are "
        f"mean relative L2 on {samples_of(report.samples, report.data)}.",
    )


def _points(report: SweepReport) -> Html:
    first = report.points[0].bytes if report.points else 0
    rows: list[Sequence[Html | str]] = []
    for point in report.points:
        typed = "" if point.command is None else tag("code", point.command, class_="command")
        rows.append(
            (
                f"{point.keep:g}",
                size(point.bytes),
                change(first, point.bytes),
                "" if point.macs is None else count(point.macs),
                _speed(point),
                percent(point.error),
                "" if point.cosine is None else f"{point.cosine:.5f}",
                "" if point.loss is None else f"{point.loss:.3g}",
                typed,
            )
        )
    head = ["Keep", "Size", "Change", "MACs", "Speed", "Error", "Cosine", "Loss", "Command"]
    if report.metric is None:
        head.remove("Loss")
        rows = [(*row[:7], row[8]) for row in rows]
    return section("Points", table(head, rows, text=("Command",)))


def _speed(point: Point) -> str:
    if point.speedup is None or point.certain is None:
        return ""
    low, high = point.certain
    noisy = point.verdict == "too noisy to tell"
    return f"{'too noisy' if noisy else f'{point.speedup:.2f}×'} ({low:.2f}–{high:.2f})"
