"""The console: the report as tables, and progress on a terminal."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from onnx_lowrank.cli.tables import (
    OUTPUT_COLUMNS,
    alike,
    name_text,
    output_cells,
    print_notes,
    samples_text,
    table_of,
)
from onnx_lowrank.files import is_standard_output
from onnx_lowrank.measures import Check, Judged, Latency, speedup_text
from onnx_lowrank.phrases import counted, listed
from onnx_lowrank.progress import Advance
from onnx_lowrank.report import BudgetReport, Healing, Layer, Report

__all__ = ["TerminalProgress", "output_console", "print_report"]

# A pipe has no width; a table that is cut to 80 columns would lose its names and reasons.
_PIPE_WIDTH = 200
_DAMAGES = {
    "outputs": "mean relative square error of the outputs",
    "classes": "Kullback-Leibler divergence of the classes, nats a row",
}


def output_console(*written: Path | None) -> Console:
    """The console for results: standard output, wide where it is no terminal.

    Names are shown as they are: brackets and colons in a path are no markup.

    Args:
        written: files of this run.  Where one of them is standard output itself, such as
            ``/dev/stdout`` in a pipe, the tables go to standard error.
    """
    taken = any(path is not None and is_standard_output(path) for path in written)
    stream = sys.stderr if taken else sys.stdout
    plain: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
    if stream.isatty():
        return Console(file=stream, **plain)
    return Console(file=stream, width=_PIPE_WIDTH, no_color=True, **plain)


class TerminalProgress:
    """Shows stages on standard error while they run, and leaves no trace.

    It writes to a copy of the descriptor, because standard error itself is redirected while ONNX
    Runtime works (see `onnx_lowrank.runtime.log`).
    """

    def __init__(self) -> None:
        # Names are shown as they are: neither brackets nor what the terminal cannot encode stop it.
        stream = os.fdopen(os.dup(2), "w", errors="replace")
        self._console = Console(file=stream, markup=False, emoji=False)
        self._say: Callable[[str], None] = lambda _: None

    @contextmanager
    def stage(self, name: str, total: int | None) -> Iterator[Advance]:
        """Show a bar, or a spinner where the amount of work is not known."""
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            *((BarColumn(), TaskProgressColumn()) if total else ()),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self._console, transient=True) as bar:
            task = bar.add_task(name, total=total)
            self._say = lambda text: bar.update(task, description=f"{name}: {text}")
            yield lambda done: bar.update(task, advance=done)

    def detail(self, text: str) -> None:
        """Put the text behind the stage's name."""
        self._say(text)


def print_report(report: Report, console: Console) -> None:
    """The report at a glance."""
    if report.verdict is not None:
        console.print(Text(f"{report.verdict.level}: {report.verdict.text}", style="bold red"))
    if report.summary:
        console.print(Text(report.summary, style="bold"))
    if report.layers:
        _print_layers(report.layers, console)
    _print_totals(report, console)
    if report.check is not None:
        _print_check(report.check, console)
    if report.healing is not None:
        console.print(_healing_line(report.healing))
    for latency in report.latency:
        console.print(_latency_line(latency))
    if report.goal is not None:
        console.print(Text(_goal_line(report.goal)))
    if report.judged is not None and (report.goal is None or report.goal.loss is None):
        console.print(Text(_judged_line(report.judged)))
    print_notes(report.notes, console)
    if report.output.path is not None:
        console.print(f"wrote {report.output.path}")


def _healing_line(healing: Healing) -> str:
    kept = f"step {healing.best_step} of {healing.steps}" if healing.best_step else "the start"
    return (
        f"healing: held-out error {healing.error_before:.3g} → {healing.error_after:.3g} "
        f"(relative L2; kept: {kept}; {healing.trained} constants, {healing.batches} batches, "
        f"{healing.held_out} held out, {healing.seconds:.0f} s)"
    )


def _print_layers(layers: Sequence[Layer], console: Console) -> None:
    factored = sum(layer.status == "factored" for layer in layers)
    off = Counter((layer.form, layer.reason.partition(":")[0]) for layer in layers if layer.off)
    layers = [layer for layer in layers if not layer.off]
    table = table_of(
        "layer",
        "form",
        "m×n",
        "rank",
        "kept",
        "energy",
        "error",
        *(["why dense"] if any(layer.status == "dense" for layer in layers) else []),
    )
    for layer, more in alike(layers, _fate):
        table.add_row(
            name_text(layer.name, more),
            layer.form,
            _shape(layer),
            "–" if layer.rank is None else str(layer.rank),
            "" if layer.rank is None else f"{_share(layer):.2f}",
            "" if layer.energy is None else f"{layer.energy:.4f}",
            _error(layer),
            *([] if layer.status == "factored" else [Text(layer.reason)]),
        )
    kinds = {layer.energy_of for layer in layers}
    what = ", energy and error of the outputs" if factored and kinds != {"weight"} else ""
    what += ", weighted by Fisher information" if factored and "fisher" in kinds else ""
    maps = counted(len(layers), "linear map")
    console.print(f"{maps}, {factored} factored{what}", style="bold")
    if layers:
        console.print(table)
    leaders = dict.fromkeys(layer.first_factor_of for layer in layers if layer.first_factor_of)
    for leader in leaders:
        names = [layer.name for layer in layers if layer.first_factor_of == leader]
        console.print(
            Text(f"{listed(names, 4)}: first factor shared with {leader}, where it counts", "dim")
        )
    for (form, reason), count in off.items():
        console.print(Text(f"{count} more left dense ({form}): {reason}", style="dim"))


