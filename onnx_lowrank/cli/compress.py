"""The main job: compress IN into OUT."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import click

from onnx_lowrank.cli.options import (
    number,
    plain,
    reader_may_leave,
    report,
    running,
    samples,
    selection,
    shapes,
    terminal_progress,
    verbose,
)
from onnx_lowrank.cli.reports import ReportFile
from onnx_lowrank.errors import GateError, InputError
from onnx_lowrank.files import exists

__all__ = ["command"]


@click.command("compress", hidden=True)
@click.argument("source", metavar="IN", type=click.Path(path_type=Path))
@click.argument("target", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "--energy",
    type=float,
    help="Smallest rank whose squared singular values hold this share of their sum, above 0 and "
    "up to 1.  [default: 0.95]",
)
@number("--rank", "Instead of --energy: this rank for every layer, taken as it is.")
@click.option(
    "--keep",
    type=float,
    help="Instead of --energy: the share of the linear layers' parameters to keep over the whole "
    "model, spread where it hurts least.",
)
@click.option("--uniform", is_flag=True, help="With --keep: the same share of every layer.")
@click.option(
    "--max-size", metavar="20MB", help="Instead of --energy: bytes of OUT with external data."
)
@click.option(
    "--tolerance",
    type=float,
    help="Instead of --energy: the fastest (see --objective) model whose held-out error by "
    "--metric stays within this.",
)
@click.option(
    "--metric",
    default="relative-l2",
    show_default=True,
    help="What --tolerance means: relative-l2, cosine, top1, or file.py:function of outputs, "
    "reference outputs and labels that returns a score.",
)
@click.option(
    "--objective",
    type=click.Choice(["latency", "size", "macs"]),
    help="What is made small under --tolerance.  [default: latency]",
)
@click.option("--speedup", type=float, help="Instead of --energy: times as fast as IN.")
@click.option("--max-latency", metavar="5ms", help="Instead of --energy: latency of one inference.")
@click.option(
    "--allow-slower",
    is_flag=True,
    help="Keep pairs also where the model is slower with them than IN.",
)
@selection
@shapes
@samples
@click.option(
    "--save-costs",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Write the latencies measured of single layers (JSON), for runs elsewhere.",
)
@click.option(
    "--load-costs",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Take such latencies, as of a board, instead of measuring them.",
)
@click.option(
    "--max-error",
    type=float,
    help="Gate: exit 3 and write nothing if the mean relative L2 error of an output is above.",
)
@running
@click.option("--no-check", is_flag=True, help="Do not compare outputs.")
@click.option(
    "--external-data",
    type=click.Choice(["auto", "always", "never"]),
    default="auto",
    show_default=True,
    help="Weights beside the model in OUT.data; auto: above 1.5 GB.",
)
@report()
@click.option("--dry-run", is_flag=True, help="Decide and print, write nothing.")
@click.option("--force", is_flag=True, help="Overwrite OUT.")
@verbose
def command(
    source: Path,
    target: Path,
    *,
    no_check: bool,
    external_data: Any,
    report_path: Path | None,
    force: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Compress IN into OUT."""
    from onnx_lowrank.cli.console import output_console, print_report
    from onnx_lowrank.compression.result import Destination
    from onnx_lowrank.compression.run import execute
    from onnx_lowrank.compression.settings import Settings
    from onnx_lowrank.runtime.session import OrtLog

    settings = Settings(**plain(options), check=not no_check)
    group = click.get_current_context().parent
    verbs = list(group.command.commands) if group and isinstance(group.command, click.Group) else []
    if not exists(source) and (near := difflib.get_close_matches(str(source), verbs, 1)):
        raise InputError(f"{source}: no such file; did you mean the verb {near[0]!r}?")
    written = ReportFile(report_path)
    log = OrtLog()
    progress = terminal_progress()
    console = output_console(report_path, target)
    place = Destination(target, external_data, force)
    missed: GateError | None = None
    try:
        found = execute(source, settings, place, progress, log, written.outputs).report
    except GateError as error:
        missed, found = error, error.report
    written.write(found)
    with reader_may_leave(kept=found.output.path is not None or report_path is not None):
        print_report(found, console)
    if verbose:
        for line in log.lines:
            click.echo(f"{line.what}: {line.text}", err=True)
    if missed is not None:
        raise missed
