"""Ranges of values: what each way to find them keeps, and what has none."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_lowrank.errors import InputError
from onnx_lowrank.fitting.ranges import METHODS, Ranges
from onnx_lowrank.maps.static import ByteStep


def span(step: ByteStep) -> tuple[float, float]:
    return -step.zero * step.scale, (255 - step.zero) * step.scale


def test_extremes_of_all_samples_with_zero() -> None:
    ranges = Ranges()
    ranges.see({"a": np.array([1.0, 3.0], np.float32), "b": np.array([[-1.0]], np.float32)})
    ranges.see({"a": np.array([2.0, 5.1], np.float32), "b": np.array([[3.0]], np.float32)})
    steps = ranges.steps("minmax")
    assert span(steps["a"]) == pytest.approx((0.0, 5.1))
    assert steps["a"].zero == 0
    low, high = span(steps["b"])
    assert high - low == pytest.approx(4.0)
    assert low == pytest.approx(-1.0, abs=4.0 / 255.0)


def test_one_outlier_is_left_out_by_all_but_the_extremes(rng: np.random.Generator) -> None:
    ranges = Ranges()
    for number in range(4):
        values = rng.standard_normal(250_000).astype(np.float32)
        if number == 2:
            values[7] = 90.0
        ranges.see({"a": values})
    high = {method: span(ranges.steps(method)["a"])[1] for method in METHODS}
    assert high["minmax"] == pytest.approx(90.0, rel=0.05)
    assert 3.0 < high["percentile"] < 20.0
    assert 2.0 < high["entropy"] < 20.0


@pytest.mark.parametrize("method", METHODS)
def test_what_never_changes(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    ranges = Ranges()
    for _ in range(2):
        ranges.see(
            {
                "zero": np.zeros((2, 3), np.float32),
                "seven": np.full(4, 7.0, np.float32),
                "none": np.zeros((0, 3), np.float32),
            }
        )
    steps = ranges.steps(method)  # type: ignore[arg-type]
    assert set(steps) == {"zero", "seven", "none"}
    assert steps["zero"].scale > 0.0
    assert steps["none"].scale > 0.0
    assert span(steps["seven"])[1] == pytest.approx(7.0)
    assert capsys.readouterr().out == ""


def test_numbers_that_have_no_range() -> None:
    with pytest.raises(InputError, match="a holds NaN or Inf on a sample"):
        Ranges().see({"a": np.array([1.0, np.nan], np.float32)})