def _fate(layer: Layer) -> tuple[object, ...]:
    """What layers that read one weight and fare alike have in common; others stand alone."""
    alone = None if layer.shared else layer.name
    return layer.weight, layer.form, layer.shape, layer.rank, layer.reason, alone


def _error(layer: Layer) -> str:
    """Of the outputs on held-out samples where they were fitted to, else of the weight."""
    fitted = layer.energy_of != "weight"
    error = layer.output_error if fitted else layer.weight_error
    if error is None and fitted:
        error = layer.predicted_error
    return "" if error is None else f"{error:.3g}"


def _shape(layer: Layer) -> str:
    if layer.shape is None:
        return "?"
    text = f"{layer.shape[0]}×{layer.shape[1]}"
    return f"{layer.slices}×({text})" if layer.slices > 1 else text


def _share(layer: Layer) -> float:
    return layer.parameters_after / layer.parameters_before if layer.parameters_before else 1.0


def _print_totals(report: Report, console: Console) -> None:
    totals = report.totals
    table = table_of("", "before", "after", "change")
    rows: list[tuple[str, int | None, int | None]] = [
        ("parameters", totals.parameters_before, totals.parameters_after),
        (
            "linear parameters",
            totals.linear_parameters_before,
            totals.linear_parameters_after,
        ),
        ("MACs of one inference", totals.macs_before, totals.macs_after),
        ("bytes", report.input.bytes, report.output.bytes),
    ]
    for name, before, after in rows:
        if before is None or after is None:
            table.add_row(name, "?", "?", "")
            continue
        table.add_row(name, f"{before:,}", f"{after:,}", _change(before, after))
    console.print("totals", style="bold")
    console.print(table)


def _change(before: int, after: int) -> str:
    if not before:
        return ""
    change = f"{100 * (after - before) / before:+.1f} %"
    return f"{change} ({before / after:.2f}×)" if after else change


def _print_check(check: Check, console: Console) -> None:
    samples = samples_text(check.samples, check.data)
    for provider in check.providers:
        table = table_of("output", *OUTPUT_COLUMNS)
        for output in provider.outputs:
            table.add_row(Text(output.name), *output_cells(output))
        console.print(Text(f"check: {samples}, {provider.provider}"), style="bold")
        console.print(table)


def _judged_line(judged: Judged) -> str:
    sure = "" if judged.standard_error is None else f", standard error {judged.standard_error:.2g}"
    return (
        f"metric: {judged.metric} {judged.before:.4g} → {judged.after:.4g} (loss {judged.loss:.3g}"
        f"{sure}; {counted(judged.samples, 'sample')})"
    )


def _goal_line(goal: BudgetReport) -> str:
    parts = []
    if goal.loss is not None:
        sure = "" if goal.loss_error is None else f" (standard error {goal.loss_error:.2g})"
        parts.append(
            f"loss {goal.loss:.3g} by {goal.metric} on samples that no search has seen{sure}"
        )
    damages = [
        f"{damage:.3g} {what}"
        for damage, what in (
            (goal.predicted_damage, "predicted"),
            (goal.achieved_damage, "achieved"),
        )
        if damage is not None
    ]
    if damages:
        parts.append(f"damage {', '.join(damages)} ({_DAMAGES[goal.damage_of]})")
    else:
        parts.append("damage not measured")
    if goal.evaluations:
        parts.append(f"{goal.evaluations} evaluations on {goal.samples} samples")
    return f"goal: {goal.option}" + (": " if parts else "") + "; ".join(parts)


def _latency_line(latency: Latency) -> str:
    speedup, threads = latency.speedup, counted(latency.threads, "thread")
    return (
        f"latency: {latency.before_ms.median:.3g} → {latency.after_ms.median:.3g} ms (median of "
        f"{latency.pairs} pairs in turns, {latency.provider}, {threads}); "
        f"{speedup_text(speedup.median, *speedup.certain)}"
    )
