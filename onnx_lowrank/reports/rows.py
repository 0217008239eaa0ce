"""CSV: one row a layer, an output, a timing or a point."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence

from onnx_lowrank.compression.inspection import Inspected, Inspection
from onnx_lowrank.evaluation.check import CheckReport
from onnx_lowrank.schema.layer import Layer
from onnx_lowrank.schema.measures import OutputCheck
from onnx_lowrank.schema.report import Report

__all__ = ["check_rows", "inspect_rows", "run_rows", "written"]

# Fields of a layer that are no single value.
_SPREAD = ("shape", "refit", "spectrum")


def run_rows(report: Report) -> str:
    """One row for each linear map; see `Layer` for the columns."""
    names = [field.name for field in dataclasses.fields(Layer) if field.name not in _SPREAD]
    head = [*names, "m", "n", "refit_before", "refit_after", "break_even"]
    rows = []
    for layer in report.layers:
        row: dict[str, object] = {name: getattr(layer, name) for name in names}
        row["m"], row["n"] = (None, None) if layer.shape is None else layer.shape
        refit = (None, None) if layer.refit is None else layer.refit
        row["refit_before"], row["refit_after"] = refit
        row["break_even"] = None if layer.spectrum is None else layer.spectrum.break_even
        rows.append(row)
    return written(head, rows)


def check_rows(report: CheckReport) -> str:
    """One row for each output that was compared, on each target; a model that fails has one."""
    figures = [field.name for field in dataclasses.fields(OutputCheck)]
    rows: list[dict[str, object]] = []
    for entry in report.targets:
        place = {"target": entry.target, "emulated": entry.emulated}
        compared = [("B with A", entry.outputs)]
        for letter, model in zip("AB", entry.models, strict=True):
            compared.append((f"{letter} with {letter} on the CPU", model.against_cpu))
            if model.error is not None:
                rows.append({**place, "compared": letter, "error": model.error})
        rows += [
            {**place, "compared": what, **dataclasses.asdict(output)}
            for what, outputs in compared
            for output in outputs
        ]
    return written(["target", "emulated", "compared", *figures, "error"], rows)


def inspect_rows(report: Inspection) -> str:
    """One row for each linear map, and for each large constant that is none."""
    spread = ("shape", "ranks", "spectrum")
    names = [field.name for field in dataclasses.fields(Inspected) if field.name not in spread]
    ranks = [f"rank_at_{energy:g}" for energy in report.energies]
    rows = []
    for entry in (*report.entries, *report.others):
        row: dict[str, object] = {name: getattr(entry, name) for name in names}
        row["shape"] = None if entry.shape is None else "×".join(map(str, entry.shape))
        row |= dict(zip(ranks, entry.ranks, strict=False))
        rows.append(row)
    return written([*names, "shape", *ranks], rows)


def written(head: Sequence[str], rows: Sequence[Mapping[str, object]]) -> str:
    """A table as CSV; what is not known is an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, head, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
