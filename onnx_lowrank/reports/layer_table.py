"""The layers of a run on its page: where parameters, bytes and time go, and one row a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from onnx_lowrank.phrases import counted, size
from onnx_lowrank.reports.charts import spark
from onnx_lowrank.reports.frame import bar, section
from onnx_lowrank.reports.markup import Html, joined, name, tag
from onnx_lowrank.reports.sortable import Heading, TableCell, TableRow, sortable
from onnx_lowrank.reports.texts import (
    count,
    error,
    milliseconds,
    percent,
    without_common,
)
from onnx_lowrank.schema.layer import Layer, achieved_error
from onnx_lowrank.schema.report import Report

__all__ = ["layer_section", "where_section"]

_SHOWN = 12
"""Layers that are named where parameters, bytes and time go; the others are summed up."""


@dataclass(frozen=True)
class _Measure:
    """Something that layers have before and after, and how it is written.

    ``whole`` is what all of the model has, where it is known.
    """

    title: str
    of: Callable[[Layer], tuple[float | None, float | None]]
    write: Callable[[float], str]
    whole: tuple[float | None, float | None] = (None, None)
    shared: bool = False


def _measures(report: Report) -> Iterator[_Measure]:
    totals = report.totals
    yield _Measure(
        "Parameters",
        lambda layer: (layer.parameters_before, layer.parameters_after),
        count,
        (totals.parameters_before, totals.parameters_after),
        shared=True,
    )
    yield _Measure(
        "Bytes",
        lambda layer: (layer.bytes_before, layer.bytes_after),
        size,
        (report.input.bytes, report.output.bytes),
        shared=True,
    )
    yield _Measure(
        "MACs",
        lambda layer: (layer.macs_before, layer.macs_after),
        count,
        (totals.macs_before, totals.macs_after),
    )
    yield _Measure("Time", lambda layer: (layer.ms_before, layer.ms_after), milliseconds)


def where_section(report: Report) -> Html | None:
    """Bars by layer, before and after; one list for each of the measures that are known."""
    lists = [
        (measure.title, made)
        for measure in _measures(report)
        if (made := _bars(report.layers, measure)) is not None
    ]
    if not lists:
        return None
    parts: list[Html] = []
    for number, (title, _) in enumerate(lists):
        key = f"where-{number}"
        parts.append(
            tag("input", type="radio", name="where", id=key, checked=number == 0, class_="pick")
        )
        parts.append(tag("label", title, for_=key))
    parts += [made for _, made in lists]
    return section(
        "Where it goes",
        tag("div", *parts, class_="tabs"),
        lead="The pale bar is the original, the strong one the result.",
    )


def _bars(layers: Sequence[Layer], measure: _Measure) -> Html | None:
    """The largest layers, the others in one row, and what is in no layer.

    A layer is called by its scope where that says more than the node's name.
    """
    rows: list[tuple[str, float, float]] = []
    seen: set[str] = set()
    for layer in layers:
        before, after = measure.of(layer)
        if before is None or after is None or (measure.shared and layer.weight in seen):
            continue
        seen.add(layer.weight)
        rows.append((_label(layer), before, after))
    if not rows:
        return None
    listed = sum(row[1] for row in rows), sum(row[2] for row in rows)
    rows.sort(key=lambda row: -row[1])
    named, others = rows[:_SHOWN], rows[_SHOWN:]
    labels = without_common([row[0] for row in named])
    shown: list[tuple[Html | str, float, float]] = [
        (name(label), *row[1:]) for label, row in zip(labels, named, strict=True)
    ]
    if others:
        text = counted(len(others), "other layer")
        shown.append((text, sum(row[1] for row in others), sum(row[2] for row in others)))
    whole = [value for value in measure.whole if value is not None]
    if len(whole) == 2:
        rest = [max(0.0, value - own) for value, own in zip(whole, listed, strict=True)]
        if max(rest) > 0.001 * whole[0]:
            shown.append(("everything else", rest[0], rest[1]))
    most = max(max(row[1], row[2]) for row in shown)
    body = [
        tag(
            "li",
            tag("span", label, class_="who"),
            bar(before, after, most),
            tag("span", f"{measure.write(before)} → {measure.write(after)}", class_="much"),
        )
        for label, before, after in shown
    ]
    return tag("ol", joined(body), class_="bars")


def _label(layer: Layer) -> str:
    """Its scope, unless that is a mere number, as in a Sequential."""
    scope = layer.scope or ""
    return scope if any(map(str.isalpha, scope)) else layer.name


_COLUMNS = (
    Heading("Layer", text=True),
    Heading("m×n"),
    Heading("Rank"),
    Heading("Kept"),
    Heading("Spectrum", text=True, sorts=False),
    Heading("Energy"),
    Heading("Predicted"),
    Heading("Error"),
    Heading("What became of it", text=True),
)


def layer_section(report: Report) -> Html | None:
    """One row for each linear map, to be sorted, searched and filtered."""
    layers = report.layers
    if not layers:
        return None
    factored = sum(layer.status == "factored" for layer in layers)
    return section(
        f"{counted(len(layers), 'linear map')}, {factored} factored",
        sortable(_COLUMNS, [_row(layer) for layer in layers], "names, scopes, reasons"),
        lead=_legend(layers),
    )


def _legend(layers: Sequence[Layer]) -> str:
    kinds = {layer.energy_of for layer in layers if layer.rank is not None}
    what = {"output": "outputs on samples", "fisher": "outputs, weighted by Fisher information"}
    of = " and ".join(what.get(kind, "weights") for kind in sorted(kinds)) or "weights"
    return (
        f"Energy and errors are those of the layers' {of}. A spectrum shows singular values over "
        "three decades: filled is what the rank keeps, the broken line the rank from which on a "
        "pair saves nothing."
    )


def _row(layer: Layer) -> TableRow:
    energy, kept = layer.energy, None if layer.rank is None else _share(layer)
    cells = [
        TableCell(_named(layer), layer.name),
        TableCell(_shape(layer), layer.parameters_before),
        TableCell(_rank(layer), layer.rank),
        TableCell(_kept(layer), kept),
        TableCell("" if layer.spectrum is None else spark(layer.spectrum, layer.rank)),
        TableCell("" if energy is None else f"{energy:.4f}", energy),
        TableCell(error(layer.predicted_error), layer.predicted_error),
        TableCell(error(achieved_error(layer)), achieved_error(layer)),
        TableCell(_fate(layer), layer.reason),
    ]
    return TableRow("off" if layer.off else layer.status, cells)


def _named(layer: Layer) -> Html:
    below = None if layer.scope is None else tag("span", name(layer.scope), class_="below")
    return joined([name(layer.name), below])


def _shape(layer: Layer) -> Html:
    text = "?" if layer.shape is None else f"{layer.shape[0]}×{layer.shape[1]}"
    text = f"{layer.slices}×({text})" if layer.slices > 1 else text
    return tag("span", text, tag("span", layer.form, class_="below"))


def _rank(layer: Layer) -> Html | str:
    if layer.rank is None:
        return "dense"
    even = None if layer.spectrum is None else layer.spectrum.break_even
    below = None if even is None else tag("span", f" of {even:.0f}", class_="below")
    return tag("span", str(layer.rank), below)


def _share(layer: Layer) -> float:
    return layer.parameters_after / layer.parameters_before if layer.parameters_before else 1.0


def _kept(layer: Layer) -> Html | str:
    if layer.rank is None:
        return ""
    share = _share(layer)
    return joined([percent(share), bar(1.0, share, max(1.0, share))])


def _fate(layer: Layer) -> Html | str:
    parts = [layer.reason]
    if layer.format is not None and layer.format not in layer.reason:
        parts.append(layer.format)
    if layer.rounding_error is not None:
        parts.append(f"rounding adds {layer.rounding_error:.3g}")
    if layer.first_factor_of is not None:
        parts.append(f"first factor shared with {layer.first_factor_of}")
    if layer.refit is not None:
        parts.append(f"refit: {layer.refit[0]:.3g} → {layer.refit[1]:.3g}")
    if layer.shared:
        parts.append(f"{counted(layer.shared, 'more layer')} on the same weight")
    return "; ".join(parts)
