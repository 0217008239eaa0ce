"""The result of a run in one sentence: how much smaller, how much faster, how far off."""

from __future__ import annotations

import math
from pathlib import PurePath

from onnx_lowrank.evaluation.outputs import worst_error
from onnx_lowrank.phrases import counted
from onnx_lowrank.schema.report import Report

__all__ = ["headline"]


def headline(report: Report) -> str:
    """Such as "41 % smaller, 1.38× as fast on cpu, outputs off by 0.9 % on 200 samples of d.npz".

    A metric that the user named follows.  That nothing was fitted to the samples is said only where
    the run knows it.
    """
    kept = all(layer.status == "dense" and layer.format is None for layer in report.layers)
    if kept and report.input.bytes == report.output.bytes:
        return "nothing was replaced: the model is as it was"
    if report.settings.get("dry_run"):
        return f"a plan only: {_size(report)}; nothing was written, run or timed"
    return ", ".join([_size(report), _speed(report), _outputs(report), *_judged(report)])


def _size(report: Report) -> str:
    before, after = report.input.bytes, report.output.bytes
    if not before or abs(before - after) < 0.0005 * before:
        return "as large as before"
    return f"{_percent(abs(before - after) / before)} {'smaller' if after < before else 'larger'}"


def _speed(report: Report) -> str:
    if not report.latency:
        return "not timed"
    speedup = report.latency[0].speedup
    place = f"on {report.settings.get('ep', report.latency[0].provider)}"
    match speedup.verdict:
        case "as fast":
            return f"as fast as before {place}"
        case "too noisy to tell":
            return f"its speed {place} too noisy to tell"
    return f"{speedup.median:.2f}× as fast {place}"


def _outputs(report: Report) -> str:
    check = report.check
    if check is None or not any(provider.outputs for provider in check.providers):
        return "outputs not compared"
    samples = "random input"
    if check.data != "random":
        samples = f"{counted(check.samples, 'sample')} of {PurePath(check.data).name or check.data}"
        if _unseen(report):
            samples = f"{counted(check.samples, 'sample')} that nothing was fitted to"
    _, error = worst_error(check.providers)
    if not math.isfinite(error):
        return f"outputs beyond any measure on {samples}"
    if error == 0.0:
        return f"the same outputs on {samples}"
    return f"outputs off by {_percent(error)} on {samples}"


def _judged(report: Report) -> list[str]:
    """By the metric that the user named, where it says something else."""
    judged = report.judged
    if judged is None or judged.metric in ("", "relative-l2"):
        return []
    return [f"{judged.metric} {judged.before:.4g} → {judged.after:.4g}"]


def _unseen(report: Report) -> bool:
    """Whether the samples of the check are known to have had no part in the fit."""
    fitted, check = report.calibration, report.check
    if fitted is None or check is None or report.settings.get("load_stats") is not None:
        return False
    # A single sample does both, and says so in a note.
    return fitted.samples > 1 or fitted.data != check.data


def _percent(share: float) -> str:
    percent = 100.0 * share
    if percent < 0.001:
        return "less than 0.001 %"
    return f"{percent:.0f} %" if percent >= 9.95 else f"{percent:.2g} %"
