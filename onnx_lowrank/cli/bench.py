"""``bench``: latency, memory and costs of models, on any targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from onnx_lowrank.cli.options import (
    number,
    on_targets,
    reader_may_leave,
    report,
    subjects,
    terminal_progress,
)
from onnx_lowrank.cli.reports import JSON, ReportFile
from onnx_lowrank.errors import InputError, UsageError

__all__ = ["command"]


@click.command("bench")
@click.argument(
    "models", metavar="A [B …]", nargs=-1, required=True, type=click.Path(path_type=Path)
)
@on_targets
@number(
    "--threads",
    "Intra-op threads; repeatable.  [default: each target's own]",
    multiple=True,
)
@number("--iterations", "Timed runs of each model.", default=50, show_default=True)
@number("--warmup", "Runs of each model before.", default=5, show_default=True)
@report("Write the whole result as JSON, or a table as CSV, by the file's ending.")
def command(
    models: tuple[Path, ...],
    *,
    targets: tuple[str, ...],
    strict: bool,
    threads: tuple[int, ...],
    iterations: int,
    warmup: int,
    report_path: Path | None,
    **options: Any,
) -> None:
    """Time models in turns on every target, and measure their memory."""
    from onnx_lowrank.cli.console import output_console
    from onnx_lowrank.cli.tables import print_bench_report
    from onnx_lowrank.evaluation.bench import BenchReport, bench_models
    from onnx_lowrank.evaluation.check import open_targets

    for name, values, least in (
        ("threads", threads, 1),
        ("iterations", (iterations,), 1),
        ("warmup", (warmup,), 0),
    ):
        if any(value < least for value in values):
            raise UsageError(f"--{name}: expected a whole number from {least}, got {min(values)}")
    written = ReportFile(report_path, {**JSON, ".csv": BenchReport.to_csv})
    opened = open_targets(targets)
    progress = terminal_progress()
    with subjects(models, written.outputs, **options) as given:
        found = bench_models(
            given,
            opened,
            threads=threads or (None,),
            iterations=iterations,
            warmup=warmup,
            strict=strict,
            progress=progress,
        )
    written.write(found)
    with reader_may_leave(kept=report_path is not None):
        print_bench_report(found, output_console(report_path))
    if found.errors:
        raise InputError(found.errors[0])
