"""The main job: compress IN into OUT."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import click

from onnx_lowrank.cli.folders import places
from onnx_lowrank.cli.options import (
    command_of,
    print_log,
    reader_may_leave,
    terminal_progress,
    values_of,
)
from onnx_lowrank.cli.reports import ReportFiles
from onnx_lowrank.compression.verbs import COMPRESS
from onnx_lowrank.errors import GateError, InputError
from onnx_lowrank.files import exists

__all__ = ["command"]


@command_of(COMPRESS, hidden=True)
@click.argument("source", metavar="IN", type=click.Path(path_type=Path))
@click.argument("target", metavar="OUT", type=click.Path(path_type=Path))
def command(source: Path, target: Path, **options: Any) -> None:
    """Compress IN into OUT."""
    from onnx_lowrank.cli.console import print_report
    from onnx_lowrank.cli.screen import output_screen
    from onnx_lowrank.compression.result import Destination
    from onnx_lowrank.compression.run import execute
    from onnx_lowrank.compression.settings import Settings
    from onnx_lowrank.runtime.session import OrtLog

    values = values_of(COMPRESS, options)
    quiet, every = values.pop("quiet"), values.pop("all_rows")
    report_paths, verbose = values.pop("report_path"), values.pop("verbose")
    external, force = values.pop("external_data"), values.pop("force")
    settings = Settings.of(values)
    group = click.get_current_context().parent
    verbs = list(group.command.commands) if group and isinstance(group.command, click.Group) else []
    if not exists(source) and (near := difflib.get_close_matches(str(source), verbs, 1)):
        raise InputError(f"{source}: no such file; did you mean the verb {near[0]!r}?")
    written = ReportFiles(report_paths)
    log = OrtLog()
    progress = terminal_progress(quiet=quiet)
    screen = output_screen(
        *report_paths, target, quiet=quiet, every=every
    )  # before anything is renamed over a redirection
    missed: GateError | None = None
    with places(source, target, force=force) as own:
        place = Destination(own.target, external, force, own.beside)
        try:
            found = execute(own.source, settings, place, progress, log, written.outputs).report
        except GateError as error:
            missed, found = error, error.report
    written.write(found)
    with reader_may_leave(kept=found.output.path is not None or bool(report_paths)):
        print_report(found, screen)
    print_log(log, verbose=verbose)
    if missed is not None:
        raise missed
