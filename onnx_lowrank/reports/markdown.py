"""Markdown that fits a comment on a pull request: the sentence, totals, outputs, the worst layers.

Names of models are hostile input here too: every sign that Markdown or HTML reads is written as a
character reference, and names stand in ``<code>``, where no user is mentioned.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from onnx_lowrank.compression.inspection import Inspection
from onnx_lowrank.compression.provenance import provenance_line
from onnx_lowrank.compression.sweep_report import SweepReport
from onnx_lowrank.evaluation.bench import BenchReport
from onnx_lowrank.evaluation.check import CheckReport
from onnx_lowrank.phrases import counted, printable, size
from onnx_lowrank.reports.texts import (
    Sentence,
    bench_sentence,
    change,
    check_sentence,
    count,
    error,
    file_name,
    inspect_sentence,
    maps_of,
    milliseconds,
    percent,
    run_sentence,
    samples_of,
    sweep_sentence,
    totals_of,
)
from onnx_lowrank.schema.json_report import File, Origin
from onnx_lowrank.schema.layer import Layer, achieved_error
from onnx_lowrank.schema.measures import OutputCheck, judged_text, speedup_text
from onnx_lowrank.schema.report import EffortStep, Report, error_kind, outcome_of

__all__ = [
    "bench_markdown",
    "check_markdown",
    "inspect_markdown",
    "run_markdown",
    "sweep_markdown",
]

_MOST = 20
"""Layers, outputs and notes that are shown: a comment holds 65,536 characters."""
_LONGEST = 96
# A command is whole: it is there to be run.
_WHOLE = 4000
_ALERTS = {"bad": "CAUTION", "warning": "WARNING"}


def run_markdown(report: Report) -> str:
    """The comment on a run of the main job."""
    before, after = file_name(report.input.path), file_name(report.output.path)
    after = after if report.output.path is not None else "nothing written"
    parts = [*_head(f"{before} → {after}", run_sentence(report))]
    if report.verdict is not None or report.missed is not None:
        parts += [_plain(report.summary), ""]
    parts += [*_totals(report)]
    if report.check is not None:
        samples = samples_of(report.check.samples, report.check.data)
        for provider in report.check.providers:
            rows = [(output, "") for output in provider.outputs]
            parts += _outputs(rows, f"outputs on {samples}, {provider.provider}")
    if report.judged is not None:
        parts += [_plain(judged_text(report.judged)), ""]
    parts += [*_worst(report.layers), *_steps(report.steps), *_notes(report.notes)]
    parts += _foot(report.tool, report.origin)
    return "\n".join(parts) + "\n"


def check_markdown(report: CheckReport) -> str:
    """The comment on a comparison."""
    before, after = (file_name(model) for model in report.models[:2])
    parts = [*_head(f"check {after} against {before}", check_sentence(report))]
    parts += _files(report.files)
    for entry in report.targets:
        for model in entry.models:
            if model.error is not None:
                text = f"{entry.target}: {file_name(model.model)} does not run: {model.error}"
                parts += [_plain(text), ""]
        rows = [(output, "B with A") for output in entry.outputs]
        for letter, model in zip("AB", entry.models, strict=True):
            rows += [(output, f"{letter} with {letter} on the CPU") for output in model.against_cpu]
        if rows:
            parts += _outputs(rows, f"outputs on {entry.target}")
        if entry.judged is not None:
            parts += [_plain(judged_text(entry.judged)), ""]
    parts += [*_notes(report.notes), *_foot(report.tool, report.origin)]
    return "\n".join(parts) + "\n"


def bench_markdown(report: BenchReport) -> str:
    """The comment on a timing."""
    models = [file_name(model.model) for model in report.targets[0].models]
    parts = [*_head(f"bench {', '.join(models)}", bench_sentence(report)), *_files(report.files)]
    for entry in report.targets:
        threads = "" if entry.threads is None else f", {counted(entry.threads, 'thread')}"
        rows: list[Sequence[str]] = []
        for model in entry.models:
            times = (model.median_ms, model.p90_ms, model.p99_ms, model.load_ms)
            cells = ["" if value is None else f"{value:.3g}" for value in times]
            peak = "" if model.peak_bytes is None else size(model.peak_bytes)
            rows.append([_code(file_name(model.model)), *cells, peak, _plain(model.error or "")])
        head = (f"{entry.target}{threads}", "median ms", "p90", "p99", "load", "peak memory", " ")
        parts += _table(head, rows)
        for ratio in entry.ratios:
            figures = speedup_text(ratio.median, ratio.low, ratio.high)
            names = f"{_code(file_name(ratio.after))} against {_code(file_name(ratio.before))}"
            parts += [f"{names}: {_plain(figures)}", ""]
    parts += [_plain(str(report.noise)), "", *_notes(report.notes)]
    return "\n".join([*parts, *_foot(report.tool, report.origin)]) + "\n"


def sweep_markdown(report: SweepReport) -> str:
    """The comment on a trade-off curve."""
    parts = [*_head(f"sweep {file_name(report.input)}", sweep_sentence(report))]
    first = report.points[0].bytes if report.points else 0
    rows = []
    for point in report.points:
        noisy = point.verdict == "too noisy to tell"
        speed = "" if point.speedup is None else f"{point.speedup:.2f}×"
        rows.append(
            (
                f"{point.keep:g}",
                size(point.bytes),
                change(first, point.bytes),
                "too noisy" if noisy else speed,
                percent(point.error),
                *(() if report.metric is None else (_loss(point.loss),)),
            )
        )
    head = ["keep", "size", "change", "speed", "error of the worst output"]
    head += [] if report.metric is None else [f"loss by {_plain(report.metric)}"]
    parts += _table(head, rows, text=0)
    commands = [_code(point.command, _WHOLE) for point in report.points if point.command]
    if commands:
        parts += _details("The command of each point", [f"- {command}" for command in commands])
    notes = [*(f"missed: {text}" for text in report.missed), *report.notes]
    return "\n".join([*parts, *_notes(notes), *_foot(report.tool, report.origin)]) + "\n"


def _loss(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.3g}"


def inspect_markdown(report: Inspection) -> str:
    """The comment on what a model holds: budgets, and the largest linear maps."""
    parts = [*_head(f"inspect {file_name(report.path)}", inspect_sentence(report))]
    if report.recipe is not None:
        parts += [_plain(provenance_line(report.recipe)), ""]
    if report.budgets:
        rows = [
            (
                f"{budget.keep:g}",
                str(budget.factored),
                size(budget.bytes),
                change(report.input.bytes, budget.bytes),
                "" if budget.damage is None else f"{budget.damage:.3g}",
            )
            for budget in report.budgets
        ]
        parts += _table(("keep", "pairs", "size", "change", "predicted damage"), rows, text=0)
    largest = sorted(report.entries, key=lambda row: -row.parameters)[:_MOST]
    cells = []
    for row in largest:
        shown = [f"{rank}" for rank in row.ranks] or [""] * len(report.energies)
        even = "" if row.break_even is None else f"{row.break_even:.0f}"
        names = f"{_code(row.scope or row.name)} {_plain(row.form)}"
        shape = "?" if row.shape is None else "×".join(map(str, row.shape[-2:]))
        cells.append((names, shape, count(row.parameters), even, *shown, _plain(row.reason)))
    ranks = [f"rank at {energy:g}" for energy in report.energies]
    head = ("layer", "m×n", "parameters", "break-even", *ranks, "note")
    which = "all" if len(report.entries) <= _MOST else f"the {_MOST} largest"
    parts += _details(f"{maps_of(report)}: {which}", _table(head, cells))
    notes = [*(f"missed: {text}" for text in report.missed), *report.notes]
    return "\n".join([*parts, *_notes(notes), *_foot(report.tool, report.origin)]) + "\n"


def _head(title: str, sentence: Sentence) -> Iterator[str]:
    tone, text = sentence
    yield f"### onnx-lowrank: {_plain(title)}"
    yield ""
    if tone in _ALERTS:
        yield f"> [!{_ALERTS[tone]}]"
    yield f"{'> ' if tone in _ALERTS else ''}**{_plain(text)}**"
    yield ""


def _totals(report: Report) -> list[str]:
    rows = [
        (total.title, total.text(total.before), total.text(total.after), total.change)
        for total in totals_of(report)
    ]
    for latency in report.latency:
        speedup = latency.speedup
        old, new = latency.before_ms.median, latency.after_ms.median
        text = speedup_text(speedup.median, *speedup.certain)
        title = f"latency, {latency.provider}, {counted(latency.threads, 'thread')}"
        rows.append((_plain(title), milliseconds(old), milliseconds(new), text))
    return _table((" ", "before", "after", "change"), rows)


def _files(models: Sequence[File]) -> list[str]:
    if len(models) < 2:
        return []
    first = models[0]
    rows = [
        (
            _code(file_name(file.path)),
            size(file.bytes),
            "" if file is first else change(first.bytes, file.bytes),
            count(file.parameters),
        )
        for file in models
    ]
    return _table(("model", "size", "change", "parameters"), rows)


def _outputs(rows: Sequence[tuple[OutputCheck, str]], title: str) -> list[str]:
    cells = []
    for output, compared in rows[:_MOST]:
        top = output.top1_agreement
        cells.append(
            (
                " ".join([_code(output.name), _plain(compared)]).strip(),
                error(output.relative_l2),
                error(output.max_abs_error),
                "" if output.cosine is None else f"{output.cosine:.5f}",
                "" if top is None else f"{100 * top:.1f} %",
            )
        )
    head = (title, "relative L2", "max abs", "cosine", "top-1 agreement")
    more = [f"{len(rows) - _MOST} more outputs", ""] if len(rows) > _MOST else []
    return [*_table(head, cells), *more]


def _worst(layers: Sequence[Layer]) -> list[str]:
    """The factored layers that are furthest off."""

    def off(layer: Layer) -> float:  # for the order alone
        found = achieved_error(layer)
        return (layer.predicted_error or 0.0) if found is None else found

    factored = [layer for layer in layers if layer.status == "factored"]
    if not factored:
        return []
    worst = sorted(factored, key=lambda layer: -off(layer))[:_MOST]
    rows = [
        (
            " ".join([_code(layer.scope or layer.name), _plain(layer.form)]),
            "?" if layer.shape is None else f"{layer.shape[0]}×{layer.shape[1]}",
            str(layer.rank),
            percent(layer.parameters_after / max(layer.parameters_before, 1)),
            error(layer.predicted_error),
            error(achieved_error(layer)),
        )
        for layer in worst
    ]
    table = _table(("layer", "m×n", "rank", "kept", "predicted error", "error"), rows)
    maps = counted(len(layers), "linear map")
    which = "all" if len(factored) <= _MOST else f"the {_MOST} with the largest error"
    return _details(f"{maps}, {len(factored)} factored: {which}", table)


def _steps(steps: Sequence[EffortStep]) -> list[str]:
    if not steps:
        return []
    rows = [
        (step.method, error(step.error_before), error(step.error_after), _plain(outcome_of(step)))
        for step in steps
    ]
    table = _table(("method", "error before", "error after", "outcome"), rows)
    kind = error_kind(steps[0].error_of)
    return _details(f"More accuracy at the same ranks (errors: {kind}, samples kept aside)", table)


def _notes(notes: Sequence[str]) -> list[str]:
    if not notes:
        return []
    more = [f"- {len(notes) - _MOST} more"] if len(notes) > _MOST else []
    return _details("Notes", [*(f"- {_plain(note)}" for note in notes[:_MOST]), *more])


def _foot(tool: str, origin: Origin | None) -> list[str]:
    if origin is None:
        return [f"<sub>{_plain(tool)}</sub>"]
    versions = ", ".join(f"{package} {number}" for package, number in origin.versions.items())
    text = f"<sub>{_plain(f'{tool}, {versions}, {origin.processor}')}</sub>"
    if origin.command is None:
        return [text]
    return [*_details("Run it again", [_code(origin.command, longest=4000)]), text]


def _details(summary: str, lines: Iterable[str]) -> list[str]:
    return [f"<details><summary>{_plain(summary)}</summary>", "", *lines, "", "</details>", ""]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], text: int = 1) -> list[str]:
    """A table whose first columns are text; cells are Markdown already."""
    rule = ["---" if column < text else "--:" for column in range(len(head))]
    lines = [[_plain(cell) for cell in head], rule, *rows]
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]


def _plain(text: str) -> str:
    """A text whose every sign means itself: one line, no HTML, no Markdown, no mention."""
    plain = "".join(
        character
        if not character.isascii() or character.isalnum() or character in " ,.;:/%()?='+-"
        else f"&#{ord(character)};"
        for character in printable(text)
    )
    return plain.replace("://", "&#58;//").replace("www.", "www&#46;")  # else they become links


def _code(text: str, longest: int = _LONGEST) -> str:
    """A name or a command; of a very long one both ends."""
    if len(text) > longest:
        half = longest // 2
        text = f"{text[:half]}…{text[-half:]}"
    return f"<code>{_plain(text)}</code>"
