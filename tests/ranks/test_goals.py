"""Goals as they are asked for: sizes, times, and what does not go together."""

from __future__ import annotations

from typing import Any

import pytest

from onnx_lowrank import UsageError, compress
from onnx_lowrank.ranks.goals import Budget, milliseconds_of, size_of


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.5, "max_size": "1MB"}, "keep=… and max_size=…: they exclude each other"),
        ({"energy": 0.9, "tolerance": 0.1}, "energy=… and tolerance=…"),
        ({"speedup": 2.0, "max_latency": "1ms"}, "speedup=… and max_latency=…"),
        ({"uniform": True}, "uniform=True needs keep=…"),
        ({"objective": "size", "keep": 0.5}, "objective=… needs tolerance=…"),
        ({"tolerance": 0.1, "metric": "best"}, "metric=…: expected relative-l2"),
        (
            {"tolerance": 0.1, "objective": "speed"},
            "objective=…: expected one of latency, size, macs",
        ),
        ({"tolerance": -0.1}, "tolerance=…: expected a number from 0, got -0.1"),
        ({"tolerance": 0.1, "check": False}, "tolerance=… and check=False"),
        ({"speedup": 0.0}, "speedup=…: expected a number above 0"),
        ({"speedup": 2.0, "bench": False}, "speedup=… and bench=False"),
        ({"max_latency": "fast"}, "max_latency=…"),
        ({"max_size": "big"}, "max_size=…"),
        ({"keep": 1.5}, r"keep=….*; did you mean 0\.015\?"),
        ({"energy": 0.9, "rank_multiple": "auto"}, "rank_multiple='auto' needs"),
        ({"keep": 0.5, "rank_multiple": "many"}, "rank_multiple=…"),
    ],
)
def test_contradictions_are_usage_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        compress("none.onnx", **options)


@pytest.mark.parametrize(
    ("text", "size"),
    [("20MB", 20_000_000), ("1.5 GiB", 3 * 2**29), ("800k", 800_000), (123, 123), ("7b", 7)],
)
def test_sizes(text: Any, size: int) -> None:
    assert size_of(text) == size


@pytest.mark.parametrize(("text", "ms"), [("5ms", 5.0), ("800us", 0.8), ("0.2 s", 200.0), (3, 3.0)])
def test_times(text: Any, ms: float) -> None:
    assert milliseconds_of(text) == pytest.approx(ms)


def test_budgets_as_one_would_type_them() -> None:
    assert Budget("max-size", 20e6).option == "--max-size 20000000"
    assert Budget("max-latency", 5.0).option == "--max-latency 5ms"
