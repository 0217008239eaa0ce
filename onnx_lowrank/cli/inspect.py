"""``inspect``: what a model holds."""

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
from onnx_lowrank.compression.verbs import INSPECT

__all__ = ["command"]


@command_of(INSPECT)
@click.argument("source", metavar="IN", type=click.Path(path_type=Path))
def command(source: Path, **options: Any) -> None:
    """List every linear map of IN."""
    from onnx_lowrank.cli.screen import output_screen
    from onnx_lowrank.cli.spectra import in_order, print_inspection
    from onnx_lowrank.compression.api import inspect
    from onnx_lowrank.runtime.session import OrtLog

    values = values_of(INSPECT, options)
    quiet, verbose = values.pop("quiet"), values.pop("verbose")
    report_paths, sort = values.pop("report_path"), values.pop("sort")
    written = ReportFiles(report_paths)
    log = OrtLog()
    progress = terminal_progress(quiet=quiet)
    found = inspect(source, **values, progress=progress, log=log, outputs=written.outputs)
    found = in_order(found, sort)
    print_log(log, verbose=verbose)
    written.write(found)
    with reader_may_leave(kept=bool(report_paths)):
        print_inspection(found, output_screen(*report_paths, quiet=quiet))
