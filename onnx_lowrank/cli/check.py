"""``check``: the outputs of one model against another's, on any targets."""

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
from onnx_lowrank.cli.reports import ReportFile
from onnx_lowrank.errors import InputError, LimitError, UsageError

__all__ = ["command"]


@click.command("check")
@click.argument("before", metavar="A", type=click.Path(path_type=Path))
@click.argument("after", metavar="B", type=click.Path(path_type=Path))
@on_targets
@number("--threads", "Intra-op threads.  [default: each target's own]")
@click.option(
    "--max-error",
    type=float,
    help="Exit 3 if the mean relative L2 error of an output is above, on any target.",
)
@report()
def command(
    before: Path,
    after: Path,
    *,
    targets: tuple[str, ...],
    strict: bool,
    threads: int | None,
    max_error: float | None,
    report_path: Path | None,
    **options: Any,
) -> None:
    """Compare the outputs of B with those of A on every target, and each with the CPU."""
    from onnx_lowrank.cli.console import output_console
    from onnx_lowrank.cli.tables import print_check_report
    from onnx_lowrank.evaluation.check import check_models, open_targets

    if max_error is not None and not 0 <= max_error < float("inf"):
        raise UsageError(f"--max-error: expected a finite number from 0, got {max_error!r}")
    if threads is not None and threads < 1:
        raise UsageError(f"--threads: expected a whole number from 1, got {threads}")
    written = ReportFile(report_path)
    opened = open_targets(targets)
    progress = terminal_progress()
    with subjects((before, after), written.outputs, **options) as given:
        found = check_models(
            given,
            opened,
            strict=strict,
            threads=threads,
            max_error=max_error,
            progress=progress,
        )
    written.write(found)
    with reader_may_leave(kept=report_path is not None):
        print_check_report(found, output_console(report_path))
    if found.missed is not None:
        raise LimitError(found.missed)
    if found.errors:
        raise InputError(found.errors[0])
