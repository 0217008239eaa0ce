"""The main job as a command: its options, its report and its gate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.external_data_helper
import onnx.numpy_helper
import onnxruntime as ort
import pytest

from tests.helpers.commands import (
    QUICK,
    M,
    N,
    call,
    error,
    litter,
    names,
    ranks,
    report_of,
    run,
    weight,
)
from tests.helpers.models import linear_model, parameters, parse, uniform


def test_it_prints_everything_at_a_glance_and_is_quiet_on_standard_error(source: Path) -> None:
    out = source.with_name("out.onnx")
    done = run(source, out)
    assert done.returncode == 0
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    for part in ("fc", f"{M}×{N}", "parameters", "linear parameters", "MACs", "bytes", "latency"):
        assert part in done.stdout
    for part in ("random input", "relative L2", "cosine", "max |Δ|", f"wrote {out}"):
        assert part in done.stdout
    assert not litter(source.parent)
    x = uniform([5, M], np.random.default_rng(2))
    before, after = (
        ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
        for path in (source, out)
    )
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)


def test_options_may_stand_before_the_paths(source: Path) -> None:
    out = source.with_name("out.onnx")
    assert call("--no-simplify", "--no-check", "--no-bench", source, out) == 0
    assert out.exists()


def test_the_report_has_every_field_and_agrees_with_a_count_of_the_file(source: Path) -> None:
    out = source.with_name("out.onnx")
    report = report_of(
        source, out, "--rank", 8, "--samples", 3, "--allow-slower", folder=source.parent
    )

    def counted(path: Path) -> tuple[int, int]:
        return path.stat().st_size, parameters(onnx.load(path))

    assert report["version"] == 1
    for key, path in (("input", source), ("output", out)):
        assert report[key]["path"] == str(path)
        assert (report[key]["bytes"], report[key]["parameters"]) == counted(path)
    (layer,) = report["layers"]
    assert layer["name"] == "fc"
    assert layer["op_type"] in ("MatMul", "Gemm")
    assert isinstance(layer["form"], str)
    assert layer["shape"] == [M, N]
    assert layer["rank"] == 8
    assert layer["status"] == "factored"
    assert isinstance(layer["reason"], str)
    assert layer["parameters_before"] == M * N
    assert layer["parameters_after"] == 8 * (M + N)
    assert layer["energy"] == pytest.approx(1.0)
    assert 0 <= layer["weight_error"] < 1e-5
    totals = report["totals"]
    assert totals["parameters_before"] == M * N + N
    assert totals["parameters_after"] == 8 * (M + N) + N
    assert totals["linear_parameters_before"] == M * N
    assert totals["linear_parameters_after"] == 8 * (M + N)
    assert totals["macs_before"] == M * N  # one row
    assert totals["macs_after"] == 8 * (M + N)
    check = report["check"]
    assert (check["data"], check["samples"]) == ("random", 3)
    (provider,) = check["providers"]
    assert provider["provider"] == "CPUExecutionProvider"
    (output,) = provider["outputs"]
    assert output["name"] == "y"
    assert 0 <= output["relative_l2"] < 1e-5
    assert output["max_abs_error"] >= 0
    assert output["cosine"] == pytest.approx(1.0)
    assert output["top1_agreement"] is None or 0 <= output["top1_agreement"] <= 1
    (latency,) = report["latency"]
    assert latency["provider"] == "CPUExecutionProvider"
    assert latency["threads"] >= 1
    for side in ("before_ms", "after_ms"):
        assert 0 < latency[side]["median"] <= latency[side]["p90"]
    speedup = latency["speedup"]
    assert 0 < speedup["low"] <= speedup["median"] <= speedup["high"]
    assert report["settings"]["rank"] == 8
    assert report["settings"]["energy"] is None
    assert report["settings"]["min_gain"] == 0.1
    assert {"load", "simplify", "measure", "rewrite", "check", "bench"} <= set(report["seconds"])
    assert all(isinstance(seconds, float) for seconds in report["seconds"].values())


def test_energy_chooses_the_rank(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    u, _ = np.linalg.qr(rng.standard_normal((64, 64)))
    values = np.array([4.0, 2.0, 1.0] + [1e-4] * 61)
    path = tmp_path / "in.onnx"
    onnx.save(linear_model((u * values @ u.T).astype(np.float32)), path)
    for energy, rank in ((0.7, 1), (0.9, 2), (0.999, 3)):  # shares 16, 20 and 21 of 21
        out = tmp_path / f"{rank}.onnx"
        args = ("--energy", energy, "--rank-multiple", 1, "--no-check")
        report = report_of(path, out, *args, *QUICK, folder=tmp_path)
        assert ranks(report) == [rank]
        assert report["layers"][0]["energy"] >= energy


def test_energy_is_095_by_default(source: Path) -> None:
    report = report_of(source, source.with_name("out.onnx"), *QUICK, folder=source.parent)
    assert report["settings"]["energy"] == 0.95


@pytest.mark.parametrize(
    ("options", "rank"),
    [
        (["--rank", "5"], 5),  # as it is, no multiple of 8
        (["--rank", "39"], None),  # 39·160 > 0.9·6144
        (["--rank", "39", "--min-gain", "-1"], 39),
        (["--rank", "5000", "--min-gain", "-1"], 64),
        (["--keep", "0.5", "--rank-multiple", "1"], 19),
        (["--keep", "0.01"], None),
        (["--energy", "1.0", "--min-gain", "0.9"], None),  # 3 at most
    ],
)
def test_rank_keep_and_min_gain(options: list[str], rank: int | None, source: Path) -> None:
    args = (source, source.with_name("out.onnx"), *options, "--no-check", *QUICK)
    report = report_of(*args, folder=source.parent)
    assert ranks(report) == [rank]
    (layer,) = report["layers"]
    assert layer["status"] == ("dense" if rank is None else "factored")
    if rank is None:
        assert layer["reason"]
        assert layer["parameters_after"] == M * N


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--include", "head"], [None, 8]),
        (["--include", "enc*"], [8, None]),
        (["--include", "encoder.fc"], [8, None]),  # the torch scope
        (["--include", "enc*", "--include", "h?ad"], [8, 8]),
        (["--exclude", "head"], [8, None]),
        (["--exclude", "*"], [None, None]),
        (["--include", "*", "--exclude", "encoder"], [None, 8]),
    ],
)
def test_include_and_exclude(options: list[str], expected: list[int | None], two: Path) -> None:
    args = (two, two.with_name("out.onnx"), "--rank", 8, *options, *QUICK)
    report = report_of(*args, folder=two.parent)
    assert ranks(report) == expected
    for layer in report["layers"]:
        if layer["rank"] is None:
            assert "clude" in layer["reason"]


@pytest.mark.parametrize("option", ["--include", "--exclude"])
def test_a_glob_that_matches_nothing_lists_near_names(
    option: str, two: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert call(two, two.with_name("out.onnx"), option, "encoder/fx", *QUICK) == 1
    text = error(capfd)
    assert f"{option} encoder/fx" in text
    assert "'encoder/fc'" in text
    assert names(two.parent) == ["two.onnx"]


def test_shapes_for_check_and_timing(two: Path) -> None:
    for options in (["--dim", "batch=7"], ["--input-shape", f"x:7,{M}"]):
        out = two.with_name("out.onnx")
        report = report_of(two, out, "--force", *options, *QUICK, folder=two.parent)
        assert report["totals"]["macs_before"] == 7 * 2 * M * N


@pytest.mark.parametrize(
    ("options", "needle"),
    [
        (["--dim", "bath=7"], "'batch'"),
        (["--input-shape", "z:1,96"], "'x'"),
        (["--input-shape", "x:1,95"], "96"),
        (["--input-shape", "x:1"], "x"),
    ],
)
def test_shapes_that_do_not_fit_are_errors(
    options: list[str], needle: str, two: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert call(two, two.with_name("out.onnx"), *options, *QUICK) == 1
    assert needle in error(capfd)
    assert names(two.parent) == ["two.onnx"]


def test_data_samples_and_seed(source: Path) -> None:
    folder = source.parent
    data = folder / "data.npz"
    np.savez(data, x=uniform([40, M], np.random.default_rng(5)))

    def check(*options: object) -> dict[str, Any]:
        out = folder / "out.onnx"
        args = ("--rank", 4, "--force", "--no-simplify", "--no-bench", "--samples", 3)
        found: dict[str, Any] = report_of(source, out, *args, *options, folder=folder)["check"]
        return found

    given = check("--data", data)
    assert (given["data"], given["samples"]) == (str(data), 3)
    assert check("--data", data) == given
    assert check("--data", data, "--seed", 1) != given
    assert check()["data"] == "random"
    assert check() == check("--seed", 0)
    assert check() != check("--seed", 1)


@pytest.mark.parametrize(("limit", "code"), [(1e-9, 3), (0.9, 0)])
def test_the_gate(limit: float, code: int, source: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out, report = source.with_name("out.onnx"), source.with_name("report.json")
    options = ("--rank", 4, "--max-error", limit, "--report", report)
    assert call(source, out, *options, *QUICK) == code
    shown = capfd.readouterr()
    assert out.exists() == (code == 0)
    assert "relative L2" in shown.out  # what was measured is shown either way
    assert ("wrote" in shown.out) == (code == 0)
    assert ("--max-error" in shown.err) == (code == 3)
    assert shown.err.count("\n") == (code == 3)
    assert json.loads(report.read_text())["output"]["path"] == (str(out) if code == 0 else None)
    assert not litter(source.parent)


def test_the_gate_keeps_an_old_file(source: Path) -> None:
    out = source.with_name("out.onnx")
    out.write_bytes(source.read_bytes())
    assert call(source, out, "--rank", 4, "--max-error", 1e-9, "--force", *QUICK) == 3
    assert out.read_bytes() == source.read_bytes()


def test_steps_can_be_left_out(source: Path) -> None:
    out = source.with_name("out.onnx")
    report = report_of(
        source, out, "--no-simplify", "--no-check", "--no-bench", folder=source.parent
    )
    assert report["check"] is None
    assert report["latency"] == []
    assert "simplify" not in report["seconds"]
    onnx.checker.check_model(str(out), full_check=True)


@pytest.mark.parametrize("name", ["cpu", "CPU", "CPUExecutionProvider"])
def test_threads_and_provider(name: str, source: Path) -> None:
    out = source.with_name("out.onnx")
    args = ("--threads", 1, "--ep", name, "--no-simplify", "--samples", 1)
    report = report_of(source, out, *args, folder=source.parent)
    assert report["latency"][0]["threads"] == 1
    assert report["latency"][0]["provider"] == "CPUExecutionProvider"


def test_dry_run_writes_nothing(source: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = source.with_name("out.onnx")
    assert call(source, out, "--dry-run", "--rank", 8, "--no-simplify") == 0
    text = capfd.readouterr().out
    assert "1 factored" in text
    assert f"{8 * (M + N) + N:,}" in text
    assert "wrote" not in text
    assert names(source.parent) == ["in.onnx"]


def test_dry_run_predicts_the_parameters(source: Path) -> None:
    out = source.with_name("out.onnx")
    args = (source, out, "--no-simplify", "--no-bench")
    predicted = report_of(*args, "--dry-run", folder=source.parent)
    done = report_of(*args, folder=source.parent)
    assert predicted["totals"]["parameters_after"] == done["totals"]["parameters_after"]
    assert ranks(predicted) == ranks(done)


def test_dry_run_does_not_mind_an_existing_out(source: Path) -> None:
    out = source.with_name("out.onnx")
    out.write_text("mine")
    assert call(source, out, "--dry-run", "--no-simplify") == 0
    assert out.read_text() == "mine"


def test_nothing_worth_replacing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    model = parse(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[N, 64] x) => (float[N, 64] y) {
            same = Identity(x)
            h = MatMul(same, W)
            y = Identity(h)
        }""",
        {"W": uniform([64, 64], rng)},
    )
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(model, source)
    assert call(source, out, "--no-bench", "--energy", 0.99) == 0
    text = capfd.readouterr().out
    assert "nothing was replaced" in text
    assert "of its break-even rank" in text
    assert "try a lower --energy, --data to fit to the outputs, or --keep 0.8 to fix" in text
    onnx.checker.check_model(str(out), full_check=True)
    assert [node.op_type for node in onnx.load(out).graph.node] == ["MatMul"]  # simplified
    # Who gives samples is not told to.
    np.savez(tmp_path / "x.npz", x=rng.standard_normal((200, 64)).astype(np.float32))
    data = ("--data", tmp_path / "x.npz", "--force")
    assert call(source, out, "--no-bench", "--energy", 0.99, *data) == 0
    assert "try a lower --energy, or --keep 0.8 to fix" in capfd.readouterr().out


