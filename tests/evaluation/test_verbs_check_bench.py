"""The verbs check, bench and providers, and --ep of the main job."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnx_lowrank.evaluation import check as comparison
from onnx_lowrank.evaluation.bench import Noise, Ratio, TargetBench, missed_speedup
from onnx_lowrank.numerics.arrays import Feed
from onnx_lowrank.numerics.intervals import median_interval
from onnx_lowrank.runtime.session import run as session_run
from onnx_lowrank.runtime.timing import interleave
from onnx_lowrank.targets import open_target
from onnx_lowrank.targets.base import (
    Job,
    Outcome,
    Target,
)
from tests.helpers.commands import call
from tests.helpers.models import parse
from tests.helpers.targets import (
    PLUGIN_PARAMS,
    pair,
    require,
    save,
    two_layers,
)


def report_of(*args: object, folder: Path, code: int = 0) -> dict[str, Any]:
    path = folder / "report.json"
    assert call(*args, "--report", path) == code
    report: dict[str, Any] = json.loads(path.read_text())
    return report


class Pretender(Target):
    """A target that answers what the test wants."""

    def __init__(self, outcomes: Sequence[Outcome], name: str = "pretender") -> None:
        super().__init__(name)
        self.outcomes = tuple(outcomes)

    def run(self, models: Any, feeds: Sequence[Feed], job: Job, advance: Any) -> Any:
        return self.outcomes


def pretend(monkeypatch: pytest.MonkeyPatch, *outcomes: Outcome) -> None:
    real = open_target
    target = Pretender(outcomes)
    monkeypatch.setattr(
        comparison, "open_target", lambda name: target if name == "pretender" else real(name)
    )


# check


def test_check_says_how_the_faces_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An input with a default value need not be fed, so the outputs alone do not show it."""
    text = """<ir_version: 8, opset_import: ["": 17]>
        g (float[2, 4] x{}) => (float[2, 4] y) {{ y = Mul(x, w) }}"""
    files = []
    for name, inputs in (("a", ", float[4] w"), ("b", "")):
        model = parse(text.format(inputs), {"w": np.arange(4, dtype=np.float32)})
        files.append(tmp_path / f"{name}.onnx")
        onnx.save(model, files[-1])
    report = report_of("check", *files, "--samples", 1, folder=tmp_path)
    wanted = f"{files[1]} beside {files[0]}: input 'w' is gone"
    assert wanted in report["notes"]
    assert "input 'w' is gone" in " ".join(capsys.readouterr().out.split())


def test_check_compares_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = pair(tmp_path)
    report = report_of("check", a, b, "--samples", 3, "--threads", 1, folder=tmp_path)
    assert report["models"] == [str(a), str(b)]
    assert (report["data"], report["samples"]) == ("random", 3)
    (target,) = report["targets"]
    (output,) = target["outputs"]
    assert (target["target"], target["emulated"], output["name"]) == ("cpu", False, "y")
    assert output["relative_l2"] == pytest.approx(0.001, rel=1e-2)
    assert [model["against_cpu"] for model in target["models"]] == [[], []]
    assert target["models"][0]["assignment"] == "3 of 3 nodes on CPU"
    printed = capsys.readouterr().out
    assert "B with A" in printed
    assert "note: random input (seed 0), not real data" in printed


