"""How reports write numbers, and the sentence that each of them begins with."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import NamedTuple

from onnx_lowrank.compression.inspection import Inspection
from onnx_lowrank.compression.sweep_report import SweepReport
from onnx_lowrank.evaluation.bench import BenchReport
from onnx_lowrank.evaluation.check import CheckReport
from onnx_lowrank.phrases import THREE, counted, size
from onnx_lowrank.schema.measures import speedup_text
from onnx_lowrank.schema.report import Report

__all__ = [
    "Total",
    "bench_sentence",
    "change",
    "check_sentence",
    "count",
    "error",
    "file_name",
    "inspect_sentence",
    "maps_of",
    "milliseconds",
    "percent",
    "run_sentence",
    "samples_of",
    "sweep_sentence",
    "totals_of",
    "without_common",
]

_SHORT = 12
"""Common beginnings up to this length stay."""

Sentence = tuple[str, str]
"""How it went ("good", "warning", "bad" or "plain"), and the sentence."""


def count(number: float | None) -> str:
    """A large number, such as "12.9 M"; "unknown" where it is not known."""
    if number is None:
        return "unknown"
    for unit, power in (("G", 9), ("M", 6), ("k", 3)):
        if number >= THREE * 10**power:
            return f"{number / 10**power:.3g} {unit}"
    return f"{number:,.0f}"


def milliseconds(number: float) -> str:
    """Such as "1.32 ms" or "2.5 s"."""
    return f"{number:.3g} ms" if number < 1e3 * THREE else f"{number / 1e3:.3g} s"


def percent(share: float) -> str:
    """Such as "0.9 %"."""
    shown = 100.0 * share
    if math.isnan(shown):
        return "not measured"
    if not math.isfinite(shown):
        return "beyond any measure"
    if shown and abs(shown) < 0.001:
        return "< 0.001 %"
    return f"{shown:.0f} %" if abs(shown) >= 9.95 else f"{shown:.2g} %"


def change(before: float | None, after: float | None) -> str:
    """Such as "−64 %"; "" where there was nothing, or one of the two is not known."""
    if not before or after is None:
        return ""
    share = (after - before) / before
    if abs(share) < 0.0005:
        return "±0 %"
    return f"{'−' if share < 0 else '+'}{percent(abs(share))}"


def error(number: float | None) -> str:
    """A relative error; "" where it was not measured."""
    if number is None:
        return ""
    return f"{number:.3g}" if math.isfinite(number) else "not finite"


def file_name(path: str | None) -> str:
    """The name of a file; of a model in memory that it is there."""
    return "in memory" if path is None else PurePath(path).name


def samples_of(samples: int, data: str) -> str:
    """Such as "16 samples of data.npz"."""
    source = "random input, not real data" if data == "random" else PurePath(data).name or data
    return f"{counted(samples, 'sample')} of {source}"


class Total(NamedTuple):
    """A sum over a model before and after, and how it is written."""

    title: str
    before: int
    after: int
    text: Callable[[float], str]

    @property
    def change(self) -> str:
        """Such as "−64 %"."""
        return change(self.before, self.after)


def totals_of(report: Report) -> list[Total]:
    """The sums that are known of both models."""
    totals = report.totals
    sums: list[tuple[str, int | None, int | None, Callable[[float], str]]] = [
        ("size", report.input.bytes, report.output.bytes, size),
        ("parameters", totals.parameters_before, totals.parameters_after, count),
        (
            "in linear layers",
            totals.linear_parameters_before,
            totals.linear_parameters_after,
            count,
        ),
        ("MACs of an inference", totals.macs_before, totals.macs_after, count),
    ]
    return [
        Total(title, before, after, text)
        for title, before, after, text in sums
        if before is not None and after is not None
    ]


def run_sentence(report: Report) -> Sentence:
    """What a run missed or warns of, if there is any, else its result."""
    if report.missed is not None:
        return "bad", report.missed
    if report.verdict is not None:
        tone = "bad" if report.verdict.level == "unusable" else "warning"
        return tone, f"{report.verdict.level.capitalize()}: {report.verdict.text}"
    return "good", f"{report.summary[:1].upper()}{report.summary[1:]}"


def check_sentence(report: CheckReport) -> Sentence:
    """How far the second model's outputs are off."""
    if report.missed is not None:
        return "bad", report.missed
    if report.errors:
        return "bad", report.errors[0]
    found = [(o.relative_l2, entry.target) for entry in report.targets for o in entry.outputs]
    if not found:
        return "plain", "no output was compared"
    worst, target = max(found)
    samples = samples_of(report.samples, report.data)
    before, after = (file_name(model) for model in report.models[:2])
    far = f"off by {percent(worst)} at most" if math.isfinite(worst) else percent(worst)
    off = "the same as" if worst == 0.0 else f"{far} from"
    return "plain", f"outputs of {after} are {off} those of {before} on {target}, {samples}"


