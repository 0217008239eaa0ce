"""The command ``onnx-lowrank``.

Two paths are the main job; a verb in their place is another one.  Nothing heavy is imported
until a job is known to run, so that ``--help`` answers at once.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import traceback

import click
from click.shell_completion import CompletionItem

from onnx_lowrank.cli.bench import command as bench
from onnx_lowrank.cli.check import command as check
from onnx_lowrank.cli.compress import command as compress
from onnx_lowrank.cli.inspect import command as inspect
from onnx_lowrank.cli.options import write_groups
from onnx_lowrank.cli.providers import command as providers
from onnx_lowrank.cli.support import command as support
from onnx_lowrank.cli.sweep import command as sweep
from onnx_lowrank.compression.verbs import COMPRESS, spelling
from onnx_lowrank.errors import LowRankError, spelled
from onnx_lowrank.runtime.log import reserve_stderr

__all__ = ["exit_code", "run"]

_MAIN = COMPRESS.name


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
        write_groups(self.commands[_MAIN], ctx, formatter, examples=True)
        verbs = [
            (name, command.get_short_help_str(200))
            for name, command in sorted(self.commands.items())
            if name != _MAIN
        ]
        with formatter.section("Verbs (onnx-lowrank VERB --help)"):
            formatter.write_dl(verbs)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """The first word: a verb, an option of the main job, or the file IN."""
        job = self.commands[_MAIN]
        own = super().shell_complete(ctx, incomplete)
        taken = {item.value for item in own}
        with click.Context(job, parent=ctx, info_name=_MAIN) as inner:
            own += [i for i in job.shell_complete(inner, incomplete) if i.value not in taken]
        if not incomplete.startswith("-"):
            own.append(CompletionItem(incomplete, type="file"))
        return own


@click.group(
    cls=_Verbs,
    help=_HELP,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="onnx-lowrank", message="%(package)s %(version)s")
def cli() -> None:
    """The command."""


for _verb in (compress, bench, check, inspect, providers, support, sweep):
    cli.add_command(_verb)


def run(args: list[str]) -> int:
    """Run the command as a program of its own, and return its exit code."""
    reserve_stderr()  # before ONNX Runtime is imported, in case standard error is closed
    # ONNX Runtime 1.32 sends usage data to its maker, and writes a warning to standard error where
    # it cannot keep an identifier in the home folder.  Who wants that sets the variable to 0.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    if isinstance(sys.stdout, io.TextIOWrapper):
        # What a stream cannot encode, such as × in an old code page, must not end the program.
        sys.stdout.reconfigure(errors="replace")
    return exit_code(args)


def exit_code(args: list[str]) -> int:
    """Run the command; a failure is printed on standard error.  Returns the exit code."""
    # Nothing that a library logs about a model belongs on standard error.
    logging.getLogger().addHandler(logging.NullHandler())
    with spelled(spelling):
        return _exit_code(args)


def _exit_code(args: list[str]) -> int:
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
    except OSError as error:
        where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        return _fail(f"{where}{error.strerror or error}", 1)
    except Exception as error:  # a fault of this program
        if "--verbose" in args:
            traceback.print_exc()
        name = type(error).__name__
        text = " ".join(str(error).split())
        return _fail(f"internal error: {name}: {text}; --verbose shows the traceback", 1)


def _fail(message: str, code: int) -> int:
    click.echo(f"onnx-lowrank: error: {message}", err=True)
    return code
