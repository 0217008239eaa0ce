"""Options that several verbs take, in groups."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from onnx_lowrank.evaluation.subjects import Subjects
    from onnx_lowrank.files import Output
    from onnx_lowrank.progress import Progress

__all__ = [
    "Decorator",
    "listed",
    "number",
    "on_targets",
    "plain",
    "reader_may_leave",
    "report",
    "running",
    "samples",
    "selection",
    "shapes",
    "subjects",
    "terminal_progress",
    "verbose",
]


Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def number(name: str, text: str, **extra: Any) -> Decorator:
    """An option that takes a whole number."""
    return click.option(name, type=int, help=text, **extra)


def listed(text: str | None) -> tuple[str, ...] | None:
    """The parts of a list with commas."""
    return None if text is None else tuple(part.strip() for part in text.split(","))


@contextlib.contextmanager
def subjects(
    paths: Sequence[Path],
    outputs: Sequence[Output],
    *,
    input_shape: Sequence[str],
    dim: Sequence[str],
    fix_shapes: bool,
    verbose: bool,
    **options: Any,
) -> Iterator[Subjects]:
    """The models and samples of the options `on_targets`, in a workspace that goes away again."""
    from onnx_lowrank.data.shapes import parse_dims, parse_input_shapes
    from onnx_lowrank.errors import UsageError
    from onnx_lowrank.evaluation.subjects import SampleOptions, open_subjects
    from onnx_lowrank.files import workspace
    from onnx_lowrank.runtime.session import OrtLog

    for name, least in (("samples", 1), ("seed", 0)):
        if options[name] < least:
            raise UsageError(f"--{name}: expected a whole number from {least}, got {options[name]}")
    given = SampleOptions(
        **options,
        input_shapes=parse_input_shapes(input_shape),
        dims=parse_dims(dim),
        fix=fix_shapes,
    )
    log = OrtLog()
    with workspace(None) as folder:
        yield open_subjects(paths, given, folder, log, outputs)
    if verbose:
        for line in log.lines:
            click.echo(f"{line.what}: {line.text}", err=True)


@contextlib.contextmanager
def reader_may_leave(*, kept: bool = False) -> Iterator[None]:
    """Go on when a reader such as head has what it wants, where rich would end the program.

    Args:
        kept: whether the result is in a file.  Then a standard output that fails, as on a full
            disk, is a warning: the exit code tells of the files.

    Raises:
        InputError: standard output fails, and the result is nowhere else.
    """
    from onnx_lowrank.errors import InputError

    try:
        yield
    except (SystemExit, BrokenPipeError):
        pass
    except OSError as error:
        with Path(os.devnull).open("wb") as null:  # else the end of the program fails once more
            os.dup2(null.fileno(), 1)
        text = f"standard output: {error.strerror or error}"
        if not kept:
            raise InputError(text) from error
        click.echo(f"onnx-lowrank: warning: {text}; the files are written", err=True)


def terminal_progress() -> Progress:
    """Bars on a terminal, nothing in a pipe."""
    from onnx_lowrank.cli.console import TerminalProgress
    from onnx_lowrank.progress import Silent

    return TerminalProgress() if sys.stderr.isatty() else Silent()


def _all(options: Sequence[Decorator]) -> Decorator:
    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def _multiple(text: str | None) -> int | str | None:
    if text is None or text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise click.BadParameter(f"{text!r} is neither a whole number nor auto") from None


def plain(options: dict[str, Any]) -> dict[str, Any]:
    """The options of all groups under the names of `onnx_lowrank.compression.settings.Settings`.

    Raises:
        UsageError: a shape or dimension is not one.
    """
    from onnx_lowrank.data.shapes import parse_dims, parse_input_shapes

    named = dict(options)
    return {
        "ops": listed(named.pop("ops")),
        "input_shapes": parse_input_shapes(named.pop("input_shape")),
        "dims": parse_dims(named.pop("dim")),
        "calibrate": not named.pop("no_calibrate"),
        "simplify": not named.pop("no_simplify"),
        "bench": not named.pop("no_bench"),
        **named,
    }


_drawn = _all(
    [
        number("--samples", "How many samples to use.", default=16, show_default=True),
        number(
            "--seed", "Of random input, and of the choice of samples.", default=0, show_default=True
        ),
    ]
)

shapes = _all(
    [
        click.option(
            "--input-shape",
            multiple=True,
            metavar="NAME:1,128",
            help="Concrete shape of an input, for what runs the model; repeatable.",
        ),
        click.option(
            "--dim",
            multiple=True,
            metavar="NAME=1",
            help="Size of a symbolic dimension, for what runs the model; repeatable.",
        ),
    ]
)
"""Sizes that a model leaves open."""

verbose = click.option("--verbose", is_flag=True, help="Show ONNX Runtime's own messages.")

on_targets = _all(
    [
        click.option(
            "--ep",
            "--target",
            "targets",
            multiple=True,
            default=("cpu",),
            show_default=True,
            metavar="NAME",
            help="Where to run, as providers lists it; repeatable.",
        ),
        click.option(
            "--data",
            type=click.Path(path_type=Path),
            help="Samples, as in the main job.  [default: seeded random input]",
        ),
        _drawn,
        shapes,
        click.option(
            "--fix-shapes",
            is_flag=True,
            help="Run copies whose inputs have fixed sizes, as QNN and NNAPI need.",
        ),
        click.option(
            "--strict", is_flag=True, help="A node that a target leaves to the CPU is an error."
        ),
        verbose,
    ]
)
"""Where models are run, and on which samples."""


def report(text: str = "Write the whole result as JSON.") -> Decorator:
    """The option for a report file."""
    return click.option(
        "--report",
        "report_path",
        metavar="FILE",
        type=click.Path(path_type=Path),
        help=text,
    )


selection = _all(
    [
        click.option(
            "--include",
            multiple=True,
            metavar="GLOB",
            help="Factor only nodes whose name or torch scope matches; repeatable.",
        ),
        click.option(
            "--exclude", multiple=True, metavar="GLOB", help="Leave such nodes dense; repeatable."
        ),
        click.option(
            "--ops",
            metavar="LIST",
            help="Forms to factor, separated by commas: default, all, or names as inspect lists "
            "them.",
        ),
        click.option(
            "--constant-inputs",
            is_flag=True,
            help="Treat weights that are also graph inputs as constants.",
        ),
        click.option(
            "--min-gain",
            type=float,
            default=0.1,
            show_default=True,
            help="Replace a layer only if the pair saves this share of its parameters.",
        ),
        click.option(
            "--rank-multiple",
            metavar="M",
            callback=lambda _, __, text: _multiple(text),
            help="Round chosen ranks to a multiple: for --energy up where --min-gain allows, for "
            "--keep down; auto: what each layer likes here, measured.  [default: 8, or what the "
            "target of --for likes]",
        ),
        click.option(
            "--for",
            "shape_for",
            metavar="TARGET",
            help="Shape OUT for cpu, arm, qnn, nnapi, coreml, webgpu or xnnpack: ranks, fixed "
            "sizes, 2-D products, Gemm or MatMul.  [default: portable]",
        ),
    ]
)
"""Which layers, and how they are factored."""

samples = _all(
    [
        click.option(
            "--data",
            type=click.Path(path_type=Path),
            help="Samples for the check: .npz (an array for each input, axis 0 the samples), .npy, "
            "a folder of .npz feeds or of test_data_set_*.  [default: seeded random input]",
        ),
        click.option(
            "--labels",
            type=click.Path(path_type=Path),
            help="Labels of the samples for --metric: .npy, .npz, .txt or .csv.  "
            "[default: in --data]",
        ),
        _drawn,
        click.option(
            "--calibrate",
            "calibration",
            metavar="SOURCE",
            help="Samples to fit the factors to: as --data, or module:callable or file.py:callable "
            "that returns an iterable of feeds.  Without it a part of --data is used, the rest "
            "judges.",
        ),
        number(
            "--calibration-samples", "How many samples to fit to.", default=256, show_default=True
        ),
        click.option(
            "--mask",
            metavar="INPUT",
            help="Input whose zeros mark padding, left out of the calibration.  "
            "[default: attention_mask]",
        ),
        click.option(
            "--fisher",
            is_flag=True,
            help="Weigh what each layer loses by what the model's outputs feel of it, by "
            "derivatives.",
        ),
        click.option(
            "--refit",
            is_flag=True,
            help="Fit each layer again, to the inputs that the compressed model gives it and the "
            "outputs that the original had.",
        ),
        click.option(
            "--save-stats",
            metavar="FILE",
            type=click.Path(path_type=Path),
            help="Write what the calibration gathered (.npz), for runs with other budgets.",
        ),
        click.option(
            "--load-stats",
            metavar="FILE",
            type=click.Path(path_type=Path),
            help="Fit to what --save-stats wrote for this model; no samples are run for it.",
        ),
        number(
            "--heal",
            "Steps of gradient descent on the factors against the original's outputs, on the "
            "samples to fit to.  [default: none]",
            default=0,
        ),
        click.option(
            "--heal-at",
            multiple=True,
            metavar="NAME",
            help="A value inside that --heal compares beside the outputs, with the same name in "
            "both models; repeatable.  [default: some that everything factored passes through]",
        ),
        click.option(
            "--no-calibrate", is_flag=True, help="Fit to the weights alone, in spite of --data."
        ),
    ]
)
"""Samples to fit to and to judge with."""

running = _all(
    [
        click.option("--no-simplify", is_flag=True, help="Do not run onnxsim first."),
        click.option("--no-bench", is_flag=True, help="Do not time."),
        number("--threads", "Intra-op threads of check and timing.  [default: physical cores]"),
        click.option(
            "--ep",
            default="cpu",
            show_default=True,
            help="Execution provider of check and timing.",
        ),
    ]
)
"""What is run, and where."""
