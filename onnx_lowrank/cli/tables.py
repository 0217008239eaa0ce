"""What a person sees of ``check``, ``bench`` and ``providers``."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import PurePath

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
from onnx_lowrank.report import OutputCheck
from onnx_lowrank.targets.base import Offer
from onnx_lowrank.targets.support import ModelSupport, SupportReport

__all__ = [
    "print_bench_report",
    "print_check_report",
    "print_inspection",
    "print_offers",
    "print_support",
]

_LEFT = frozenset(
    {"", "compared", "costs", "how found, or what is missing", "install", "model", "nodes"}
    | {"output", "target", "times"}
)


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in columns:
        left = column in _LEFT
        table.add_column(
            column, justify="left" if left else "right", no_wrap=not left, overflow="fold"
        )
    return table


def print_offers(offers: Sequence[Offer], console: Console) -> None:
    """Targets that are usable here, then the others with what is missing."""
    how = "how found, or what is missing"
    table = _table("target", "usable", "version", "times", how, "install")
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
    data = "random input, not real data" if report.data == "random" else report.data
    samples = f"{report.samples} sample{'' if report.samples == 1 else 's'}"
    console.print(Text(f"A: {report.models[0]}; B: {report.models[1]}; {samples} of {data}"))
    for entry in report.targets:
        _print_target(entry, console)
    _print_notes(report.notes, console)


def _print_target(entry: TargetCheck, console: Console) -> None:
    console.print(Text(_target(entry.target, entry.emulated)), style="bold")
    for letter, model in zip("AB", entry.models, strict=True):
        if model.error is not None:
            console.print(Text(f"{letter} does not run: {model.error}", style="red"))
        elif model.assignment:
            console.print(Text(f"{letter}: {_assigned(model)}"))
    table = _table("output", "compared", "max |Δ|", "relative L2", "cosine", "top-1 agreement")
    rows: list[tuple[str, Iterable[OutputCheck]]] = [("B with A", entry.outputs)]
    for letter, model in zip("AB", entry.models, strict=True):
        rows.append((f"{letter} with {letter} on the CPU", model.against_cpu))
    for compared, outputs in rows:
        for output in outputs:
            top = output.top1_agreement
            table.add_row(
                Text(output.name),
                compared,
                f"{output.max_abs_error:.3g}",
                f"{output.relative_l2:.3g}",
                f"{output.cosine:.5f}",
                "" if top is None else f"{100 * top:.1f} %",
            )
    if table.row_count:
        console.print(table)


def print_bench_report(report: BenchReport, console: Console) -> None:
    """One table for each target and number of threads, the ratios, and how noisy it was."""
    shapes = ", ".join(f"{name} {list(shape)}" for name, shape in report.shapes.items())
    console.print(Text(f"input: {shapes}"))
    for entry in report.targets:
        _print_bench(entry, console)
    console.print(Text(str(report.noise)))
    _print_notes(report.notes, console)


def _print_bench(entry: TargetBench, console: Console) -> None:
    threads = "" if entry.threads is None else f", threads: {entry.threads}"
    console.print(Text(_target(entry.target, entry.emulated) + threads), style="bold")
    times = () if entry.emulated else ("median ms", "p90", "p99", "first", "load", "peak MB")
    table = _table("model", *times, "costs", "nodes")
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
    unsure = ratio.low <= 1.0 <= ratio.high
    return (
        f"{after} is {ratio.median:.2f}× as fast as {before}, 95 % interval "
        f"{ratio.low:.2f}× to {ratio.high:.2f}×"
        + (": no difference that can be told" if unsure else "")
    )


def _costs(model: ModelBench | ModelOnTarget) -> str:
    return ", ".join(f"{name} {value:,.0f}" for name, value in sorted(model.costs.items()))


def _assigned(model: ModelOnTarget) -> str:
    costs = _costs(model)
    return f"{model.assignment}; {costs}" if costs else model.assignment


def _target(name: str, emulated: bool) -> str:
    return f"{name} (emulated)" if emulated else name


def _print_notes(notes: Sequence[str], console: Console) -> None:
    for note in notes:
        console.print(Text(f"note: {note}", style="yellow"))


def print_inspection(inspection: Inspection, console: Console) -> None:
    """The inspection as two tables."""
    console.print(f"{inspection.path}: {inspection.parameters:,} parameters")
    table = Table(box=None, padding=(0, 2, 0, 0), title_justify="left")
    maps = len({(row.name, row.weight) for row in inspection.entries})
    table.title = f"{maps} linear map{'' if maps == 1 else 's'} with a constant weight"
    for column in ("layer", "form", "m×n", "of model", "break-even"):
        left = column in ("layer", "form")
        table.add_column(column, justify="left" if left else "right", overflow="fold")
    for energy in ENERGIES:
        table.add_column(f"rank at {energy:g}", justify="right")
    table.add_column("note", overflow="fold")
    for row, more in _one_a_weight(inspection.entries):
        table.add_row(
            Text(f"{row.name} (+{more} with the same weight)" if more else row.name),
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


def _one_a_weight(rows: Sequence[Inspected]) -> Iterator[tuple[Inspected, int]]:
    """The rows, those that say the same of one weight as one, with the number of the others."""
    alike: dict[Inspected, int] = {}
    first: dict[Inspected, Inspected] = {}
    for row in rows:
        key = replace(row, name="")
        alike[key] = alike.get(key, -1) + 1
        first.setdefault(key, row)
    return ((first[key], more) for key, more in alike.items())


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
    table = Table(box=None, padding=(0, 2, 0, 0))
    both = report.before is not None
    table.add_column("provider", no_wrap=True)
    for title in ("nodes taken", "partitions"):
        table.add_column(f"{title}, before → after" if both else title, justify="right")
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
            count = len(entry.model.left)
            plural = "" if count == 1 else "s"
            console.print(Text(f"{entry.provider} leaves {count} node{plural} to the CPU:"))
            _print_left(entry.model, console, every=every)
    for note in report.notes:
        console.print(Text(f"note: {note}", style="yellow"))


def _print_left(model: ModelSupport, console: Console, *, every: bool) -> None:
    if every:
        for node in model.left:
            console.print(Text(f"  {node.name} ({node.op_type}): {node.rule}"))
        return
    rules = Counter((node.op_type, _kind(node.rule)) for node in model.left)
    for (op_type, kind), count in rules.most_common():
        alike = [n for n in model.left if n.op_type == op_type and _kind(n.rule) == kind]
        more = "" if count == 1 else f" and {count - 1} more {op_type}"
        console.print(Text(f"  {alike[0].name} ({op_type}){more}: {alike[0].rule}"))


def _kind(rule: str) -> str:
    """A rule without the names and numbers of one node."""
    return rule.partition(",")[0]
