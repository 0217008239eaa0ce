"""Screen: where results are shown, a terminal of some width or a pipe.

On a terminal no line is wider than it, and lines end between words; a word that is longer, such as
a path, is left to the terminal, from which it can be copied whole.  In a pipe every line is as
long as it is.  COLUMNS, NO_COLOR and TERM=dumb are followed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

from onnx_lowrank.cli.grid import Grid, Laid
from onnx_lowrank.cli.shorten import wrapped
from onnx_lowrank.files import is_standard_output
from onnx_lowrank.phrases import listed, printable

__all__ = ["Screen", "output_screen", "terminal_width"]

# Rows of a table that are looked at on a terminal; others are summed up.
_ROWS = 20
_USUAL, _LEAST = 80, 40


class Screen:
    """Shows lines and tables.

    Attributes:
        width: of the terminal; None in a pipe.
        rows: how many rows of a table are shown; None for all.
        every: whether all rows were asked for.
    """

    def __init__(self, stream: TextIO, *, every: bool = False, quiet: bool = False) -> None:
        """Look at a stream.

        Args:
            stream: where to.
            every: whether all rows are shown, also on a terminal.
            quiet: whether nothing is shown.
        """
        self._quiet, self.every = quiet, every
        # Names are shown as they are: brackets and colons in a path are no markup.
        plain: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
        self.width = terminal_width(stream) if stream.isatty() else None
        self.rows = None if self.width is None or every else _ROWS
        self._console = Console(file=stream, no_color=None if self.width else True, **plain)

    def line(self, text: str, style: str = "") -> None:
        """Show a text, in several lines where it is longer than the terminal is wide."""
        text = printable(text)
        if self.width is None:
            self._raw(text.rstrip(), style)
            return
        hanging = len(text) - len(text.lstrip()) + 2
        for line in wrapped(text, self.width, hanging):
            self._raw(line, style)

    def table(self, grid: Grid) -> Laid:
        """Show a table, and which columns have no room; returns what was shown."""
        laid = grid.laid(self.width)
        for line in laid.lines:
            self._raw(line, "")
        if laid.left_out:
            heads = listed(laid.left_out, len(laid.left_out))
            self.line(f"no room for: {heads}", "dim")
        return laid

    def notes(self, notes: Sequence[str], what: str = "note") -> None:
        """One paragraph for each note."""
        for note in notes:
            self.line(f"{what}: {note}", "yellow")

    def _raw(self, line: str, style: str) -> None:
        if not self._quiet:
            self._console.print(Text(line, style), soft_wrap=True)


def terminal_width(stream: TextIO) -> int:
    """Columns of a terminal: as COLUMNS says, or as it says itself."""
    told = os.environ.get("COLUMNS", "")
    if told.isdecimal() and int(told):
        return max(int(told), _LEAST)
    try:
        return max(os.get_terminal_size(stream.fileno()).columns or _USUAL, _LEAST)
    except (OSError, ValueError):
        return _USUAL


def output_screen(*written: Path | None, every: bool = False, quiet: bool = False) -> Screen:
    """The screen for results: standard output.

    Args:
        written: files of this run.  Where one of them is standard output itself, such as
            ``/dev/stdout`` in a pipe, the tables go to standard error.
        every: whether all rows of a table are shown, also on a terminal.
        quiet: whether nothing is shown.
    """
    taken = any(path is not None and is_standard_output(path) for path in written)
    return Screen(sys.stderr if taken else sys.stdout, every=every, quiet=quiet)
