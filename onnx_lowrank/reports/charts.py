"""Charts as SVG in the page itself: no library, no network, readable without scripts.

A charting library would have to be in every report.  These are a few hundred bytes each and follow
the colours of the page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from onnx_lowrank.reports.markup import Html, joined, tag
from onnx_lowrank.reports.texts import milliseconds
from onnx_lowrank.schema.layer import LayerSpectrum
from onnx_lowrank.schema.measures import Milliseconds

__all__ = ["Mark", "Runs", "scatter", "spark", "timings"]

_WIDTH, _HEIGHT = 120, 30
_DECADES = 3.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 44.0, 352.0, 26.0, 186.0


def spark(spectrum: LayerSpectrum, rank: int | None) -> Html:
    """A layer's singular values by rank, on a scale of three decades.

    What the chosen rank keeps is filled in the colour of the page; a broken line is the rank at
    which a pair saves nothing.

    Args:
        spectrum: of the layer.
        rank: the chosen one; None for a layer that is left dense.
    """
    ranks = [0, *spectrum.ranks]
    heights = [_height(value) for value in (spectrum.values[0], *spectrum.values)]
    wide = _WIDTH / spectrum.full
    points = [(wide * x, y) for x, y in zip(ranks, heights, strict=True)]
    parts = [tag("path", class_="off", d=_area(points))]
    if rank is not None:
        kept = [point for point in points if point[0] <= wide * rank + 1e-9]
        parts.append(tag("path", class_="on", d=_area(kept)))
        edge = _round(wide * rank)
        parts.append(tag("line", class_="cut", x1=edge, x2=edge, y1=0, y2=_HEIGHT))
    even = _round(wide * spectrum.break_even)
    parts.append(tag("line", class_="even", x1=even, x2=even, y1=0, y2=_HEIGHT))
    chosen = "left dense" if rank is None else f"rank {rank} chosen"
    label = (
        f"spectrum of the {spectrum.of}: {chosen}, {spectrum.full} ranks, "
        f"break-even {spectrum.break_even:.4g}"
    )
    return tag(
        "svg",
        tag("title", label),
        *parts,
        class_="spark",
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        preserveAspectRatio="none",
        role="img",
    )


def _height(value: float) -> float:
    """From the top: 0 for the largest value, the whole height three decades below it."""
    if value <= 0.0:
        return float(_HEIGHT)
    return _HEIGHT * min(1.0, -math.log10(value) / _DECADES)


def _area(points: Sequence[tuple[float, float]]) -> str:
    """A path under points, down to the axis."""
    line = " ".join(f"{_round(x)} {_round(y)}" for x, y in points)
    return f"M{_round(points[0][0])} {_HEIGHT}L{line}L{_round(points[-1][0])} {_HEIGHT}Z"


def _round(number: float) -> str:
    return f"{number:.1f}".removesuffix(".0")


@dataclass(frozen=True)
class Runs:
    """A model's runs, for `timings`; times of a model that was not timed are left out."""

    label: str
    times: Milliseconds


def timings(rows: Sequence[Runs]) -> Html:
    """Every run as a dot, the median with its 95 % interval; one axis from 0 for all rows.

    The axis ends where nearly all runs have ended; the few beyond, as of a machine that was busy
    for a moment, are drawn at its end.

    Args:
        rows: the models, the reference first.
    """
    last = max(_most(row.times) for row in rows)
    ticks = _ticks(last)
    end = ticks[-1]
    high = 46.0 * len(rows)

    def x(value: float) -> float:
        return 4.0 + 344.0 * min(value, end) / end

    parts = []
    for value in ticks:
        at = _round(x(value))
        parts.append(tag("line", class_="grid", x1=at, x2=at, y1=0, y2=_round(high)))
        side = "start" if value == 0 else "end" if value == end else "middle"
        parts.append(
            tag("text", f"{value:g}", class_="tick", x=at, y=_round(high + 14), text_anchor=side)
        )
    for number, row in enumerate(rows):
        top = 46.0 * number
        tone = "before" if number == 0 else "after"
        for index, value in enumerate(row.times.runs):
            y = top + 28.0 + 9.0 * (((index * 0.618034) % 1.0) - 0.5)  # spread, the same every time
            parts.append(
                tag("circle", class_=f"run {tone}", cx=_round(x(value)), cy=_round(y), r=2)
            )
        if row.times.certain is not None:
            low, up = row.times.certain
            wide = max(x(up) - x(low), 1.5)
            parts.append(
                tag(
                    "rect",
                    class_=f"sure {tone}",
                    x=_round(x(low)),
                    y=_round(top + 18),
                    width=_round(wide),
                    height=20,
                    rx=1.5,
                )
            )
        middle = _round(x(row.times.median))
        y1, y2 = _round(top + 16), _round(top + 40)
        parts.append(tag("line", class_=f"median {tone}", x1=middle, x2=middle, y1=y1, y2=y2))
        label = f"{row.label}: {milliseconds(row.times.median)}"
        parts.append(tag("text", label, class_="label", x=4, y=_round(top + 11)))
    parts.append(tag("text", "ms", class_="tick", x=348, y=_round(high + 26), text_anchor="end"))
    title = "; ".join(f"{row.label}: median {milliseconds(row.times.median)}" for row in rows)
    box = f"0 0 352 {_round(high + 30)}"
    return tag("svg", tag("title", title), *parts, class_="chart", viewBox=box, role="img")


