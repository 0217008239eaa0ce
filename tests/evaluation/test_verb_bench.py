"""The verb bench: latencies of models on several targets, and its gate."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnx_lowrank.evaluation.bench import Noise, Ratio, TargetBench, missed_speedup
from onnx_lowrank.numerics.intervals import median_interval
from onnx_lowrank.runtime.timing import interleave
from tests.helpers.commands import call, report_of
from tests.helpers.targets import pair, require


def test_bench_measures_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = pair(tmp_path)
    args = ("bench", a, b, "--iterations", 6, "--warmup", 0, "--threads", 1, "--threads", 2)
    report = report_of(*args, folder=tmp_path)
    assert [entry["threads"] for entry in report["targets"]] == [1, 2]
    assert report["shapes"] == {"x": [4, 32]}
    for entry in report["targets"]:
        for model in entry["models"]:
            assert model["runs"] == 6
            assert 0 < model["median_ms"] <= model["p90_ms"] <= model["p99_ms"]
            assert model["load_ms"] > 0
            assert model["first_ms"] > 0
            assert model["peak_bytes"] > 10e6
            assert model["elsewhere"] == 0
        (ratio,) = entry["ratios"]
        assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
    printed = capsys.readouterr().out
    assert "b.onnx against a.onnx: " in printed
    assert "noise: " in printed


def test_bench_writes_csv(tmp_path: Path) -> None:
    a, b = pair(tmp_path)
    path = tmp_path / "r.csv"
    assert call("bench", a, b, a, "--iterations", 5, "--threads", 1, "--report", path) == 0
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [row["model"] for row in rows] == [str(a), str(b), str(a)]
    assert rows[0]["ratio"] == ""
    assert float(rows[1]["ratio"]) > 0
    assert {row["target"] for row in rows} == {"cpu"}
    assert not any(row["error"] for row in rows)


@pytest.mark.qnn
def test_bench_of_an_emulator_shows_no_times(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    require("qnn")
    a, b = pair(tmp_path)
    report = report_of("bench", a, b, "--ep", "qnn", "--iterations", 5, folder=tmp_path)
    (entry,) = report["targets"]
    assert entry["emulated"]
    assert entry["ratios"] == []
    for model in entry["models"]:
        assert model["costs"]["context_bytes"] > 0
        for name in ("median_ms", "p90_ms", "p99_ms", "load_ms", "first_ms", "peak_bytes"):
            assert model[name] is None
    printed = capsys.readouterr().out
    assert " ms" not in printed
    assert "qnn is emulated: its times mean nothing and are not shown" in printed
    assert "noise: nothing was timed" in printed


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--threads", 0), "--threads: expected a whole number from 1, got 0"),
        (("--iterations", 0), "--iterations: expected a whole number from 1"),
        (("--warmup", -1), "--warmup: expected a whole number from 0"),
        (("--samples", 0), "--samples: expected a whole number from 1"),
        (
            ("--report", "x.txt"),
            "--report x.txt: expected a name with .json or .html or .md or .csv",
        ),
        (("--ep", "cpu", "--ep", "cpu"), "--target cpu: expected each target once"),
        ((), "Missing argument"),
    ],
)
def test_bench_usage(
    args: tuple[object, ...],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    models = pair(tmp_path) if args else ()
    assert call("bench", *models, *args) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["check", "bench"])
def test_target_that_is_not_there(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(verb, *pair(tmp_path), "--ep", "warp9") == 1
    error = capsys.readouterr().err
    assert error.startswith("onnx-lowrank: error: --target warp9: no such target; expected one of")
    assert error.count("\n") == 1


def test_interleave_gives_every_model_every_place() -> None:
    places: dict[str, set[int]] = {name: set() for name in "abc"}
    order: list[str] = []

    def call_of(name: str) -> Any:
        return lambda: order.append(name)

    rows = interleave([[call_of(name) for name in "abc"]], rounds=6, warmup=1, seconds=None)
    assert len(rows) == 6
    assert all(len(row) == 3 for row in rows)
    assert order[:3] == ["a", "b", "c"]  # warm-up
    followers = set()
    for start in range(3, len(order), 3):
        one_round = order[start : start + 3]
        assert sorted(one_round) == ["a", "b", "c"]
        for place, name in enumerate(one_round):
            places[name].add(place)
        followers |= set(itertools.pairwise(one_round))
    assert all(found == {0, 1, 2} for found in places.values())
    assert len(followers) == 6  # everyone comes right after everyone else now and then


def test_median_interval() -> None:
    rng = np.random.default_rng(0)
    wide = rng.normal(2.0, 0.5, 40)
    median, low, high = median_interval(wide)
    assert median == np.median(wide)
    assert 1.6 < low < median < high < 2.4
    _, narrow_low, narrow_high = median_interval(rng.normal(2.0, 0.05, 40))
    assert narrow_high - narrow_low < (high - low) / 3
    assert median_interval(np.array([3.0])) == (3.0, 3.0, 3.0)
    # Of many samples, about 95 % of the intervals hold the true median.
    held = 0
    for seed in range(200):
        _, low, high = median_interval(np.random.default_rng(seed).exponential(1.0, 30))
        held += low <= np.log(2) <= high
    assert 180 <= held <= 198


def test_noise_line() -> None:
    assert "noise: quiet" in str(Noise(0.01, 0.1, 4))
    assert str(Noise(0.1, 0.5, 4)) == (
        "noise: fair, the middle half of the runs of a model lies within 10 % of its median; "
        "load 0.5 on 4 processors"
    )
    assert "noise: noisy" in str(Noise(0.3, None, 4))


def test_a_latency_misses_its_gate_only_by_the_whole_interval(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = pair(tmp_path)
    report = tmp_path / "r.json"
    args = ("bench", before, after, "--samples", 1, "--iterations", 5, "--report", report)
    assert call(*args, "--min-speedup", 1e-6) == 0
    assert call(*args, "--min-speedup", 1e6) == 3
    found = json.loads(report.read_text())
    assert "less than --min-speedup 1000000" in capsys.readouterr().err
    assert found["missed"].startswith("cpu: ")
    assert call("bench", before, "--min-speedup", 1) == 2
    assert "expected at least two models" in capsys.readouterr().err


@pytest.mark.parametrize(("high", "missed"), [(1.05, True), (1.15, False)])
def test_the_whole_interval_decides(high: float, missed: bool) -> None:
    ratio = Ratio("a", "b", 1.0, 0.9, high)
    entry = TargetBench("cpu", False, None, (), (ratio,))
    assert (missed_speedup([entry], ["a", "b"], 1.1) is not None) == missed
    emulated = TargetBench("qemu", True, None, (), ())
    assert "no times" in str(missed_speedup([emulated], ["a", "b"], 1.1))
