"""The ways to more accuracy at the same ranks that a run tried, on its page."""

from __future__ import annotations

from collections.abc import Sequence

from onnx_lowrank.reports.frame import section, table
from onnx_lowrank.reports.markup import Html
from onnx_lowrank.reports.texts import error
from onnx_lowrank.schema.report import EffortStep, error_kind, outcome_of

__all__ = ["steps_section"]


def steps_section(steps: Sequence[EffortStep]) -> Html | None:
    """What each of them gained and cost; None where there are none."""
    if not steps:
        return None
    rows = [
        (
            step.method,
            error(step.error_before),
            error(step.error_after),
            f"{step.seconds:.2g}" if step.error_after is not None else "",
            outcome_of(step),
        )
        for step in steps
    ]
    head = ("Method", "Error before", "Error after", "Seconds", "Outcome")
    return section(
        "More accuracy at the same ranks",
        table(head, rows, text=("Method", "Outcome")),
        lead=f"Errors: {error_kind(steps[0].error_of)}, on samples kept aside. What does not lower "
        "them is dropped.",
    )
