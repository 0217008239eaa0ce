"""The console: what a person sees of the main job."""

from __future__ import annotations

from onnx_lowrank.cli.grid import Column, Grid
from onnx_lowrank.cli.layers import print_layers
from onnx_lowrank.cli.screen import Screen
from onnx_lowrank.cli.tables import print_outputs, samples_text
from onnx_lowrank.phrases import counted
from onnx_lowrank.schema.measures import Check, Latency, judged_text, speedup_text
from onnx_lowrank.schema.report import (
    BudgetReport,
    EffortStep,
    Healing,
    Report,
    damage_kind,
    error_kind,
    outcome_of,
)

__all__ = ["print_report"]


def print_report(report: Report, screen: Screen) -> None:
    """The report at a glance."""
    if report.verdict is not None:
        screen.line(f"{report.verdict.level}: {report.verdict.text}", "bold red")
    if report.summary:
        screen.line(report.summary, "bold")
    if report.layers:
        print_layers(report.layers, screen)
    _print_totals(report, screen)
    if report.check is not None:
        _print_check(report.check, screen)
    for step in report.steps:
        if step.method != "healing" or report.healing is None:  # else it has a line of its own
            screen.line(_step_line(step))
    if report.healing is not None:
        screen.line(_healing_line(report.healing))
    for latency in report.latency:
        screen.line(_latency_line(latency))
    if report.goal is not None:
        screen.line(_goal_line(report.goal))
    if report.judged is not None and (report.goal is None or report.goal.loss is None):
        screen.line(f"metric: {judged_text(report.judged)}")
    screen.notes(report.notes)
    if report.output.path is not None:
        screen.line(f"wrote {report.output.path}")


def _step_line(step: EffortStep) -> str:
    if step.error_before is None or step.error_after is None:
        return f"{step.method}: {outcome_of(step)}{'' if step.why_not else ', as the recipe says'}"
    return (
        f"{step.method}: error on samples kept aside {step.error_before:.3g} → "
        f"{step.error_after:.3g} ({error_kind(step.error_of)}), {step.seconds:.0f} s: "
        f"{outcome_of(step)}"
    )


def _healing_line(healing: Healing) -> str:
    kept = f"step {healing.best_step} of {healing.steps}" if healing.best_step else "the start"
    return (
        f"healing: held-out error {healing.error_before:.3g} → {healing.error_after:.3g} "
        f"({error_kind(healing.error_of)}; kept: {kept}; {healing.trained} constants, "
        f"{healing.batches} batches, {healing.held_out} held out, {healing.seconds:.0f} s)"
    )


def _print_totals(report: Report, screen: Screen) -> None:
    totals = report.totals
    grid = Grid(
        [
            Column("", left=True),
            *map(Column, ("before", "after", "change")),
            Column("ratio", leave=1),
        ]
    )
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
            grid.add(name, "?", "?")
        else:
            grid.add(name, f"{before:,}", f"{after:,}", *_change(before, after))
    screen.line("totals", "bold")
    screen.table(grid)


def _change(before: int, after: int) -> tuple[str, str]:
    if not before:
        return "", ""
    change = f"{100 * (after - before) / before:+.1f} %"
    return change, f"{before / after:.2f}×" if after else ""


def _print_check(check: Check, screen: Screen) -> None:
    samples = samples_text(check.samples, check.data)
    for provider in check.providers:
        screen.line(f"check: {samples}, {provider.provider}", "bold")
        print_outputs(provider.outputs, screen)


def _goal_line(goal: BudgetReport) -> str:
    parts = []
    if goal.loss is not None:
        sure = "" if goal.loss_error is None else f" (standard error {goal.loss_error:.2g})"
        parts.append(
            f"loss {goal.loss:.3g} by {goal.metric} on samples kept from fit and search{sure}"
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
        parts.append(f"damage {', '.join(damages)} ({damage_kind(goal.damage_of)})")
    else:
        parts.append("damage not measured")
    if goal.evaluations:
        parts.append(
            f"{counted(goal.evaluations, 'evaluation')} on {counted(goal.samples, 'sample')}"
        )
    return f"goal: {goal.option}" + (": " if parts else "") + "; ".join(parts)


def _latency_line(latency: Latency) -> str:
    speedup, threads = latency.speedup, counted(latency.threads, "thread")
    return (
        f"latency: {latency.before_ms.median:.3g} → {latency.after_ms.median:.3g} ms (median of "
        f"{latency.pairs} pairs in turns, {latency.provider}, {threads}); "
        f"{speedup_text(speedup.median, *speedup.certain)}"
    )
