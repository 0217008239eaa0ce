from __future__ import annotations

from dataclasses import astuple
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from onnx_lowrank.errors import InputError
from onnx_lowrank.runtime import timing as bench
from onnx_lowrank.runtime.session import open_session
from onnx_lowrank.runtime.timing import FEWEST_PAIRS, time_pair

SESSION = open_session(
    ir.to_proto(
        ir.from_onnx_text(
            '<ir_version: 8, opset_import: ["" : 18]> g (float[N, 2] x) => (float[N, 2] y) '
            "{ y = Identity(x) }"
        )
    ).SerializeToString(),
    threads=1,
)
FEEDS = [{"x": np.ones((1, 2), np.float32)}, {"x": np.ones((3, 2), np.float32)}]


def test_pairs_and_progress() -> None:
    done: list[int] = []
    latency = time_pair(
        SESSION, SESSION, FEEDS, provider="P", threads=1, pairs=7, progress=done.append
    )
    assert (latency.provider, latency.threads, latency.pairs) == ("P", 1, 7)
    assert done == list(range(1, 8))
    assert 0 < latency.before_ms.median <= latency.before_ms.p90
    assert 0 < latency.speedup.low <= latency.speedup.median <= latency.speedup.high


@pytest.mark.parametrize(("pairs", "timed"), [(30, FEWEST_PAIRS), (3, 3), (1, 1)])
def test_time_limit_leaves_a_few_pairs(pairs: int, timed: int) -> None:
    latency = time_pair(
        SESSION, SESSION, FEEDS, provider="P", threads=1, pairs=pairs, seconds=0, warmup=0
    )
    assert latency.pairs == timed


def test_figures_from_known_times() -> None:
    times = [(2_000_000, 1_000_000), (4_000_000, 1_000_000), (6_000_000, 2_000_000)]
    latency = bench.latency_of(times, "P", 2)
    assert (latency.before_ms.median, latency.before_ms.p90) == pytest.approx((4.0, 5.6))
    assert latency.before_ms.certain == (2.0, 6.0)
    assert latency.before_ms.runs == (2.0, 4.0, 6.0)
    assert (latency.after_ms.median, latency.after_ms.p90) == pytest.approx((1.0, 1.8))
    # Ratios 2, 4, 3: of the pairs, not of the medians.
    *quantiles, interval, verdict = astuple(latency.speedup)
    assert quantiles == pytest.approx([3.0, 2.2, 3.8])
    assert interval == (2.0, 4.0)
    assert verdict == "faster"
    assert bench.latency_of([(0, 0)], "P", 1).speedup.median == 1


def test_order_flips_and_feeds_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[tuple[str, int]] = []

    def prepare(session: Any, feed: Any) -> Any:
        return lambda: runs.append((session, len(feed["x"])))

    monkeypatch.setattr(bench, "prepare", prepare)
    monkeypatch.setattr(bench, "run", lambda session, feed, what: None)
    time_pair("a", "b", FEEDS, provider="P", threads=1, warmup=1, pairs=4)
    assert runs[:2] == [("a", 1), ("b", 1)]  # warm-up
    assert runs[2:] == [
        ("a", 1), ("b", 1), ("b", 3), ("a", 3), ("a", 1), ("b", 1), ("b", 3), ("a", 3),
    ]  # fmt: skip


def test_errors() -> None:
    with pytest.raises(InputError, match="timing: expected at least one sample"):
        time_pair(SESSION, SESSION, [], provider="P", threads=1)
    with pytest.raises(InputError, match="the original: ONNX Runtime does not run it"):
        time_pair(SESSION, SESSION, [{"x": np.ones(1)}], provider="P", threads=1)
