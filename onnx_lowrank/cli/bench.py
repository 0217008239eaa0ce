"""``bench``: latency, memory and costs of models, on any targets."""

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
from onnx_lowrank.compression.verbs import BENCH
from onnx_lowrank.errors import InputError, LimitError

__all__ = ["command"]


@command_of(BENCH)
@click.argument(
    "models", metavar="A [B …]", nargs=-1, required=True, type=click.Path(path_type=Path)
)
def command(models: tuple[Path, ...], **options: Any) -> None:
    """Time models in turns on every target."""
    from onnx_lowrank.cli.screen import output_screen
    from onnx_lowrank.cli.tables import print_bench_report
    from onnx_lowrank.compression.judging import bench
    from onnx_lowrank.runtime.session import OrtLog

    values = values_of(BENCH, options)
    quiet = values.pop("quiet")
    report_paths, verbose = values.pop("report_path"), values.pop("verbose")
    written = ReportFiles(report_paths)
    log = OrtLog()
    found = bench(
        *models, **values, progress=terminal_progress(quiet=quiet), log=log, outputs=written.outputs
    )
    print_log(log, verbose=verbose)
    written.write(found)
    with reader_may_leave(kept=bool(report_paths)):
        print_bench_report(found, output_screen(*report_paths, quiet=quiet))
    if found.missed is not None:
        raise LimitError(found.missed)
    if found.errors:
        raise InputError(found.errors[0])
