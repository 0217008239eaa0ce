"""A sweep on the screen and in files: JSON, CSV and, where matplotlib is there, a picture."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from onnx_lowrank.cli.grid import Column, Grid
from onnx_lowrank.cli.screen import Screen
from onnx_lowrank.cli.tables import samples_text
from onnx_lowrank.compression.sweep_report import Point, SweepReport
from onnx_lowrank.errors import InputError
from onnx_lowrank.files import Output, atomic, write_text

__all__ = ["curve_outputs", "print_curve", "write_curve"]

_NAMES = ("sweep.json", "sweep.csv", "sweep.png")


def curve_outputs(folder: Path, *, force: bool) -> tuple[Output, ...]:
    """Make the folder for a sweep; the files that go there.

    Raises:
        InputError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"--out {folder}: {why}") from error
    names = _NAMES if importlib.util.find_spec("matplotlib") is not None else _NAMES[:2]
    return tuple(Output(folder / name, "out", force=force) for name in names)


def write_curve(curve: SweepReport, outputs: Sequence[Output]) -> tuple[Path, ...]:
    """Write the files; the picture only where matplotlib is installed.

    Returns:
        what was written.

    Raises:
        InputError: a file cannot be written.
    """
    for output in outputs:
        if output.path.suffix == ".png":
            try:
                with atomic(output.path) as file:
                    _draw(curve, file)
            except OSError as error:
                raise InputError(f"{output}: {error.strerror or error}") from error
        else:
            text = curve.to_csv() if output.path.suffix == ".csv" else curve.to_json() + "\n"
            write_text(output, text)
    return tuple(output.path for output in outputs)


def _draw(curve: SweepReport, file: IO[bytes]) -> None:
    from matplotlib.figure import Figure  # no pyplot: no display, no state

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    size, speed = figure.subplots(1, 2, sharey=True)
    points = curve.points
    errors = [point.error for point in points]
    size.plot([point.bytes / 1e6 for point in points], errors, marker="o")
    size.set_xlabel("MB")
    size.set_ylabel("mean relative L2 error of the worst output")
    timed = [point for point in points if point.speedup is not None and point.certain is not None]
    if timed:
        ratios = [point.speedup or 0.0 for point in timed]
        below = [(p.speedup or 0.0) - p.certain[0] for p in timed if p.certain is not None]
        above = [p.certain[1] - (p.speedup or 0.0) for p in timed if p.certain is not None]
        speed.errorbar(ratios, [p.error for p in timed], xerr=[below, above], marker="o", capsize=3)
    speed.set_xlabel(f"times as fast ({curve.provider}, {curve.threads} threads)")
    for axes, xs in ((size, [p.bytes / 1e6 for p in points]), (speed, [p.speedup for p in timed])):
        axes.grid(alpha=0.3)
        for x, point in zip(xs, points, strict=False):
            if x is not None and math.isfinite(point.error):
                axes.annotate(
                    f"{point.keep:g}",
                    (x, point.error),
                    textcoords="offset points",
                    xytext=(4, 4),
                    fontsize=8,
                )
    figure.savefig(file, format="png", dpi=120)


def print_curve(curve: SweepReport, written: tuple[Path, ...], screen: Screen) -> None:
    """The points as a table, then what else the user should know."""
    samples = samples_text(curve.samples, curve.data)
    screen.line(f"{samples}, {curve.provider}", "bold")
    screen.table(_grid(curve))
    screen.notes(curve.missed, "missed")
    screen.notes(curve.notes)
    if not any(path.suffix == ".png" for path in written):
        screen.notes(["no picture: matplotlib is not installed (the extra [report] has it)"])
    for path in written:
        screen.line(f"wrote {path}")


def _grid(curve: SweepReport) -> Grid:
    columns = [
        *(Column("keep"), Column("bytes"), Column("linear parameters", leave=2)),
        *(Column("MACs", leave=4), Column("speedup"), Column("error"), Column("cosine", leave=3)),
        *(Column("damage", leave=1), Column("predicted", leave=5)),
        *([Column("loss")] if curve.metric else []),
    ]
    grid = Grid(columns)
    for point in curve.points:
        grid.add(*_cells(point, curve))
    return grid


def _cells(point: Point, curve: SweepReport) -> list[str]:
    speed = ""
    if point.speedup is not None and point.certain is not None:
        noisy = point.verdict == "too noisy to tell"
        speed = "too noisy" if noisy else f"{point.speedup:.2f}×"
        speed += f" ({point.certain[0]:.2f}–{point.certain[1]:.2f})"
    return [
        f"{point.keep:g}",
        f"{point.bytes:,}",
        f"{point.linear_parameters:,}",
        "?" if point.macs is None else f"{point.macs:,}",
        speed,
        "" if math.isnan(point.error) else f"{point.error:.3g}",
        "" if point.cosine is None else f"{point.cosine:.5f}",
        "" if point.damage is None else f"{point.damage:.3g}",
        "" if point.predicted_damage is None else f"{point.predicted_damage:.3g}",
        *([] if curve.metric is None or point.loss is None else [f"{point.loss:.3g}"]),
    ]