def test_warnings_of_onnxruntime_are_counted_and_shown_on_request(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = linear_model(weight())
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = N + 1  # a lie: it warns
    source = tmp_path / "in.onnx"
    onnx.save(model, source)
    assert call(source, tmp_path / "out.onnx", *QUICK) == 0
    shown = capfd.readouterr()
    assert shown.err == ""
    assert "ONNX Runtime warning" in shown.out
    assert "--verbose" in shown.out
    assert call(source, tmp_path / "out.onnx", "--force", "--verbose", *QUICK) == 0
    assert "onnxruntime" in capfd.readouterr().err
    swept = ("--out", tmp_path / "curve", "--budgets", 0.5, "--verbose", *QUICK)
    assert call("sweep", source, *swept) == 0
    shown = capfd.readouterr()
    assert "shown with --verbose" in shown.out
    assert "onnxruntime" in shown.err


def test_a_tie_in_the_original_is_no_disagreement(tmp_path: Path) -> None:
    """Columns that are equal give equal outputs, of which rounding makes one the largest."""
    source = tmp_path / "in.onnx"
    onnx.save(linear_model(np.tile(weight(0, M, 8), (1, 8))), source)
    report = report_of(source, tmp_path / "out.onnx", "--rank", 8, *QUICK, folder=tmp_path)
    (output,) = report["check"]["providers"][0]["outputs"]
    assert output["top1_agreement"] in (None, 1.0)
