"""A table that can be sorted, searched and filtered; without scripts all of it is shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from onnx_lowrank.reports.markup import Html, joined, tag

__all__ = ["Heading", "TableCell", "TableRow", "sortable"]


@dataclass(frozen=True)
class Heading:
    """A column: its title, whether it holds text, and whether rows can be sorted by it."""

    title: str
    text: bool = False
    sorts: bool = True

    @property
    def kind(self) -> str:
        """Its class: text stands to the left, numbers to the right."""
        return "text" if self.text else "number"


@dataclass(frozen=True)
class TableCell:
    """What is shown, and the value that rows are sorted by; None where there is none."""

    shown: Html | str
    value: float | str | None = None


@dataclass(frozen=True)
class TableRow:
    """A row, and the kind by which it is filtered."""

    kind: str
    cells: Sequence[TableCell]


def sortable(columns: Sequence[Heading], rows: Sequence[TableRow], what: str) -> Html:
    """The table with its controls; ``page.js`` makes them work.

    Search looks at the first and the last column.

    Args:
        columns: the first names a row, the last one says more of it.
        rows: with a cell for each column.
        what: what a search looks at.
    """
    kinds: dict[str, int] = {"all": len(rows)}
    for row in rows:
        kinds[row.kind] = kinds.get(row.kind, 0) + 1
    filters = [tag("option", f"{kind} ({number})", value=kind) for kind, number in kinds.items()]
    orders = [
        tag("option", f"by {column.title if '×' in column.title else column.title.lower()}",
            value=number)
        for number, column in enumerate(columns)
        if column.sorts
    ]  # fmt: skip
    first = tag("option", "as they stand", value="")
    controls = [
        tag("input", type="search", placeholder=f"Search {what}", class_="search",
            aria_label=f"Search {what}"),
        tag("select", *filters, class_="filter", aria_label="Which rows"),
        tag("select", first, *orders, class_="order", aria_label="Order"),
        tag("output", class_="shown"),
    ]  # fmt: skip
    head = [
        tag(
            "th",
            tag("button", column.title, type="button") if column.sorts else column.title,
            class_=column.kind,
            scope="col",
        )
        for column in columns
    ]
    body = [tag("tr", *_cells(columns, row), data_status=row.kind) for row in rows]
    return tag(
        "div",
        tag("div", *controls, class_="controls"),
        tag(
            "table",
            tag("thead", tag("tr", *head)),
            tag("tbody", joined(body)),
            class_="cards layers",
        ),
        tag("button", "Show all", type="button", class_="more", hidden=True),
        data_table=True,
    )


def _cells(columns: Sequence[Heading], row: TableRow) -> list[Html]:
    """An empty cell is left out of a card."""
    return [
        tag(
            "td",
            cell.shown,
            class_=column.kind if cell.shown else f"{column.kind} empty",
            data_label=column.title,
            data_value=cell.value,
        )
        for column, cell in zip(columns, row.cells, strict=True)
    ]
