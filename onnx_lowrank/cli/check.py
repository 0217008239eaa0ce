"""``check``: the outputs of one model against another's, on any targets."""

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
from onnx_lowrank.compression.verbs import CHECK
from onnx_lowrank.errors import InputError, LimitError

__all__ = ["command"]


@command_of(CHECK)
@click.argument("before", metavar="A", type=click.Path(path_type=Path))
@click.argument("after", metavar="B", type=click.Path(path_type=Path))
def command(before: Path, after: Path, **options: Any) -> None:
    """Compare the outputs of B with those of A."""
    from onnx_lowrank.cli.screen import output_screen
    from onnx_lowrank.cli.tables import print_check_report
    from onnx_lowrank.compression.judging import check
    from onnx_lowrank.runtime.session import OrtLog

    values = values_of(CHECK, options)
    quiet, every = values.pop("quiet"), values.pop("all_rows")
    report_paths, verbose = values.pop("report_path"), values.pop("verbose")
    written = ReportFiles(report_paths)
    log = OrtLog()
    found = check(
        before,
        after,
        **values,
        progress=terminal_progress(quiet=quiet),
        log=log,
        outputs=written.outputs,
    )
    print_log(log, verbose=verbose)
    written.write(found)
    with reader_may_leave(kept=bool(report_paths)):
        print_check_report(found, output_screen(*report_paths, quiet=quiet, every=every))
    if found.missed is not None:
        raise LimitError(found.missed)
    if found.errors:
        raise InputError(found.errors[0])
