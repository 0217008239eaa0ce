"""What a person sees of the verbs check, bench, providers and support."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from pathlib import PurePath
from typing import TypeVar

from onnx_lowrank.cli.grid import Column, Grid
from onnx_lowrank.cli.screen import Screen
from onnx_lowrank.evaluation.bench import (
    BenchReport,
    ModelBench,
    Ratio,
    TargetBench,
)
from onnx_lowrank.evaluation.check import CheckReport, ModelOnTarget, TargetCheck
from onnx_lowrank.phrases import counted
from onnx_lowrank.schema.measures import OutputCheck, judged_text, speedup_text
from onnx_lowrank.targets.base import Offer
from onnx_lowrank.targets.support import ModelSupport, SupportReport

__all__ = [
    "OUTPUT_COLUMNS",
    "alike",
    "output_cells",
    "print_bench_report",
    "print_check_report",
    "print_offers",
    "print_outputs",
    "print_support",
    "samples_text",
    "with_same_weight",
]

OUTPUT_COLUMNS = ("max |Δ|", "relative L2", "cosine", "top-1 agreement")

# Kinds of nodes left to the CPU that a terminal shows of each provider.
_KINDS = 4

Row = TypeVar("Row")


def output_cells(output: OutputCheck) -> list[str]:
    """The cells of `OUTPUT_COLUMNS`."""
    top = output.top1_agreement
    return [
        f"{output.max_abs_error:.3g}",
        f"{output.relative_l2:.3g}",
        "" if output.cosine is None else f"{output.cosine:.5f}",
        "" if top is None else f"{100 * top:.1f} %",
    ]


def print_outputs(outputs: Sequence[OutputCheck], screen: Screen) -> None:
    """A row for each output; where there are too many, those that are furthest off."""
    kept = outputs
    if screen.rows is not None and len(outputs) > screen.rows:
        worst = sorted(outputs, key=lambda output: -output.relative_l2)[: screen.rows]
        kept = [output for output in outputs if output in worst][: screen.rows]
    heads = (
        Column(head, leave=leave) for head, leave in zip(OUTPUT_COLUMNS, (4, 0, 3, 2), strict=True)
    )
    grid = Grid((Column("output", left=True, least=16), *heads))
    for output in kept:
        grid.add(output.name, *output_cells(output))
    screen.table(grid)
    if len(kept) < len(outputs):
        more = len(outputs) - len(kept)
        screen.line(f"{counted(more, 'more output')}, nearer than these; --all-rows shows them")


def samples_text(samples: int, data: str) -> str:
    """Such as "8 samples of data.npz"."""
    source = "random input, not real data" if data == "random" else data
    return f"{counted(samples, 'sample')} of {source}"


def alike(rows: Iterable[Row], key: Callable[[Row], Hashable]) -> Iterator[tuple[Row, int]]:
    """The first row of each key, and how many others have it, in the order of the first ones."""
    groups: dict[Hashable, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return ((same[0], len(same) - 1) for same in groups.values())


def with_same_weight(name: str, more: int) -> str:
    """A layer's name, and how many others read the same weight and fare alike."""
    return f"{name} (+{more} with the same weight)" if more else name


def print_offers(offers: Sequence[Offer], screen: Screen) -> None:
    """Targets that are usable here, then the others with what is missing."""
    version = Column("version", left=True, least=10, leave=1)
    columns = [Column("target", left=True), Column("usable", left=True), version]
    grid = Grid([*columns, Column("times", left=True)], fold=True)
    for offer in sorted(offers, key=lambda offer: not offer.usable):
        install = "" if offer.usable or not offer.install else f"; {offer.install}"
        grid.add(
            offer.name,
            "yes" if offer.usable else "no",
            offer.version or "–",
            offer.times,
            rest=f"{offer.found}{install}",
        )
    screen.table(grid)


def print_check_report(report: CheckReport, screen: Screen) -> None:
    """One table for each target and comparison."""
    samples = samples_text(report.samples, report.data)
    screen.line(f"A: {report.models[0]}; B: {report.models[1]}; {samples}")
    for entry in report.targets:
        _print_target(entry, screen)
    screen.notes(report.notes)


