"""``support``: what each execution provider would take of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from onnx_lowrank.cli.options import command_of, reader_may_leave, terminal_progress, values_of
from onnx_lowrank.cli.reports import JSON, ReportFiles
from onnx_lowrank.compression.verbs import SUPPORT

__all__ = ["command"]


@command_of(SUPPORT)
@click.argument("model", metavar="MODEL", type=click.Path(path_type=Path))
def command(model: Path, **options: Any) -> None:
    """Say which nodes each provider would take."""
    from onnx_lowrank.cli.screen import output_screen
    from onnx_lowrank.cli.tables import print_support
    from onnx_lowrank.compression.judging import support

    values = values_of(SUPPORT, options)
    quiet = values.pop("quiet")
    report_paths, nodes = values.pop("report_path"), values.pop("nodes")
    written = ReportFiles(report_paths, JSON)
    found = support(
        model, **values, progress=terminal_progress(quiet=quiet), outputs=written.outputs
    )
    written.write(found)
    with reader_may_leave(kept=bool(report_paths)):
        print_support(found, output_screen(*report_paths, quiet=quiet), every=nodes)
