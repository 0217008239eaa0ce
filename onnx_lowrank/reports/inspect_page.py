"""The page of an inspection: the ranks that each linear map needs, and what budgets would give."""

from __future__ import annotations

from collections.abc import Iterable

from onnx_lowrank.compression.inspection import Inspected, Inspection
from onnx_lowrank.compression.provenance import provenance_line
from onnx_lowrank.phrases import size
from onnx_lowrank.reports.charts import spark
from onnx_lowrank.reports.frame import again, notes, page, section, table
from onnx_lowrank.reports.markup import Html, joined, name, tag
from onnx_lowrank.reports.sortable import Heading, TableCell, TableRow, sortable
from onnx_lowrank.reports.texts import (
    change,
    count,
    file_name,
    inspect_sentence,
    maps_of,
    percent,
    samples_of,
)

__all__ = ["inspect_page"]


def inspect_page(report: Inspection) -> str:
    """The page of an inspection."""
    model = file_name(report.path)
    return page(
        f"inspect: {model}",
        report.tool,
        inspect_sentence(report),
        joined(["inspect ", name(model)]),
        [
            _made(report),
            _budgets(report),
            _maps(report),
            _others(report.others, report.parameters),
            notes(("missed", report.missed), ("note", report.notes)),
            again(report.origin, [report.input]),
        ],
    )


def _made(report: Inspection) -> Html | None:
    """How the model was made, where it says so."""
    if report.recipe is None:
        return None
    return tag("p", provenance_line(report.recipe), class_="summary")


def _budgets(report: Inspection) -> Html | None:
    if not report.budgets:
        return None
    rows = [
        (
            f"{budget.keep:g}",
            str(budget.factored),
            size(budget.bytes),
            change(report.input.bytes, budget.bytes),
            "" if budget.macs is None else count(budget.macs),
            "" if budget.damage is None else f"{budget.damage:.3g}",
        )
        for budget in report.budgets
    ]
    head = ("Keep", "Pairs", "Size", "Change", "MACs", "Damage")
    return section(
        "What budgets would give",
        table(head, rows),
        lead="Predicted. Damage is the mean relative square error of the outputs; its root is "
        "about their relative L2 error.",
    )


def _maps(report: Inspection) -> Html | None:
    if not report.entries:
        return None
    columns = [
        Heading("Layer", text=True),
        Heading("m×n"),
        Heading("Of model"),
        Heading("Spectrum", text=True, sorts=False),
        Heading("Break-even"),
        *(Heading(f"At {energy:g}") for energy in report.energies),
        Heading("Half holds"),
        Heading("Note", text=True),
    ]
    rows = [_row(entry, report) for entry in report.entries]
    of = "weights alone"
    if report.calibration is not None:
        calibration = report.calibration
        of = f"outputs on {samples_of(calibration.samples, calibration.data)}"
    return section(
        maps_of(report),
        sortable(columns, rows, "names, scopes, notes"),
        lead=f"Ranks that hold so much of the energy of the {of}, and the share that a pair of "
        "half the parameters holds. A spectrum shows singular values over three decades; a pair "
        "saves parameters below the broken line.",
    )


def _row(entry: Inspected, report: Inspection) -> TableRow:
    share = entry.parameters / report.parameters if report.parameters else 0.0
    ranks = [TableCell(str(rank), rank) for rank in entry.ranks] or [TableCell("")] * len(
        report.energies
    )
    even = entry.break_even
    below = None if entry.scope is None else tag("span", name(entry.scope), class_="below")
    cells = [
        TableCell(joined([name(entry.name), below]), entry.name),
        TableCell(_shape(entry), entry.parameters),
        TableCell(percent(share), share),
        TableCell("" if entry.spectrum is None else spark(entry.spectrum, None)),
        TableCell("" if even is None else f"{even:.0f}", even),
        *ranks,
        TableCell("" if entry.half is None else f"{entry.half:.4f}", entry.half),
        TableCell(entry.reason, entry.reason),
    ]
    return TableRow("factorable" if entry.ranks else "left", cells)


def _shape(entry: Inspected) -> Html:
    shape = entry.shape or ()
    shown = shape[1:] if len(shape) == 3 and shape[0] == 1 else shape
    text = "×".join(map(str, shown)) or "?"
    return tag("span", text, tag("span", entry.form, class_="below"))


def _others(others: Iterable[Inspected], parameters: int) -> Html | None:
    """Large constants that no listed node reads."""
    items = [
        tag(
            "li",
            name(entry.weight),
            f", {percent(entry.parameters / parameters)} of the parameters: {entry.reason}",
        )
        for entry in others
    ]
    return section("Not handled", tag("ul", joined(items))) if items else None
