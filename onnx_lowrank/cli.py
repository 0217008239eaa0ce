"""The command ``onnx-lowrank``.

Two paths are the main job; a verb in their place is another one.  Nothing heavy is imported
until a job is known to run, so that ``--help`` answers at once.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from onnx_lowrank.errors import GateError, InputError, LowRankError
from onnx_lowrank.ortlog import reserve_stderr

__all__ = ["main"]

_MAIN = "compress"


# \b keeps click from filling the lines of a paragraph.
_HELP = """Make an exported ONNX model smaller and faster without retraining.

Replaces every linear map with a constant weight by two smaller ones from SVD factors where that
saves parameters, checks the outputs and times both models in ONNX Runtime.

\b
Example:  onnx-lowrank model.onnx small.onnx --energy 0.95

\b
Exit codes:  0  done
             1  bad input, or a failure
             2  wrong usage
             3  a limit such as --max-error was missed; nothing was written
"""


class _Verbs(click.Group):
    """A group whose nameless verb is the main job."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Take anything that does not begin with a verb as the main job."""
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help", "--version"):
            args = [_MAIN, *args]
        return super().parse_args(ctx, args)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Both ways to call it."""
        formatter.write_usage(ctx.command_path, "IN OUT [OPTIONS]")
        formatter.write_usage(ctx.command_path, "VERB … (see below)", prefix="       ")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The main job's options, then the verbs."""
        job = self.commands[_MAIN]
        options = [p for p in job.get_params(ctx) if isinstance(p, click.Option)]
        records = [r for option in options if (r := option.get_help_record(ctx)) is not None]
        with formatter.section("Options"):
            formatter.write_dl([*records, ("--version", "Show the version and exit.")])
        verbs = [
            (name, command.get_short_help_str(200))
            for name, command in sorted(self.commands.items())
            if name != _MAIN
        ]
        with formatter.section("Verbs (onnx-lowrank VERB --help)"):
            formatter.write_dl(verbs)


@click.group(
    cls=_Verbs,
    help=_HELP,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="onnx-lowrank", message="%(package)s %(version)s")
def cli() -> None:
    """The command."""


_Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def _number(name: str, text: str, **extra: Any) -> _Decorator:
    return click.option(name, type=int, help=text, **extra)


