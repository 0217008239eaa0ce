"""Tables on a terminal: the one way to make them, and what a person sees of each verb."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import PurePath
from typing import TypeVar

from rich.console import Console
from rich.table import Table
from rich.text import Text

from onnx_lowrank.compression.inspection import ENERGIES, Inspected, Inspection
from onnx_lowrank.evaluation.bench import (
    BenchReport,
    ModelBench,
    Ratio,
    TargetBench,
)
from onnx_lowrank.evaluation.check import CheckReport, ModelOnTarget, TargetCheck
from onnx_lowrank.measures import OutputCheck, speedup_text
from onnx_lowrank.phrases import counted
from onnx_lowrank.targets.base import Offer
from onnx_lowrank.targets.support import ModelSupport, SupportReport

__all__ = [
    "OUTPUT_COLUMNS",
    "alike",
    "name_text",
    "output_cells",
    "print_bench_report",
    "print_check_report",
    "print_inspection",
    "print_notes",
    "print_offers",
    "print_support",
    "samples_text",
    "table_of",
]

# Columns of text; all others hold numbers and stand to the right.
_LEFT = frozenset(
    {"", "compared", "costs", "form", "how found, or what is missing", "install", "layer"}
    | {"model", "nodes", "note", "output", "provider", "target", "times", "why dense"}
)
OUTPUT_COLUMNS = ("max |Δ|", "relative L2", "cosine", "top-1 agreement")

Row = TypeVar("Row")


def table_of(*columns: str) -> Table:
    """An empty table: text to the left and folded where it is long, numbers to the right."""
    table = Table(box=None, padding=(0, 2, 0, 0), title_justify="left")
    for column in columns:
        left = column in _LEFT
        table.add_column(
            column, justify="left" if left else "right", no_wrap=not left, overflow="fold"
        )
    return table


def output_cells(output: OutputCheck) -> list[str]:
    """The cells of `OUTPUT_COLUMNS`."""
    top = output.top1_agreement
    return [
        f"{output.max_abs_error:.3g}",
        f"{output.relative_l2:.3g}",
        "" if output.cosine is None else f"{output.cosine:.5f}",
        "" if top is None else f"{100 * top:.1f} %",
    ]


def samples_text(samples: int, data: str) -> str:
    """Such as "8 samples of data.npz"."""
    source = "random input, not real data" if data == "random" else data
    return f"{counted(samples, 'sample')} of {source}"


def print_notes(notes: Iterable[str], console: Console, what: str = "note") -> None:
    """One line for each note."""
    for note in notes:
        console.print(Text(f"{what}: {note}", style="yellow"))


def alike(rows: Iterable[Row], key: Callable[[Row], Hashable]) -> Iterator[tuple[Row, int]]:
    """The first row of each key, and how many others have it, in the order of the first ones."""
    groups: dict[Hashable, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return ((same[0], len(same) - 1) for same in groups.values())


def name_text(name: str, more: int) -> Text:
    """A layer's name, and how many others read the same weight and fare alike."""
    return Text(f"{name} (+{more} with the same weight)" if more else name)


def print_offers(offers: Sequence[Offer], console: Console) -> None:
    """Targets that are usable here, then the others with what is missing."""
    how = "how found, or what is missing"
    table = table_of("target", "usable", "version", "times", how, "install")
    for offer in sorted(offers, key=lambda offer: not offer.usable):
        table.add_row(
            offer.name,
            "yes" if offer.usable else "no",
            offer.version or "–",
            "emulated: mean nothing" if offer.times == "emulated" else offer.times,
            Text(offer.found),
            Text("" if offer.usable else offer.install or ""),
        )
    console.print(table)


def print_check_report(report: CheckReport, console: Console) -> None:
    """One table for each target."""
    samples = samples_text(report.samples, report.data)
    console.print(Text(f"A: {report.models[0]}; B: {report.models[1]}; {samples}"))
    for entry in report.targets:
        _print_target(entry, console)
    print_notes(report.notes, console)


def _print_target(entry: TargetCheck, console: Console) -> None:
    console.print(Text(_target(entry.target, entry.emulated)), style="bold")
    for letter, model in zip("AB", entry.models, strict=True):
        if model.error is not None:
            console.print(Text(f"{letter} does not run: {model.error}", style="red"))
        elif model.assignment:
            console.print(Text(f"{letter}: {_assigned(model)}"))
    table = table_of("output", "compared", *OUTPUT_COLUMNS)
    rows: list[tuple[str, Iterable[OutputCheck]]] = [("B with A", entry.outputs)]
    for letter, model in zip("AB", entry.models, strict=True):
        rows.append((f"{letter} with {letter} on the CPU", model.against_cpu))
    for compared, outputs in rows:
        for output in outputs:
            table.add_row(Text(output.name), compared, *output_cells(output))
    if table.row_count:
        console.print(table)


def print_bench_report(report: BenchReport, console: Console) -> None:
    """One table for each target and number of threads, the ratios, and how noisy it was."""
    shapes = ", ".join(f"{name} {list(shape)}" for name, shape in report.shapes.items())
    console.print(Text(f"input: {shapes}"))
    for entry in report.targets:
        _print_bench(entry, console)
    console.print(Text(str(report.noise)))
    print_notes(report.notes, console)


