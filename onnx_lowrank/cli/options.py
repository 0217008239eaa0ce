"""The command's options, made from the table of `onnx_lowrank.compression.options`."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnx_lowrank.compression.headings import GROUPS
from onnx_lowrank.compression.option import Option, check_relations, check_values
from onnx_lowrank.compression.options import OPTIONS
from onnx_lowrank.compression.verbs import Verb
from onnx_lowrank.errors import UsageError, named

if TYPE_CHECKING:
    from onnx_lowrank.progress import Progress
    from onnx_lowrank.runtime.log import OrtLog

__all__ = [
    "VerbCommand",
    "command_of",
    "print_log",
    "reader_may_leave",
    "terminal_progress",
    "values_of",
    "write_groups",
]

Decorator = Callable[[Callable[..., Any]], "VerbCommand"]


class _TableOption(click.Option):
    """An option of the command that knows its entry in the table."""

    def __init__(self, *args: Any, entry: Option, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.entry = entry


class VerbCommand(click.Command):
    """A verb whose help has its options in groups, and an example."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The groups."""
        write_groups(self, ctx, formatter, examples=False)


def write_groups(
    command: click.Command, ctx: click.Context, formatter: click.HelpFormatter, *, examples: bool
) -> None:
    """Write the options of a command under the headings of their groups.

    Args:
        command: with options of the table.
        ctx: its context.
        formatter: takes the text.
        examples: whether each group begins with one.
    """
    found: dict[str, list[tuple[str, str]]] = {group: [] for group in GROUPS}
    others = []
    for param in command.get_params(ctx):
        record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
        if record is not None and isinstance(param, _TableOption):
            found[param.entry.group].append(record)
        elif record is not None:
            others.append(record)
    others += [("--version", "Show the version and exit.")] if examples else []
    for group, records in found.items():
        if not records:
            continue
        with formatter.section(group):
            if examples:
                formatter.write(f"{'':>{formatter.current_indent}}{GROUPS[group]}\n\n")
            formatter.write_dl(records)
    if others:
        with formatter.section("Other"):
            formatter.write_dl(others)


def command_of(verb: Verb, **settings: Any) -> Decorator:
    """Make a function the command of a verb, with the options of the table."""

    def decorate(function: Callable[..., Any]) -> VerbCommand:
        for option in reversed(verb.options):
            function = _decorator(option)(function)
        text = f"{verb.help}\n\n\b\nExample:  {verb.example}"
        made = click.command(
            verb.name, cls=VerbCommand, help=text, short_help=verb.help, **settings
        )
        return made(function)

    return decorate


def _decorator(option: Option) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    default = option.default_text(lambda name: OPTIONS[name].option)
    text = option.text(lambda name: name if name in ("IN", "OUT") else OPTIONS[name].option)
    extra: dict[str, Any] = {}
    if option.kind in ("switch", "off"):
        extra = {"is_flag": True}
    elif option.kind in ("wholes", "texts", "paths", "shapes", "dims"):
        extra = {"multiple": True, "type": _type(option)}
        if option.kind in ("wholes", "texts", "paths"):
            extra["default"] = option.default
    elif option.kind not in ("list", "numbers"):
        extra = {"type": _type(option), "default": option.default}
    if option.choices:
        extra["shell_complete"] = _completing(option.choices)
    return click.option(
        *(*option.aliases, option.option, option.name),
        cls=_TableOption,
        entry=option,
        help=f"{text}  [default: {default}]" if default else text,
        metavar=option.metavar or (f"[{'|'.join(option.choices)}]" if option.choices else None),
        required=option.required,
        **extra,
    )


def _type(option: Option) -> Any:
    match option.kind:
        case "number":
            return float
        case "whole" | "wholes":
            return int
        case "path" | "paths" | "model":
            return click.Path(path_type=Path)
        case "samples":
            return click.Path()
    return str


def _completing(names: Sequence[str]) -> Callable[..., list[str]]:
    """Names for the shell to offer.  Whether a value is one of them, the table judges."""

    def complete(_: click.Context, __: click.Parameter, incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return complete


def values_of(verb: Verb, given: dict[str, Any]) -> dict[str, Any]:
    """The values that were typed, as the functions take them.

    Args:
        verb: whose options they are.
        given: name -> value, as click has it.

    Raises:
        UsageError: a value is none that its option takes, or two exclude each other.
    """
    values = {option.name: _value(option, given[option.name]) for option in verb.options}
    check_values(verb.options, values)
    check_relations([option for option in verb.options if not option.function], values)
    return values


def _value(option: Option, value: Any) -> Any:
    if value is None:
        return option.default
    match option.kind:
        case "off":
            return not value
        case "list":
            return _parts(value)
        case "numbers":
            return tuple(_number(option, part) for part in _parts(value) if value.strip())
        case "multiple":
            return _multiple(value)
        case "shapes":
            from onnx_lowrank.data.shapes import parse_input_shapes

            return parse_input_shapes(value)
        case "dims":
            from onnx_lowrank.data.shapes import parse_dims

            return parse_dims(value)
    return value


def _parts(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _number(option: Option, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(
            f"{named(option.name)}: expected numbers such as 0.8, got {text!r}"
        ) from None


def _multiple(text: str) -> int | str:
    """A whole number; of another text the table says what was expected."""
    try:
        return int(text)
    except ValueError:
        return text


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


def terminal_progress(*, quiet: bool = False) -> Progress:
    """Bars on a terminal, a line now and then in a pipe, nothing where it is to be quiet."""
    from onnx_lowrank.cli.live import LineProgress, TerminalProgress, seconds_between
    from onnx_lowrank.progress import Silent

    if quiet:
        return Silent()
    if sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown"):
        return TerminalProgress()
    every = seconds_between()
    return LineProgress(every) if every else Silent()


def print_log(log: OrtLog, *, verbose: bool) -> None:
    """ONNX Runtime's own messages on standard error, where they were asked for."""
    for line in log.lines if verbose else ():
        click.echo(f"{line.what}: {line.text}", err=True)