@cli.command(_MAIN, hidden=True)
@click.argument("source", metavar="IN", type=click.Path(path_type=Path))
@click.argument("target", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "--energy",
    type=float,
    help="Smallest rank whose squared singular values hold this share of their sum, above 0 and "
    "up to 1.  [default: 0.95]",
)
@_number("--rank", "Instead of --energy: this rank for every layer, taken as it is.")
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
@_number(
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
@_number("--samples", "How many samples to use.", default=16, show_default=True)
@_number("--seed", "For random input and for the choice of samples.", default=0, show_default=True)
@click.option(
    "--calibrate",
    "calibration",
    metavar="SOURCE",
    help="Samples to fit the factors to: as --data, or module:callable or file.py:callable that "
    "returns an iterable of feeds.  Without it a part of --data is used, the rest judges.",
)
@_number("--calibration-samples", "How many samples to fit to.", default=256, show_default=True)
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
@click.option(
    "--max-error",
    type=float,
    help="Gate: exit 3 and write nothing if the mean relative L2 error of an output is above.",
)
@click.option("--no-simplify", is_flag=True, help="Do not run onnxsim first.")
@click.option("--no-check", is_flag=True, help="Do not compare outputs.")
@click.option("--no-bench", is_flag=True, help="Do not time.")
@_number("--threads", "Intra-op threads of check and timing.  [default: physical cores]")
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
def compress(
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
    from onnx_lowrank.console import TerminalProgress, output_console, print_report
    from onnx_lowrank.progress import Silent
    from onnx_lowrank.result import Target
    from onnx_lowrank.run import execute
    from onnx_lowrank.runtime import OrtLog
    from onnx_lowrank.save import check_report_target, write_text
    from onnx_lowrank.settings import Settings
    from onnx_lowrank.shapes import parse_dims, parse_input_shapes

    settings = Settings(
        **options,
        ops=_listed(ops),
        input_shapes=parse_input_shapes(input_shape),
        dims=parse_dims(dim),
        calibrate=not no_calibrate,
        simplify=not no_simplify,
        check=not no_check,
        bench=not no_bench,
    )
    if not source.exists() and (near := difflib.get_close_matches(str(source), cli.commands, 1)):
        raise InputError(f"{source}: no such file; did you mean the verb {near[0]!r}?")
    if report_path is not None:
        check_report_target(report_path, (source, target))
    log = OrtLog()
    progress = TerminalProgress() if sys.stderr.isatty() else Silent()
    console = output_console()
    place = Target(target, external_data, force)
    missed: GateError | None = None
    try:
        report = execute(source, settings, place, progress, log).report
    except GateError as error:
        missed, report = error, error.report
    if report_path is not None:
        write_text(report_path, report.to_json() + "\n")
    with _reader_may_leave():
        print_report(report, console)
    if verbose:
        for line in log.lines:
            click.echo(f"{line.what}: {line.text}", err=True)
    if missed is not None:
        raise missed


@cli.command()
@click.argument("source", metavar="IN", type=click.Path(path_type=Path))
@click.option("--constant-inputs", is_flag=True, help="As in the main job.")
def inspect(source: Path, constant_inputs: bool) -> None:
    """List every linear map of IN: form, shape, ranks at several energies, and what is left out."""
    from onnx_lowrank.console import TerminalProgress, output_console
    from onnx_lowrank.inspection import inspect_model, print_inspection
    from onnx_lowrank.progress import Silent

    progress = TerminalProgress() if sys.stderr.isatty() else Silent()
    inspection = inspect_model(source, constant_inputs, progress)
    with _reader_may_leave():
        print_inspection(inspection, output_console())


@cli.command()
def providers() -> None:
    """List the execution providers of the installed ONNX Runtime."""
    import onnxruntime as ort

    click.echo(f"onnxruntime {ort.__version__}")
    for provider in ort.get_available_providers():
        click.echo(f"  {provider.removesuffix('ExecutionProvider').lower():<12} {provider}")


def _listed(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(part.strip() for part in text.split(","))


@contextlib.contextmanager
def _reader_may_leave() -> Iterator[None]:
    """Go on when a reader such as head has what it wants, where rich would end the program."""
    with contextlib.suppress(SystemExit, BrokenPipeError):
        yield


def _terminate(_: int, __: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt  # the same way out as Ctrl-C: every workspace is removed


def main(args: list[str] | None = None) -> NoReturn:
    """Run the command and exit; every failure is one line on standard error."""
    reserve_stderr()  # before ONNX Runtime is imported, in case standard error is closed
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(_exit_code(sys.argv[1:] if args is None else args))


def _exit_code(args: list[str]) -> int:
    # Nothing that a library logs about a model belongs on standard error.
    logging.getLogger().addHandler(logging.NullHandler())
    try:
        cli.main(args=args or ["--help"], prog_name="onnx-lowrank", standalone_mode=False)
        return 0 if args else 2
    except click.UsageError as error:
        return _fail(" ".join(error.format_message().split()), 2)
    except LowRankError as error:
        return _fail(" ".join(str(error).split()), error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        return _fail("interrupted; nothing written", 130)
    except MemoryError:
        return _fail("out of memory; nothing written", 1)
    except Exception as error:  # a fault of this program
        if "--verbose" in args:
            traceback.print_exc()
        name = type(error).__name__
        text = " ".join(str(error).split())
        return _fail(f"internal error: {name}: {text}; --verbose shows the traceback", 1)


def _fail(message: str, code: int) -> int:
    click.echo(f"onnx-lowrank: error: {message}", err=True)
    return code
