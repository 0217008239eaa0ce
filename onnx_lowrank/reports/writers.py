"""Which files a result can be written as, by the ending of the name: the one table of writers."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from onnx_lowrank.compression.inspection import Inspection
from onnx_lowrank.compression.sweep_report import SweepReport
from onnx_lowrank.errors import UsageError
from onnx_lowrank.evaluation.bench import BenchReport
from onnx_lowrank.evaluation.check import CheckReport
from onnx_lowrank.files import Output, check_outputs, write_text
from onnx_lowrank.reports.inspect_page import inspect_page
from onnx_lowrank.reports.markdown import (
    bench_markdown,
    check_markdown,
    inspect_markdown,
    run_markdown,
    sweep_markdown,
)
from onnx_lowrank.reports.pages import bench_page, check_page, run_page
from onnx_lowrank.reports.rows import check_rows, inspect_rows, run_rows
from onnx_lowrank.reports.sweep_page import sweep_page
from onnx_lowrank.schema.json_report import JsonReport
from onnx_lowrank.schema.report import Report

__all__ = ["WRITERS", "endings_of", "text_of", "write_report"]

Writer = Callable[[Any], str]


def _json(report: JsonReport) -> str:
    return report.to_json() + "\n"


WRITERS: Mapping[str, Mapping[type[JsonReport], Writer]] = {
    ".json": {JsonReport: _json},
    ".html": {
        Report: run_page,
        Inspection: inspect_page,
        CheckReport: check_page,
        BenchReport: bench_page,
        SweepReport: sweep_page,
    },
    ".md": {
        Report: run_markdown,
        Inspection: inspect_markdown,
        CheckReport: check_markdown,
        BenchReport: bench_markdown,
        SweepReport: sweep_markdown,
    },
    ".csv": {
        Report: run_rows,
        Inspection: inspect_rows,
        CheckReport: check_rows,
        BenchReport: BenchReport.to_csv,
        SweepReport: SweepReport.to_csv,
    },
}
"""Ending of a name -> kind of result -> what makes the text."""


def endings_of(kind: type[JsonReport]) -> tuple[str, ...]:
    """The endings that a kind of result can have, JSON first."""
    return tuple(
        ending for ending, makers in WRITERS.items() if any(issubclass(kind, own) for own in makers)
    )


def text_of(report: JsonReport, ending: str) -> str:
    """A result as the text of a file.

    Args:
        report: of any kind that can be written so.
        ending: of the file's name, such as ".html".

    Raises:
        UsageError: there is no such kind of file for it.
    """
    for own, make in WRITERS.get(ending.lower(), {}).items():
        if isinstance(report, own):
            return make(report)
    known = " or ".join(endings_of(type(report)))
    raise UsageError(f"expected a name with {known}, got {ending or 'none'!r}")


def write_report(report: JsonReport, path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Write a result as a file: JSON, a page, Markdown or CSV by the ending of its name.

    Args:
        report: such as `Result.report`, or what `onnx_lowrank.check` returns.
        path: ends in .json, .html, .md or .csv.
        force: overwrite an existing file.

    Raises:
        UsageError: the name ends in something else.
        InputError: the file cannot be written.
    """
    place = Path(path)
    text = text_of(report, place.suffix)
    output = Output(place, force=force)
    check_outputs([output], ())
    write_text(output, text)
