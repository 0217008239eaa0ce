"""The main job: compress IN into OUT."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import click

from onnx_lowrank.commands.base import listed, number, reader_may_leave, terminal_progress
from onnx_lowrank.errors import GateError, InputError

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
    help="Instead of --energy: the share of each layer's parameters to keep.",
)
@click.option(
    "--include",
    multiple=True,
    metavar="GLOB",
    help="Factor only nodes whose name or torch scope matches; repeatable.",
)
@click.option(
    "--exclude", multiple=True, metavar="GLOB", help="Leave such nodes dense; repeatable."
)
@click.option(
    "--ops",
    metavar="LIST",
    help="Forms to factor, separated by commas: default, all, or names as inspect lists them.",
)
@click.option(
    "--constant-inputs",
    is_flag=True,
    help="Treat weights that are also graph inputs as constants.",
)
@click.option(
    "--min-gain",
    type=float,
    default=0.1,
    show_default=True,
    help="Replace a layer only if the pair saves this share of its parameters.",
)
@number(
    "--rank-multiple",
    "Round chosen ranks to a multiple: for --energy up where --min-gain allows, for --keep down.",
    default=8,
    show_default=True,
)
@click.option(
    "--input-shape",
    multiple=True,
    metavar="NAME:1,128",
    help="Concrete shape of an input, for check and timing; repeatable.",
)
@click.option(
    "--dim",
    multiple=True,
    metavar="NAME=1",
    help="Size of a symbolic dimension, for check and timing; repeatable.",
)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Samples for the check: .npz (an array for each input, axis 0 the samples), .npy, a "
    "folder of .npz feeds or of test_data_set_*.  [default: seeded random input]",
)
@number("--samples", "How many samples to use.", default=16, show_default=True)
@number("--seed", "For random input and for the choice of samples.", default=0, show_default=True)
@click.option(
    "--calibrate",
    "calibration",
    metavar="SOURCE",
    help="Samples to fit the factors to: as --data, or module:callable or file.py:callable that "
    "returns an iterable of feeds.  Without it a part of --data is used, the rest judges.",
)
@number("--calibration-samples", "How many samples to fit to.", default=256, show_default=True)
@click.option(
    "--mask",
    metavar="INPUT",
    help="Input whose zeros mark padding, left out of the calibration.  [default: attention_mask]",
)
@click.option(
    "--save-stats",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Write what the calibration gathered (.npz), for runs with other budgets.",
)
@click.option(
    "--load-stats",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Fit to what --save-stats wrote for this model; no samples are run for it.",
)
@click.option("--no-calibrate", is_flag=True, help="Fit to the weights alone, in spite of --data.")
@number(
    "--heal",
    "Steps of gradient descent on the factors against the original's outputs, on the samples to "
    "fit to.  [default: none]",
    default=0,
)
@click.option(
    "--heal-at",
    multiple=True,
    metavar="NAME",
    help="A value inside that --heal compares too, with the same name in both models; repeatable.",
)
@click.option(
    "--max-error",
    type=float,
    help="Gate: exit 3 and write nothing if the mean relative L2 error of an output is above.",
)
@click.option("--no-simplify", is_flag=True, help="Do not run onnxsim first.")
@click.option("--no-check", is_flag=True, help="Do not compare outputs.")
@click.option("--no-bench", is_flag=True, help="Do not time.")
@number("--threads", "Intra-op threads of check and timing.  [default: physical cores]")
@click.option(
    "--ep",
    default="cpu",
    show_default=True,
    help="Execution provider of check and timing.",
)
@click.option(
    "--external-data",
    type=click.Choice(["auto", "always", "never"]),
    default="auto",
    show_default=True,
    help="Weights beside the model in OUT.data; auto: above 1.5 GB.",
)
@click.option(
    "--report",
    "report_path",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Write the whole result as JSON.",
)
@click.option("--dry-run", is_flag=True, help="Decide and print, write nothing.")
@click.option("--force", is_flag=True, help="Overwrite OUT.")
@click.option("--verbose", is_flag=True, help="Show ONNX Runtime's own messages.")
def command(
    source: Path,
    target: Path,
    *,
    ops: str | None,
    input_shape: tuple[str, ...],
    dim: tuple[str, ...],
    no_calibrate: bool,
    no_simplify: bool,
    no_check: bool,
    no_bench: bool,
    external_data: Any,
    report_path: Path | None,
    force: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Compress IN into OUT."""
    from onnx_lowrank.console import output_console, print_report
    from onnx_lowrank.result import Destination
    from onnx_lowrank.run import execute
    from onnx_lowrank.runtime import OrtLog
    from onnx_lowrank.save import check_report_target, write_text
    from onnx_lowrank.settings import Settings
    from onnx_lowrank.shapes import parse_dims, parse_input_shapes

    settings = Settings(
        **options,
        ops=listed(ops),
        input_shapes=parse_input_shapes(input_shape),
        dims=parse_dims(dim),
        calibrate=not no_calibrate,
        simplify=not no_simplify,
        check=not no_check,
        bench=not no_bench,
    )
    group = click.get_current_context().parent
    verbs = list(group.command.commands) if group and isinstance(group.command, click.Group) else []
    if not source.exists() and (near := difflib.get_close_matches(str(source), verbs, 1)):
        raise InputError(f"{source}: no such file; did you mean the verb {near[0]!r}?")
    if report_path is not None:
        check_report_target(report_path, (source, target))
    log = OrtLog()
    progress = terminal_progress()
    console = output_console()
    place = Destination(target, external_data, force)
    missed: GateError | None = None
    try:
        report = execute(source, settings, place, progress, log).report
    except GateError as error:
        missed, report = error, error.report
    if report_path is not None:
        write_text(report_path, report.to_json() + "\n")
    with reader_may_leave():
        print_report(report, console)
    if verbose:
        for line in log.lines:
            click.echo(f"{line.what}: {line.text}", err=True)
    if missed is not None:
        raise missed