def _print_bench(entry: TargetBench, console: Console) -> None:
    threads = "" if entry.threads is None else f", threads: {entry.threads}"
    console.print(Text(_target(entry.target, entry.emulated) + threads), style="bold")
    times = () if entry.emulated else ("median ms", "p90", "p99", "first", "load", "peak MB")
    table = table_of("model", *times, "costs", "nodes")
    for model in entry.models:
        if model.error is not None:
            console.print(Text(f"{model.model} does not run: {model.error}", style="red"))
            continue
        table.add_row(
            Text(PurePath(model.model).name),
            *([] if entry.emulated else _times(model)),
            _costs(model),
            Text(model.assignment),
        )
    if table.row_count:
        console.print(table)
    for ratio in entry.ratios:
        console.print(Text(_ratio(ratio)))


def _times(model: ModelBench) -> list[str]:
    times = (model.median_ms, model.p90_ms, model.p99_ms, model.first_ms, model.load_ms)
    peak = model.peak_bytes
    return [
        *("–" if value is None else f"{value:.3g}" for value in times),
        "–" if peak is None else f"{peak / 1e6:.0f}",
    ]


def _ratio(ratio: Ratio) -> str:
    before, after = PurePath(ratio.before).name, PurePath(ratio.after).name
    return f"{after} against {before}: {speedup_text(ratio.median, ratio.low, ratio.high)}"


def _costs(model: ModelBench | ModelOnTarget) -> str:
    return ", ".join(f"{name} {value:,.0f}" for name, value in sorted(model.costs.items()))


def _assigned(model: ModelOnTarget) -> str:
    costs = _costs(model)
    return f"{model.assignment}; {costs}" if costs else model.assignment


def _target(name: str, emulated: bool) -> str:
    return f"{name} (emulated)" if emulated else name


def print_inspection(inspection: Inspection, console: Console) -> None:
    """The inspection as two tables."""
    console.print(f"{inspection.path}: {inspection.parameters:,} parameters")
    ranks = [f"rank at {energy:g}" for energy in ENERGIES]
    table = table_of("layer", "form", "m×n", "of model", "break-even", *ranks, "note")
    maps = len({(row.name, row.weight) for row in inspection.entries})
    table.title = f"{counted(maps, 'linear map')} with a constant weight"
    for row, more in alike(inspection.entries, lambda row: replace(row, name="")):
        table.add_row(
            name_text(row.name, more),
            row.form,
            _size(row.shape),
            _percent(row.parameters, inspection.parameters),
            "" if row.break_even is None else f"{row.break_even:.1f}",
            *(_ranks(row) or [""] * len(ENERGIES)),
            Text(row.reason),
        )
    if inspection.entries:
        console.print(table)
    for row in inspection.others:
        console.print(
            Text(
                f"not handled: {row.weight} {_size(row.shape)}, "
                f"{_percent(row.parameters, inspection.parameters)} of the parameters, "
                f"{row.reason}"
            )
        )


def _ranks(row: Inspected) -> Sequence[str]:
    if row.break_even is None:
        return []
    return [f"{rank} ({rank / row.break_even:.2f})" for rank in row.ranks]


def _size(shape: tuple[int, ...] | None) -> str:
    if shape is None:
        return "?"
    if len(shape) == 3 and shape[0] == 1:
        shape = shape[1:]
    return "×".join(str(d) for d in shape) if math.prod(shape) >= 0 else ""


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else ""


def print_support(report: SupportReport, console: Console, *, every: bool) -> None:
    """A table of all providers, then what is left to the CPU and why.

    Args:
        report: from `support_of`.
        console: where to.
        every: name every node; else only how many break a rule, and the first.
    """
    change = "" if report.before is None else ", before → after"
    table = table_of("provider", f"nodes taken{change}", f"partitions{change}")
    for entry in report.providers:
        old, new = entry.before, entry.model
        taken, groups = f"{new.taken} of {new.nodes}", str(new.partitions)
        if old is not None:
            taken = f"{old.taken} of {old.nodes} → {taken}"
            groups = f"{old.partitions} → {groups}"
        table.add_row(entry.provider, taken, groups)
    console.print(Text(report.model), style="bold")
    console.print(table)
    free = ", ".join(entry.provider for entry in report.providers if not entry.asked)
    console.print(
        "MatMul, Gemm and Conv are judged by their rules, other operators by their names; "
        f"{free} took whatever was tried"
    )
    for entry in report.providers:
        if entry.model.left:
            left = counted(len(entry.model.left), "node")
            console.print(Text(f"{entry.provider} leaves {left} to the CPU:"))
            _print_left(entry.model, console, every=every)
    print_notes(report.notes, console)


def _print_left(model: ModelSupport, console: Console, *, every: bool) -> None:
    if every:
        for node in model.left:
            console.print(Text(f"  {node.name} ({node.op_type}): {node.rule}"))
        return
    kinds = alike(model.left, lambda node: (node.op_type, _kind(node.rule)))
    for node, others in sorted(kinds, key=lambda found: -found[1]):
        more = f" and {others} more {node.op_type}" if others else ""
        console.print(Text(f"  {node.name} ({node.op_type}){more}: {node.rule}"))


def _kind(rule: str) -> str:
    """A rule without the names and numbers of one node."""
    return rule.partition(",")[0]