def bench_sentence(report: BenchReport) -> Sentence:
    """How fast the last model is against the first, on the first target."""
    if report.missed is not None:
        return "bad", report.missed
    if report.errors:
        return "bad", report.errors[0]
    for entry in report.targets:
        models = [model.model for model in entry.models]
        for ratio in entry.ratios:
            if (ratio.before, ratio.after) == (models[0], models[-1]):
                after, before = file_name(ratio.after), file_name(ratio.before)
                figures = speedup_text(ratio.median, ratio.low, ratio.high)
                return "plain", f"{after} against {before} on {entry.target}: {figures}"
    first = report.targets[0]
    if first.models[0].median_ms is None:
        return "plain", f"no times: {first.target} is emulated, its times mean nothing"
    name, time = file_name(first.models[0].model), first.models[0].median_ms
    return "plain", f"{name} takes {milliseconds(time)} on {first.target}"


def sweep_sentence(report: SweepReport) -> Sentence:
    """The ends of the curve."""
    points = report.points
    if len(points) < 2:
        return "warning", "no budget could be had"
    first, last = points[0], points[-1]
    saved = (first.bytes - last.bytes) / first.bytes if first.bytes else 0.0
    far = percent(last.error)
    off = f"off by {far}" if math.isfinite(last.error) else far
    return "plain", (
        f"{counted(len(points) - 1, 'budget')}: up to {percent(saved)} smaller, where the worst "
        f"output is {off}"
    )


def inspect_sentence(report: Inspection) -> Sentence:
    """How much of the model its linear maps are, and what half of their parameters would hold."""
    weights = {row.weight: row.parameters for row in report.entries}
    share = percent(sum(weights.values()) / report.parameters) if report.parameters else "0 %"
    maps = f"{maps_of(report)} with {share} of the parameters"
    halves = sorted(row.half for row in report.entries if row.half is not None)
    if not halves:
        return "plain", f"{maps}; none can be factored"
    held = percent(halves[len(halves) // 2])
    return "plain", (
        f"{maps}; a pair of half the parameters holds {held} of a layer's energy (median)"
    )


def maps_of(report: Inspection) -> str:
    """How many linear maps there are; one that can be factored in two ways counts once."""
    return counted(len({(row.name, row.weight) for row in report.entries}), "linear map")


def without_common(names: Sequence[str]) -> list[str]:
    """Names without the words at their start that all of them have, such as "…layer.0/query".

    Words end at a slash or a dot.  Names that are all the same stay as they are.
    """
    first, last = min(names, default=""), max(names, default="")
    same = (a == b for a, b in zip(first, last, strict=False))
    common = first[: sum(itertools.takewhile(bool, same))]
    cut = max(common.rfind("/"), common.rfind("."))
    if len(set(names)) < 2 or cut < _SHORT:
        return list(names)
    return [f"…{name[cut + 1 :]}" for name in names]