def _most(times: Milliseconds) -> float:
    """Where a model's row may end: with all runs, but not far beyond most of them."""
    if not times.runs:
        return 1.1 * times.median
    near = times.runs[int(0.75 * (len(times.runs) - 1))]
    return max(min(times.runs[-1], 1.5 * near), times.median) * 1.02


def _ticks(last: float) -> list[float]:
    """From 0 up to a round number not below ``last``, in at most six steps."""
    if not last > 0.0 or not math.isfinite(last):
        return [0.0, 1.0]
    power = 10.0 ** math.floor(math.log10(last))
    step = next(s * power / 10 for s in (1, 2, 5, 10, 20, 50) if last / (s * power / 10) <= 6)
    return [float(f"{step * n:.6g}") for n in range(math.ceil(last / step - 1e-9) + 1)]


@dataclass(frozen=True)
class Mark:
    """A point of `scatter`: where it is, what it is called, and the interval of its x."""

    x: float
    y: float
    label: str
    interval: tuple[float, float] | None = None


def scatter(marks: Sequence[Mark], across: str, up: str) -> Html:
    """Points joined by a line, both axes from 0.

    Args:
        marks: in the order of the line.
        across: what x is.
        up: what y is.
    """
    ends = [mark.interval[1] if mark.interval is not None else mark.x for mark in marks]
    xs, ys = _ticks(max(ends)), _ticks(max(mark.y for mark in marks))

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + (_RIGHT - _LEFT - 14.0) * min(x / xs[-1], 1.0),
            _BOTTOM - (_BOTTOM - _TOP) * min(y / ys[-1], 1.0),
        )

    parts = []
    for value in ys:
        level = _round(at(0, value)[1])
        parts.append(tag("line", class_="grid", x1=_LEFT, x2=_RIGHT, y1=level, y2=level))
        parts.append(
            tag("text", f"{value:g}", class_="tick", x=_LEFT - 5, y=level, dy=3, text_anchor="end")
        )
    for value in xs:
        place = _round(at(value, 0)[0])
        parts.append(
            tag("text", f"{value:g}", class_="tick", x=place, y=_BOTTOM + 14, text_anchor="middle")
        )
    places = [at(mark.x, mark.y) for mark in marks]
    rising = marks[-1].x > marks[0].x
    line = "L".join(f"{_round(x)} {_round(y)}" for x, y in places)
    parts.append(tag("path", class_="line", d=f"M{line}"))
    for mark, (x, y) in zip(marks, places, strict=True):
        if mark.interval is not None:
            low, high = (_round(at(value, 0)[0]) for value in mark.interval)
            parts.append(tag("line", class_="span", x1=low, x2=high, y1=_round(y), y2=_round(y)))
        parts.append(
            tag("circle", tag("title", mark.label), class_="point", cx=_round(x), cy=_round(y), r=4)
        )
        side, aside = ("end", x - 6) if rising else ("start", x + 6)  # beside the line, not on it
        parts.append(
            tag("text", mark.label, class_="label", x=_round(aside), y=_round(y - 6),
                text_anchor=side)
        )  # fmt: skip
    parts.append(tag("text", up, class_="axis", x=0, y=8))
    parts.append(tag("text", across, class_="axis", x=_RIGHT, y=_BOTTOM + 30, text_anchor="end"))
    title = f"{up} against {across}"
    box = f"0 0 {_RIGHT + 4:g} {_BOTTOM + 34:g}"
    return tag("svg", tag("title", title), joined(parts), class_="chart", viewBox=box, role="img")
