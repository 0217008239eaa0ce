"""Grid: a table as lines, whole in a pipe, and on a terminal within its width.

Other than a table of rich it cuts names in the middle, lets a text stand in the place of all cells
that a row does not have, leaves whole columns out where the terminal is narrow, and ends no line
with blanks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.cells import cell_len

from onnx_lowrank.cli.shorten import cut_names, cut_text, wrapped
from onnx_lowrank.phrases import printable

__all__ = ["Column", "Grid", "Laid"]

_BETWEEN = 2
# What a text that goes on below has of the width, where it needs that much.
_FOLDED = 30
# A text that would be cut to less than this is not begun.
_LEAST_TEXT = 12


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        head: what stands above it.
        left: whether its cells stand to the left, as text does; numbers stand to the right.
        least: of names, to how many columns they may be cut in the middle; 0 never cuts.
        leave: where the terminal is narrow, the column with the highest number goes first; with
            0 it stays.
    """

    head: str
    left: bool = False
    least: int = 0
    leave: int = 0


@dataclass(frozen=True)
class _Row:
    cells: tuple[str, ...]
    rest: str


@dataclass(frozen=True)
class Laid:
    """A table as lines.

    Attributes:
        lines: the heads, then the rows.
        cut: number of a row -> the text that stands there, if at all, cut.
        left_out: heads of the columns that are not shown.
    """

    lines: tuple[str, ...]
    cut: dict[int, str]
    left_out: tuple[str, ...]


@dataclass
class Grid:
    """A table that is filled row by row.

    Attributes:
        columns: from left to right.
        fold: whether a text that is too long for its row goes on in lines of its own; else it is
            cut.
    """

    columns: Sequence[Column]
    fold: bool = False
    _rows: list[_Row] = field(default_factory=list)

    def add(self, *cells: str, rest: str = "") -> None:
        """Add a row.

        Args:
            cells: of all columns, or of the first ones.
            rest: a text behind them, in the place of the other cells.
        """
        self._rows.append(_Row(tuple(map(printable, cells)), printable(rest)))

    def __len__(self) -> int:
        """How many rows there are."""
        return len(self._rows)

    def laid(self, width: int | None) -> Laid:
        """The lines.

        Args:
            width: of the terminal; None for a pipe, where nothing is cut.
        """
        columns = range(len(self.columns))
        widths = [self._width(index) for index in columns]
        shown = list(columns)
        if width is not None:
            folded = max((cell_len(row.rest) for row in self._rows), default=0) if self.fold else 0
            width -= min(folded, _FOLDED) + (_BETWEEN if folded else 0)
            shown = self._shown(shown, widths, width)
            over = _total([widths[index] for index in shown]) - width
            for index in shown:
                least = self.columns[index].least
                if over > 0 and least:
                    smaller = max(widths[index] - over, min(least, widths[index]))
                    over -= widths[index] - smaller
                    widths[index] = smaller
            width += min(folded, _FOLDED) + (_BETWEEN if folded else 0)
        cells = self._cells(widths)
        for index, column in enumerate(self.columns):
            if column.least:  # they may be shorter than there was room for
                left = (cell_len(row[index]) for row in cells if index < len(row))
                widths[index] = max([cell_len(column.head), *left])
        lines = [self._line([c.head for c in self.columns], shown, widths)]
        cut = {}
        for number, row in enumerate(self._rows):
            own = [index for index in shown if index < len(row.cells)]
            line = self._line(cells[number], own, widths)
            if row.rest:
                start = _total([widths[index] for index in own]) + (_BETWEEN if own else 0)
                texts, room = [row.rest], (width or 0) - start
                if width is not None and cell_len(row.rest) > room:
                    if self.fold:
                        texts = wrapped(row.rest, max(room, _LEAST_TEXT), hanging=0)
                    else:
                        texts = [cut_text(row.rest, room) if room >= _LEAST_TEXT else ""]
                        cut[number] = row.rest
                line = f"{line}{'':{start - cell_len(line)}}{texts[0]}".rstrip()
                lines += [line, *(f"{'':{start}}{text}" for text in texts[1:])]
            else:
                lines.append(line)
        left_out = tuple(self.columns[i].head for i in columns if i not in shown)
        return Laid(tuple(lines), cut, left_out)

    def _width(self, index: int) -> int:
        own = [cell_len(row.cells[index]) for row in self._rows if index < len(row.cells)]
        return max([cell_len(self.columns[index].head), *own])

    def _shown(self, shown: list[int], widths: Sequence[int], width: int) -> list[int]:
        """The columns without those that have no room even where names are cut."""

        def needed(index: int) -> int:
            least = self.columns[index].least
            return min(widths[index], least) if least else widths[index]

        while _total([needed(index) for index in shown]) > width:
            last = max(shown, key=lambda index: self.columns[index].leave)
            if not self.columns[last].leave:
                break
            shown = [index for index in shown if index != last]
        return shown

    def _cells(self, widths: Sequence[int]) -> list[list[str]]:
        """The rows' cells, names cut to their columns."""
        rows = [list(row.cells) for row in self._rows]
        for index, column in enumerate(self.columns):
            if column.least:
                own = [row for row in rows if index < len(row)]
                cut = cut_names([row[index] for row in own], widths[index])
                for row, name in zip(own, cut, strict=True):
                    row[index] = name
        return rows

    def _line(self, cells: Sequence[str], shown: Sequence[int], widths: Sequence[int]) -> str:
        parts = []
        for index in shown:
            blanks = " " * max(widths[index] - cell_len(cells[index]), 0)
            left = self.columns[index].left
            parts.append(cells[index] + blanks if left else blanks + cells[index])
        return (" " * _BETWEEN).join(parts).rstrip()


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + _BETWEEN * max(len(widths) - 1, 0)
