"""What a person sees of ``check``, ``bench`` and ``providers``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import PurePath

from rich.console import Console
from rich.table import Table
from rich.text import Text

from onnx_lowrank.benchmark import BenchReport, ModelBench, Ratio, TargetBench
from onnx_lowrank.comparison import CheckReport, ModelOnTarget, TargetCheck
from onnx_lowrank.report import OutputCheck
from onnx_lowrank.targets.base import Offer

__all__ = ["print_bench_report", "print_check_report", "print_offers"]

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
