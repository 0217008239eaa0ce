"""``sweep``: the trade-off curve of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from onnx_lowrank.cli.options import (
    command_of,
    print_log,
    reader_may_leave,
    terminal_progress,
    values_of,
)
from onnx_lowrank.cli.reports import ReportFiles
from onnx_lowrank.compression.verbs import SWEEP

__all__ = ["command"]


@command_of(SWEEP)
@click.argument("source", metavar="IN", type=click.Path(path_type=Path))
def command(source: Path, **options: Any) -> None:
    """Compress IN at several budgets."""
    from onnx_lowrank.cli.curve import curve_outputs, print_curve, write_curve
    from onnx_lowrank.cli.screen import output_screen
    from onnx_lowrank.compression.sweep import settings_of, sweep
    from onnx_lowrank.runtime.session import OrtLog

    values = values_of(SWEEP, options)
    quiet, verbose = values.pop("quiet"), values.pop("verbose")
    out, force, models = values.pop("out"), values.pop("force"), values.pop("models")
    report_paths = values.pop("report_path")
    reports = ReportFiles(report_paths)
    settings_of(values)  # before a folder is made
    outputs = curve_outputs(out, force=force)
    log = OrtLog()
    curve = sweep(
        source,
        **values,
        models=out if models else None,
        force=force,
        progress=terminal_progress(quiet=quiet),
        log=log,
        outputs=(*outputs, *reports.outputs),
    )
    written = (*write_curve(curve, outputs), *report_paths)
    reports.write(curve)
    with reader_may_leave(kept=True):
        print_curve(curve, written, output_screen(*report_paths, quiet=quiet))
    print_log(log, verbose=verbose)