def _print_target(entry: TargetCheck, screen: Screen) -> None:
    screen.line(_target(entry.target, entry.emulated), "bold")
    for letter, model in zip("AB", entry.models, strict=True):
        if model.error is not None:
            screen.line(f"{letter} does not run: {model.error}", "red")
        elif model.assignment:
            screen.line(f"{letter}: {_assigned(model)}")
    compared: list[tuple[str, Sequence[OutputCheck]]] = [("B with A", entry.outputs)]
    for letter, model in zip("AB", entry.models, strict=True):
        compared.append((f"{letter} with {letter} on the CPU", model.against_cpu))
    for what, outputs in compared:
        if outputs:
            screen.line(f"{what}:")
            print_outputs(outputs, screen)
    if entry.judged is not None:
        screen.line(f"B by A: {judged_text(entry.judged)}")


def print_bench_report(report: BenchReport, screen: Screen) -> None:
    """One table for each target and number of threads, the ratios, and how noisy it was."""
    shapes = ", ".join(f"{name} {list(shape)}" for name, shape in report.shapes.items())
    screen.line(f"input: {shapes}")
    for entry in report.targets:
        _print_bench(entry, screen)
    screen.line(str(report.noise))
    screen.notes(report.notes)


def _print_bench(entry: TargetBench, screen: Screen) -> None:
    threads = "" if entry.threads is None else f", threads: {entry.threads}"
    screen.line(_target(entry.target, entry.emulated) + threads, "bold")
    times = () if entry.emulated else ("median ms", "p90", "p99", "first", "load", "peak MB")
    leave = dict(zip(times, (0, 1, 2, 4, 5, 3), strict=bool(times)))
    columns = [Column("model", left=True, least=16)]
    grid = Grid([*columns, *(Column(head, leave=leave[head]) for head in times)])
    for model in entry.models:
        name = PurePath(model.model).name
        if model.error is not None:
            screen.line(f"{model.model} does not run: {model.error}", "red")
        else:
            grid.add(name, *([] if entry.emulated else _times(model)))
    if len(grid) and times:
        screen.table(grid)
    for model in entry.models:
        more = "; ".join(part for part in (model.assignment, _costs(model)) if part)
        if more and model.error is None:
            screen.line(f"{PurePath(model.model).name}: {more}")
    for ratio in entry.ratios:
        screen.line(_ratio(ratio))


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


def print_support(report: SupportReport, screen: Screen, *, every: bool) -> None:
    """A table of all providers, then what is left to the CPU and why.

    Args:
        report: from `support_of`.
        screen: where to.
        every: name every node; else only how many break a rule, and the first.
    """
    grid = Grid([Column("provider", left=True), Column("nodes taken"), Column("partitions")])
    for entry in report.providers:
        old, new = entry.before, entry.model
        taken, groups = f"{new.taken} of {new.nodes}", str(new.partitions)
        if old is not None:
            taken = f"{old.taken} of {old.nodes} → {taken}"
            groups = f"{old.partitions} → {groups}"
        grid.add(entry.provider, taken, groups)
    before = "" if report.before is None else f"{report.before} → "
    screen.line(f"{before}{report.model}", "bold")
    screen.table(grid)
    free = ", ".join(entry.provider for entry in report.providers if not entry.asked)
    screen.line(
        "MatMul, Gemm and Conv are judged by their rules, other operators by their names; "
        f"{free} took whatever was tried"
    )
    for entry in report.providers:
        if entry.model.left:
            left = counted(len(entry.model.left), "node")
            screen.line(f"{entry.provider} leaves {left} to the CPU:")
            _print_left(entry.model, screen, every=every)
    screen.notes(report.notes)


def _print_left(model: ModelSupport, screen: Screen, *, every: bool) -> None:
    if every:
        for node in model.left:
            screen.line(f"  {node.name} ({node.op_type}): {node.rule}")
        return
    kinds = list(alike(model.left, lambda node: (node.op_type, _kind(node.rule))))
    kinds.sort(key=lambda found: -found[1])
    most = len(kinds) if screen.rows is None else _KINDS
    for node, others in kinds[:most]:
        more = f" and {others} more {node.op_type}" if others else ""
        screen.line(f"  {node.name} ({node.op_type}){more}: {node.rule}")

    rest = sum(others + 1 for _, others in kinds[most:])
    if rest:
        screen.line(f"  {counted(rest, 'node')} of other kinds; --nodes names every node")


def _kind(rule: str) -> str:
    """A rule without the names and numbers of one node."""
    return rule.partition(",")[0]
