"""Charts: where things are drawn."""

from __future__ import annotations

import re

import numpy as np
import pytest

from onnx_lowrank.compression.figures import shown_spectrum
from onnx_lowrank.maps.choice import Spectrum
from onnx_lowrank.reports.charts import Mark, Runs, scatter, spark, timings
from onnx_lowrank.schema.measures import Milliseconds


def numbers(path: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?[\d.]+", path)]


def test_a_spectrum_marks_what_is_kept_and_the_break_even() -> None:
    squares = 10.0 ** -np.arange(0.0, 8.0, 0.08)
    shown = shown_spectrum(Spectrum(squares, True), (100, 300), 25)
    assert shown is not None
    drawn = spark(shown, 25)
    off, on = re.findall(r'd="([^"]+)"', drawn)
    assert max(numbers(on)[::2]) == pytest.approx(120 * 25 / 100)
    assert max(numbers(off)[::2]) == 120
    assert min(numbers(off)) == 0
    assert max(numbers(off)[1::2]) == 30, "what is below three decades lies on the axis"
    assert 'class="even" x1="90"' in drawn
    assert "rank 25 chosen, 100 ranks, break-even 75" in drawn
    dense = spark(shown, None)
    assert 'class="on"' not in dense
    assert "left dense" in dense


def test_only_leading_components_end_where_they_are_known() -> None:
    shown = shown_spectrum(Spectrum(np.ones(10), True, "weight", 90.0), (100, 100))
    assert shown is not None
    (off,) = re.findall(r'd="([^"]+)"', spark(shown, None))
    assert max(numbers(off)[::2]) == 12


def test_runs_share_an_axis_from_zero() -> None:
    rows = [
        Runs("<a>", Milliseconds(10.0, 11.0, (9.9, 10.1), (9.0, 10.0, 11.0, 500.0))),
        Runs("b", Milliseconds(5.0, 6.0, None, (5.0,))),
    ]
    drawn = timings(rows)
    assert drawn.count("<circle") == 5
    assert drawn.count('class="sure') == 1
    assert "&lt;a&gt;: 10 ms" in drawn
    ticks = [float(text) for text in re.findall(r'class="tick"[^>]*>([\d.]+)<', drawn)]
    assert ticks[0] == 0
    assert 11.0 <= ticks[-1] < 30, "one slow run does not squeeze all others"


@pytest.mark.parametrize("error", [0.0, 1e-9, 0.3, 12.0])
def test_a_curve_stays_inside_its_frame(error: float) -> None:
    marks = [Mark(3.0, 0.0, "1"), Mark(1.5, error, "0.5", (1.2, 1.9))]
    drawn = scatter(marks, "MB", "error")
    assert drawn.count("<circle") == 2
    for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', drawn):
        assert 44 <= float(x) <= 352
        assert 26 <= float(y) <= 186