@pytest.mark.parametrize(("limit", "code"), [("0.01", 0), ("0.0001", 3), ("0", 3)])
def test_check_limit(
    limit: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = pair(tmp_path)
    report = report_of("check", a, b, "--max-error", limit, folder=tmp_path, code=code)
    assert (report["missed"] is not None) == (code == 3)
    error = capsys.readouterr().err
    assert ("cpu: output 'y' differs by 0.001 (mean relative L2)" in error) == (code == 3)
    assert error.count("\n") == (code == 3)


@pytest.mark.parametrize("name", PLUGIN_PARAMS)
def test_check_on_a_plugin(name: str, tmp_path: Path) -> None:
    require(name)
    a, b = pair(tmp_path)
    args = ("check", a, b, "--ep", "cpu", "--target", name, "--strict", "--samples", 2)
    report = report_of(*args, folder=tmp_path)
    assert [entry["target"] for entry in report["targets"]] == ["cpu", name]
    entry = report["targets"][1]
    assert 1e-4 < entry["outputs"][0]["relative_l2"] < 5e-3
    for model in entry["models"]:
        assert model["against_cpu"][0]["relative_l2"] < 2e-3
        assert model["assignment"].startswith("3 of 3 nodes on ")


def test_check_judges_by_a_metric(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = pair(tmp_path)
    x = np.random.default_rng(0).standard_normal((80, 32)).astype(np.float32)
    np.savez(tmp_path / "d.npz", x=x)
    np.save(tmp_path / "labels.npy", np.zeros(80, np.int64))
    given = ("check", before, after, "--data", tmp_path / "d.npz", "--metric", "top1")
    entry = report_of(*given, folder=tmp_path)["targets"][0]["judged"]
    assert entry["metric"] == "top1"
    assert (entry["before"], entry["samples"]) == (1.0, 16)
    assert "B by A: top1 1 →" in capsys.readouterr().out
    labelled = report_of(*given, "--labels", tmp_path / "labels.npy", folder=tmp_path)
    assert labelled["targets"][0]["judged"]["before"] < 1.0
    assert call(*given[:-2], "--labels", tmp_path / "labels.npy") == 2
    assert "--labels needs --metric" in capsys.readouterr().err


@pytest.mark.qnn
def test_check_fixes_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    require("qnn")
    a, b = pair(tmp_path, rows="N")
    args = ("check", a, b, "--ep", "qnn", "--strict", "--dim", "N=4", "--samples", 1)
    assert call(*args) == 1
    error = capsys.readouterr().err
    assert "--strict wants every node there: 0 of 3 nodes on QNN; left to the CPU:" in error
    report = report_of(*args, "--fix-shapes", folder=tmp_path)
    assert report["targets"][0]["models"][0]["assignment"] == "3 of 3 nodes on QNN"
    assert "copies with fixed inputs are run: x [4, 32]" in report["notes"]


def test_check_takes_data(tmp_path: Path) -> None:
    a, b = pair(tmp_path)
    np.savez(tmp_path / "d.npz", x=np.ones((8, 32), np.float32))
    report = report_of("check", a, b, "--data", tmp_path / "d.npz", folder=tmp_path)
    assert (report["data"], report["samples"]) == (str(tmp_path / "d.npz"), 2)


def test_two_models_with_different_inputs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = pair(tmp_path)[0]
    c = save(two_layers(5), tmp_path / "c.onnx")
    text = '<ir_version: 8, opset_import: ["": 17]> g (float[4] z) => (float[4] y) { y = Abs(z) }'
    d = save(parse(text), tmp_path / "d.onnx")
    for verb in ("check", "bench"):
        assert call(verb, a, c) == 1
        assert capsys.readouterr().err == (
            f"onnx-lowrank: error: {a} and {c} have different inputs: x float32[4, 32] and "
            "x float32[5, 32]\n"
        )
        assert call(verb, a, d) == 1
        assert "have different inputs: x float32[4, 32] and z float32[4]" in capsys.readouterr().err


def test_one_model_may_fix_what_the_other_leaves_free(tmp_path: Path) -> None:
    fixed = save(two_layers(3), tmp_path / "fixed.onnx")
    free = save(two_layers("N"), tmp_path / "free.onnx")
    report = report_of("check", free, fixed, "--dim", "N=3", folder=tmp_path)
    assert report["targets"][0]["outputs"][0]["relative_l2"] < 1e-6


def test_check_reports_what_did_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = pair(tmp_path)
    outcome = Outcome(error="b.onnx: it gives NaN", nodes={"P": ("n",)}, notes=("slow today",))
    pretend(monkeypatch, Outcome(outputs=({"y": np.ones((4, 32))},)), outcome)
    args = ("check", a, b, "--ep", "pretender", "--samples", 1, "--max-error", 1)
    report = report_of(*args, folder=tmp_path, code=1)
    captured = capsys.readouterr()
    assert captured.err == "onnx-lowrank: error: pretender: b.onnx: it gives NaN\n"
    assert "B does not run: b.onnx: it gives NaN" in captured.out
    (entry,) = report["targets"]
    assert entry["outputs"] == []
    assert entry["models"][0]["against_cpu"][0]["name"] == "y"
    assert entry["models"][1]["assignment"] == "1 node on P"
    assert "pretender: slow today" in report["notes"]


def test_check_of_float16_says_where_it_was_judged(tmp_path: Path) -> None:
    a, b = pair(tmp_path, kind="float16")
    report = report_of("check", a, b, "--samples", 1, folder=tmp_path)
    note = "float16 weights judged on cpu only, which computes them in float32"
    from onnx_lowrank.runtime.providers import CPU

    assert any(text.startswith(note) for text in report["notes"]) == (not CPU.half)


@pytest.mark.qnn
def test_check_of_float16_where_it_is_computed(tmp_path: Path) -> None:
    require("qnn")
    a, b = pair(tmp_path, kind="float16")
    report = report_of("check", a, b, "--samples", 1, "--ep", "qnn", folder=tmp_path)
    assert not any("float16" in text for text in report["notes"])


# bench


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


# The others


def test_providers_lists_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("providers") == 0
    printed = capsys.readouterr().out
    for name in ("cpu", "openvino", "qnn", "webgpu"):
        assert f"\n{name} " in printed


@pytest.mark.parametrize("name", PLUGIN_PARAMS)
def test_main_job_on_a_plugin(name: str, tmp_path: Path) -> None:
    require(name)
    from onnx_lowrank.runtime.plugins import PLUGINS

    a, out = pair(tmp_path)[0], tmp_path / "out.onnx"
    args = (a, out, "--ep", name, "--rank", 8, "--no-simplify", "--samples", 2, "--allow-slower")
    report = report_of(*args, folder=tmp_path)
    title = PLUGINS[name].title
    assert f"the original: 3 of 3 nodes on {title}" in report["notes"]
    assert f"the result: 5 of 5 nodes on {title}" in report["notes"]
    assert report["check"]["providers"][0]["provider"] == PLUGINS[name].provider
    assert report["check"]["providers"][0]["outputs"][0]["relative_l2"] < 5e-3
    emulated = PLUGINS[name].emulated
    assert bool(report["latency"]) == (not emulated)
    assert (
        f"not timed: {title} is emulated, its times mean nothing" in report["notes"]
    ) == emulated


def test_main_job_on_a_provider_that_gives_nan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from onnx_lowrank.compression import trial
    from onnx_lowrank.runtime import opener
    from onnx_lowrank.runtime.providers import CPU, Provider

    a, out = save(two_layers(), tmp_path / "a.onnx"), tmp_path / "out.onnx"

    def run(session: Any, feed: Any, what: str) -> Any:
        outputs = session_run(session, feed, what)
        if what == str(a):  # the original's first run on the provider
            outputs["y"][:] = np.nan
        return outputs

    monkeypatch.setattr(opener, "run", run)
    monkeypatch.setattr(trial, "resolve_provider", lambda _: Provider("other", CPU.full, "Other"))
    args = (a, out, "--ep", "other", "--rank", 8, "--no-simplify", "--samples", 2)
    report = report_of(*args, folder=tmp_path)
    why = (
        f"{a}: CPUExecutionProvider runs it and gives NaN or Inf in 128 of 128 values of output "
        "'y', where the CPU gives numbers"
    )
    assert f"neither checked nor timed: {why}" in report["notes"]
    assert report["check"] is None
    capsys.readouterr()
    assert call(*args, "--force", "--max-error", 1) == 1
    assert f"--max-error cannot be judged: {why}" in capsys.readouterr().err


@pytest.mark.qnn
def test_main_job_names_what_falls_back(tmp_path: Path) -> None:
    require("qnn")
    a = save(two_layers("N"), tmp_path / "a.onnx")
    args = (a, tmp_path / "out.onnx", "--ep", "qnn", "--rank", 8, "--no-simplify", "--samples", 2)
    report = report_of(*args, folder=tmp_path)
    (note,) = [n for n in report["notes"] if n.startswith("the result: ")]
    assert note.startswith("the result: 0 of 5 nodes on QNN; left to the CPU: ")
    assert "fc2.lowrank (MatMul)" in note


@pytest.mark.qnn
def test_main_job_refuses_a_latency_of_an_emulator(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    require("qnn")
    a, out = save(two_layers(), tmp_path / "a.onnx"), tmp_path / "out.onnx"
    assert call(a, out, "--ep", "qnn", "--speedup", 1.1, "--samples", 2, "--no-simplify") == 1
    assert "emulated here, its times mean nothing" in capsys.readouterr().err
    assert not out.exists()


def test_main_job_of_float16(tmp_path: Path) -> None:
    from onnx_lowrank.runtime.providers import CPU

    a = save(two_layers(kind="float16"), tmp_path / "a.onnx")
    args = (a, tmp_path / "out.onnx", "--rank", 8, "--no-simplify", "--no-bench", "--samples", 2)
    report = report_of(*args, folder=tmp_path)
    told = any(note.startswith("float16 weights judged on CPU only") for note in report["notes"])
    assert told == (not CPU.half)


def test_a_model_that_is_too_large_misses_the_gate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = pair(tmp_path)
    size = after.stat().st_size
    report = tmp_path / "r.json"
    args = ("check", before, after, "--samples", 2, "--report", report)
    assert call(*args, "--max-size", size) == 0
    assert json.loads(report.read_text())["missed"] is None
    assert call(*args, "--max-size", size - 1) == 3
    assert f"has {size:,} bytes, more than --max-size {size - 1}" in capsys.readouterr().err
    assert "more than" in json.loads(report.read_text())["missed"]


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
