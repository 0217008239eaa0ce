"""One page for each kind of result."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from onnx_lowrank.evaluation.bench import BenchReport, ModelBench, TargetBench
from onnx_lowrank.evaluation.check import CheckReport, ModelOnTarget, TargetCheck
from onnx_lowrank.phrases import counted, size
from onnx_lowrank.reports.charts import Runs, timings
from onnx_lowrank.reports.frame import again, bar, facts, notes, page, section, table, tile
from onnx_lowrank.reports.layer_table import layer_section, where_section
from onnx_lowrank.reports.markup import Html, joined, name, tag
from onnx_lowrank.reports.steps_table import steps_section
from onnx_lowrank.reports.texts import (
    bench_sentence,
    change,
    check_sentence,
    count,
    error,
    file_name,
    milliseconds,
    run_sentence,
    samples_of,
    totals_of,
)
from onnx_lowrank.schema.json_report import File
from onnx_lowrank.schema.measures import (
    Latency,
    Milliseconds,
    OutputCheck,
    judged_text,
    speedup_text,
)
from onnx_lowrank.schema.report import (
    BudgetReport,
    Calibration,
    Healing,
    Report,
    damage_kind,
    error_kind,
)

__all__ = ["bench_page", "check_page", "run_page"]

_OUTPUTS = ("Output", "Relative L2", "Max |Δ|", "Cosine", "Top-1 agreement")


def run_page(report: Report) -> str:
    """The page of a run of the main job."""
    before, after = file_name(report.input.path), file_name(report.output.path)
    after = after if report.output.path is not None else "nothing written"
    tone, text = run_sentence(report)
    return page(
        f"{before} → {after}",
        report.tool,
        (tone, text),
        joined([name(before), " → ", name(after)]),
        [
            tag("p", report.summary, class_="summary") if tone != "good" else None,
            _totals(report),
            where_section(report),
            layer_section(report),
            _checked(report),
            _latencies(report.latency),
            _fitted(report.calibration, report.goal, report.healing),
            steps_section(report.steps),
            notes(("note", report.notes)),
            again(report.origin, [report.input], report.settings, report.seconds),
        ],
    )


def _totals(report: Report) -> Html:
    tiles = []
    for total in totals_of(report):
        title, text = f"{total.title[:1].upper()}{total.title[1:]}", total.text
        bars = bar(total.before, total.after, max(total.before, total.after))
        tiles.append(tile(title, text(total.before), text(total.after), total.change, bars))
    for latency in report.latency[:1]:
        old, new = latency.before_ms.median, latency.after_ms.median
        bars = bar(old, new, max(old, new))
        noisy = latency.speedup.verdict == "too noisy to tell"
        changed = "too noisy" if noisy else f"{latency.speedup.median:.2f}×"
        tiles.append(tile("Speed", milliseconds(old), milliseconds(new), changed, bars))
    return tag("section", tag("h2", "Before and after"), tag("div", *tiles, class_="tiles"))


def _checked(report: Report) -> Html | None:
    check = report.check
    if check is None:
        return None
    parts = []
    for provider in check.providers:
        parts.append(tag("h3", provider.provider))
        parts.append(_outputs((output, ()) for output in provider.outputs))
    if report.judged is not None:
        parts.append(tag("p", judged_text(report.judged)))
    return section("Outputs", *parts, lead=f"On {samples_of(check.samples, check.data)}.")


def _outputs(
    rows: Iterator[tuple[OutputCheck, tuple[str, ...]]], more: tuple[str, ...] = ()
) -> Html:
    """A table of outputs, with further columns of text after the name."""
    head = (_OUTPUTS[0], *more, *_OUTPUTS[1:])
    cells: list[Sequence[Html | str]] = []
    for output, extra in rows:
        top = output.top1_agreement
        cells.append(
            (
                name(output.name),
                *extra,
                error(output.relative_l2),
                error(output.max_abs_error),
                "" if output.cosine is None else f"{output.cosine:.5f}",
                "" if top is None else f"{100 * top:.1f} %",
            )
        )
    return table(head, cells, text=(_OUTPUTS[0], *more))


def _latencies(latencies: Sequence[Latency]) -> Html | None:
    if not latencies:
        return None
    parts: list[Html] = []
    for latency in latencies:
        speedup = latency.speedup
        place = f"{latency.provider}, {counted(latency.threads, 'thread')}"
        text = f"{place}: {speedup_text(speedup.median, *speedup.certain)}."
        parts.append(tag("p", text))
        parts.append(timings([Runs("before", latency.before_ms), Runs("after", latency.after_ms)]))
    pairs = counted(latencies[0].pairs, "pair")
    return section(
        "Latency",
        *parts,
        lead=f"{pairs} of runs in turns. A dot is a run, the line the median, the box its 95 % "
        "interval.",
    )


def _fitted(
    calibration: Calibration | None,
    goal: BudgetReport | None,
    healing: Healing | None,
) -> Html | None:
    entries: list[tuple[str, Html | str]] = []
    if goal is not None:
        entries.append(("goal", goal.option))
        if goal.loss is not None:
            sure = "" if goal.loss_error is None else f" ± {goal.loss_error:.2g} (standard error)"
            entries.append((f"loss by {goal.metric}", f"{goal.loss:.3g}{sure}"))
        for what, value in (
            ("damage predicted", goal.predicted_damage),
            ("damage achieved", goal.achieved_damage),
        ):
            if value is not None:
                text = f"{value:.3g} ({damage_kind(goal.damage_of)})"
                entries.append((what, text))
        if goal.evaluations:
            samples = counted(goal.samples, "sample")
            text = f"{counted(goal.evaluations, 'evaluation')} on {samples}"
            entries.append(("search", text))
        if goal.put_back:
            entries.append(("dense again", joined(_names(goal.put_back))))
    if calibration is not None:
        fitted = samples_of(calibration.samples, calibration.data)
        held = f"{counted(calibration.held_out, 'other')} judge the layers"
        entries.append(("fitted to", f"{fitted}; {held}"))
        if calibration.mask is not None:
            entries.append(("padding", f"rows where {calibration.mask} is 0 count nowhere"))
    if healing is not None:
        text = (
            f"{healing.error_before:.3g} → {healing.error_after:.3g} "
            f"{error_kind(healing.error_of)} on held-out batches, step {healing.best_step} of "
            f"{healing.steps}"
        )
        entries.append(("healing", text))
    return section("How it was found", facts(entries)) if entries else None


def _names(names: Sequence[str]) -> Iterator[Html | str]:
    for number, text in enumerate(names):
        yield ", " if number else ""
        yield name(text)


def check_page(report: CheckReport) -> str:
    """The page of a comparison."""
    before, after = (file_name(model) for model in report.models[:2])
    return page(
        f"check: {before}, {after}",
        report.tool,
        check_sentence(report),
        joined(["check ", name(after), " against ", name(before)]),
        [
            _files(report.files),
            *(_target_check(entry) for entry in report.targets),
            notes(("note", report.notes)),
            again(report.origin, report.files),
        ],
    )


def _files(models: Sequence[File]) -> Html | None:
    """Size and parameters of the models that are compared; None for one alone."""
    if len(models) < 2:
        return None
    first = models[0]
    most = max(file.bytes for file in models)
    rows = [
        (
            name(file_name(file.path)),
            size(file.bytes),
            "" if file is first else change(first.bytes, file.bytes),
            count(file.parameters),
            "" if file is first else change(first.parameters, file.parameters),
            bar(file.bytes, file.bytes, most),
        )
        for file in models
    ]
    head = ("Model", "Size", "Change", "Parameters", "Change ", " ")
    return section("Models", table(head, rows, text=("Model", " ")))


def _target_check(entry: TargetCheck) -> Html:
    parts: list[Html] = []
    for letter, model in zip("AB", entry.models, strict=True):
        if model.error is not None:
            parts.append(tag("p", f"{letter} does not run: {model.error}", class_="wrong"))
        elif model.assignment:
            parts.append(tag("p", f"{letter}: {_assigned(model)}", class_="small"))

    def rows() -> Iterator[tuple[OutputCheck, tuple[str, ...]]]:
        for output in entry.outputs:
            yield output, ("B with A",)
        for letter, model in zip("AB", entry.models, strict=True):
            for output in model.against_cpu:
                yield output, (f"{letter} with {letter} on the CPU",)

    found = list(rows())
    if found:
        parts.append(_outputs(iter(found), ("Compared",)))
    if entry.judged is not None:
        parts.append(tag("p", judged_text(entry.judged)))
    return section(f"Outputs on {_target(entry.target, entry.emulated)}", *parts)


def _assigned(model: ModelOnTarget) -> str:
    costs = ", ".join(f"{cost} {value:,.0f}" for cost, value in sorted(model.costs.items()))
    return f"{model.assignment}; {costs}" if costs else model.assignment


def _target(target: str, emulated: bool) -> str:
    return f"{target} (emulated)" if emulated else target


def bench_page(report: BenchReport) -> str:
    """The page of a timing."""
    models = [file_name(model.model) for model in report.targets[0].models]
    shapes = ", ".join(f"{key} {list(shape)}" for key, shape in report.shapes.items())
    return page(
        f"bench: {', '.join(models)}",
        report.tool,
        bench_sentence(report),
        joined(["bench ", *_names(models)]),
        [
            tag("p", f"Input: {shapes}. {str(report.noise).capitalize()}.", class_="summary"),
            _files(report.files),
            *(_timed(entry) for entry in report.targets),
            notes(("note", report.notes)),
            again(report.origin, report.files),
        ],
    )


def _timed(entry: TargetBench) -> Html:
    threads = "" if entry.threads is None else f", {counted(entry.threads, 'thread')}"
    parts: list[Html] = []
    for ratio in entry.ratios:
        figures = speedup_text(ratio.median, ratio.low, ratio.high)
        parts.append(
            tag("p", name(file_name(ratio.after)), " against ", name(file_name(ratio.before)),
                f": {figures}")
        )  # fmt: skip
    runs = [
        Runs(file_name(model.model), times)
        for model in entry.models
        if (times := _times(model)) is not None
    ]
    if runs and any(row.times.runs for row in runs):
        parts.append(timings(runs))
    rows: list[Sequence[Html | str]] = []
    for model in entry.models:
        if model.error is not None:
            parts.append(
                tag("p", name(model.model), f" does not run: {model.error}", class_="wrong")
            )
            continue
        times_ms = (model.median_ms, model.p90_ms, model.p99_ms, model.first_ms, model.load_ms)
        peak = "" if model.peak_bytes is None else size(model.peak_bytes)
        rows.append(
            (
                name(file_name(model.model)),
                *("" if value is None else f"{value:.3g}" for value in times_ms),
                peak,
                model.assignment,
            )
        )
    if rows:
        head = ("Model", "Median ms", "p90", "p99", "First", "Load", "Peak memory", "Nodes")
        parts.append(table(head, rows, text=("Model", "Nodes")))
    return section(f"{_target(entry.target, entry.emulated)}{threads}", *parts)


def _times(model: ModelBench) -> Milliseconds | None:
    if model.median_ms is None or model.p90_ms is None:
        return None
    return Milliseconds(model.median_ms, model.p90_ms, model.certain_ms, model.runs_ms)
