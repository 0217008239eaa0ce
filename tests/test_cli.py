from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.external_data_helper
import onnx.numpy_helper
import onnxruntime as ort
import pytest

from onnx_lowrank.cli import _exit_code
from tests.models import known_rank, linear_model, parameters, parse, uniform

COMMAND = Path(sysconfig.get_path("scripts")) / "onnx-lowrank"
QUICK = ("--no-simplify", "--no-bench", "--samples", "2")
M, N, RANK = 96, 64, 8


def weight(seed: int = 0, m: int = M, n: int = N, rank: int = RANK) -> npt.NDArray[np.float32]:
    return known_rank(m, n, rank, np.random.default_rng(seed))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """One linear layer whose weight has rank 8."""
    path = tmp_path / "in.onnx"
    onnx.save(linear_model(weight(), bias=uniform([N], np.random.default_rng(1))), path)
    return path


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """Two layers, "encoder/fc" with the scopes of torch, and "head"."""
    model = parse(
        f"""<ir_version: 8, opset_import: ["": 17]>
        two (float[batch, {M}] x) => (float[batch, {M}] y) {{
            h = MatMul(x, W)
            y = MatMul(h, V)
        }}""",
        {"W": weight(), "V": weight(1, N, M)},
    )
    model.graph.node[0].name, model.graph.node[1].name = "encoder/fc", "head"
    entry = model.graph.node[0].metadata_props.add()
    entry.key, entry.value = "pkg.torch.onnx.name_scopes", "['', 'encoder', 'encoder.fc']"
    path = tmp_path / "two.onnx"
    onnx.save(model, path)
    return path


def call(*args: object) -> int:
    return _exit_code([str(arg) for arg in args])


def run(*args: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(COMMAND), *map(str, args)], capture_output=True, text=True, check=False, cwd=cwd
    )


def report_of(*args: object, folder: Path) -> dict[str, Any]:
    path = folder / "report.json"
    assert call(*args, "--report", path) == 0
    report: dict[str, Any] = json.loads(path.read_text())
    return report


def ranks(report: dict[str, Any]) -> list[int | None]:
    return [layer["rank"] for layer in report["layers"]]


def error(capfd: pytest.CaptureFixture[str]) -> str:
    """Standard error, which has to be one line in the command's form."""
    text = capfd.readouterr().err
    assert text.startswith("onnx-lowrank: error: ")
    assert text.endswith("\n")
    assert text.count("\n") == 1
    assert "Traceback" not in text
    return text


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


def litter(folder: Path) -> list[str]:
    return [item.name for item in folder.rglob(".onnx-lowrank-*")]


# Calling it


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_shows_the_bare_form_and_the_verbs(
    option: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert call(option) == 0
    text = capfd.readouterr().out
    assert "onnx-lowrank IN OUT [OPTIONS]" in text
    assert "\n  inspect " in text
    assert "\n  providers " in text
    assert "\\b" not in text
    for name in (
        *("--energy", "--rank", "--keep", "--include", "--exclude", "--min-gain"),
        *("--rank-multiple", "--input-shape", "--dim", "--data", "--samples", "--seed"),
        *("--max-error", "--no-simplify", "--no-check", "--no-bench", "--threads", "--ep"),
        *("--external-data", "--report", "--dry-run", "--force", "--verbose"),
    ):
        assert f"\n  {name}" in text


def test_without_arguments_it_shows_the_help_and_exits_with_2(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert call() == 2
    shown = capfd.readouterr()
    assert "IN OUT [OPTIONS]" in shown.out
    assert not shown.err


def test_both_entry_points_do_the_same() -> None:
    module = subprocess.run(
        [sys.executable, "-m", "onnx_lowrank", "--help"], capture_output=True, text=True, check=True
    )
    assert module.stdout == run("--help").stdout


def test_version(capfd: pytest.CaptureFixture[str]) -> None:
    assert call("--version") == 0
    assert capfd.readouterr().out.startswith("onnx-lowrank 0.")


def test_inspect_lists_the_linear_maps(two: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert call("inspect", two) == 0
    text = capfd.readouterr().out
    assert "encoder/fc" in text
    assert "head" in text
    assert f"{M}×{N}" in text


def test_providers_lists_the_cpu(capfd: pytest.CaptureFixture[str]) -> None:
    assert call("providers") == 0
    (line,) = [row for row in capfd.readouterr().out.splitlines() if row.startswith("cpu ")]
    assert line.split()[1:3] == ["yes", ort.__version__]


@pytest.mark.parametrize(
    ("args", "code", "needle"),
    [
        (["in.onnx"], 2, "OUT"),
        (["in.onnx", "out.onnx", "more.onnx"], 2, "more.onnx"),
        (["in.onnx", "out.onnx", "--enrgy", "0.9"], 2, "--energy"),
        (["in.onnx", "out.onnx", "--external-data", "maybe"], 2, "'always'"),
        (["in.onnx", "out.onnx", "--energy", "0.9", "--rank", "4"], 2, "--energy and --rank"),
        (["in.onnx", "out.onnx", "--max-error", "1", "--no-check"], 2, "--no-check"),
        (["in.onnx", "out.onnx", "--max-error", "nan"], 2, "--max-error"),
        (["in.onnx", "out.onnx", "--ops", "nosuch"], 2, "matmul"),
        (["in.onnx", "out.onnx", "--ep", "nosuch"], 1, "cpu"),
        (["in.onnx", "out.onnx", "--input-shape", "x=3"], 2, "name:size"),
        (["in.onnx", "out.onnx", "--dim", "N:3"], 2, "name=size"),
        (["inspcet", "in.onnx"], 1, "'inspect'"),
        (["inspect"], 2, "IN"),
        (["providers", "extra"], 2, "extra"),
    ],
)
def test_wrong_usage_is_one_line(
    args: list[str],
    code: int,
    needle: str,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(source.parent)
    assert call(*args) == code
    assert needle in error(capfd)
    assert names(source.parent) == ["in.onnx"]


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("--energy", ["0", "1.5", "-0.1", "nan", "inf", "abc"]),
        ("--keep", ["0", "1.1", "nan", "x"]),
        ("--rank", ["0", "-3", "1.5", "x"]),
        ("--min-gain", ["1", "-1.01", "nan"]),
        ("--rank-multiple", ["0", "2.5"]),
        ("--samples", ["0", "x"]),
        ("--seed", ["-1"]),
        ("--threads", ["0", "-1"]),
    ],
)
def test_values_out_of_range_are_usage_errors(
    option: str, values: list[str], source: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for value in values:
        assert call(source, source.with_name("out.onnx"), option, value) == 2, value
        text = error(capfd)
        assert option in text
        assert value in text
    assert names(source.parent) == ["in.onnx"]


# The main job


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
    assert f"{option} 'encoder/fx'" in text
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


def test_an_existing_out_needs_force(source: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = source.with_name("out.onnx")
    out.write_text("mine")
    assert call(source, out, *QUICK) == 1
    assert "--force" in error(capfd)
    assert out.read_text() == "mine"
    assert call(source, out, "--force", *QUICK) == 0
    onnx.checker.check_model(str(out))


@pytest.mark.parametrize("kind", ["same", "relative", "symlink", "hard link", "report"])
def test_in_is_never_overwritten(
    kind: str, source: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    before = source.read_bytes()
    target: Path | str = source
    if kind == "relative":
        monkeypatch.chdir(source.parent)
        target = "./../" + source.parent.name + "/in.onnx"
    elif kind == "symlink":
        target = source.with_name("link.onnx")
        target.symlink_to(source)
    elif kind == "hard link":
        target = source.with_name("hard.onnx")
        os.link(source, target)
    args = [source, target]
    if kind == "report":
        args = [source, source.with_name("out.onnx"), "--report", source]
    assert call(*args, "--force", *QUICK) == 1
    assert "would overwrite" in error(capfd)
    assert source.read_bytes() == before


@pytest.mark.parametrize("name", ["out.onnx", "out.onnx.data"])
def test_the_report_does_not_overwrite_out(
    name: str, source: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    report = source.with_name(name)
    args = ("--report", report, "--external-data", "always")
    assert call(source, source.with_name("out.onnx"), *args, *QUICK) == 1
    assert str(report) in error(capfd)
    assert names(source.parent) == ["in.onnx"]


@pytest.mark.parametrize("place", ["nosuch/r.json", "in.onnx/r.json", "."])
def test_a_report_that_cannot_be_written_is_said_before_the_work(
    place: str, source: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    args = ("--report", source.parent / place)
    assert call(source, source.with_name("out.onnx"), *args, *QUICK) == 1
    assert "--report" in error(capfd)
    assert names(source.parent) == ["in.onnx"]


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
    assert "try a lower --energy" in text
    onnx.checker.check_model(str(out), full_check=True)
    assert [node.op_type for node in onnx.load(out).graph.node] == ["MatMul"]  # simplified


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


def test_a_tie_in_the_original_is_no_disagreement(tmp_path: Path) -> None:
    """Columns that are equal give equal outputs, of which rounding makes one the largest."""
    source = tmp_path / "in.onnx"
    onnx.save(linear_model(np.tile(weight(0, M, 8), (1, 8))), source)
    report = report_of(source, tmp_path / "out.onnx", "--rank", 8, *QUICK, folder=tmp_path)
    (output,) = report["check"]["providers"][0]["outputs"]
    assert output["top1_agreement"] in (None, 1.0)


# External data


def external(path: Path) -> dict[str, tuple[str, int, int]]:
    """Initializer -> file, offset, length of its external data."""
    found = {}
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            info = onnx.external_data_helper.ExternalDataInfo(tensor)
            found[tensor.name] = (info.location, info.offset or 0, info.length or 0)
    return found


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A layer whose factors are larger than what stays in the model."""
    path = tmp_path / "in.onnx"
    onnx.save(linear_model(weight(0, 512, 512, 4)), path)
    return path


def test_external_data_goes_beside_the_model_without_orphaned_bytes(large: Path) -> None:
    out = large.with_name("out.onnx")
    report = report_of(
        large, out, "--rank", 8, "--external-data", "always", *QUICK, folder=large.parent
    )
    data = large.with_name("out.onnx.data")
    stored = external(out)
    assert len(stored) == 2
    assert {location for location, _, _ in stored.values()} == {"out.onnx.data"}
    end = 0
    for _, offset, length in sorted(stored.values(), key=lambda item: item[1]):
        assert 0 <= offset - end < 64 * 1024  # alignment at most
        end = offset + length
    assert data.stat().st_size == end
    assert report["output"]["bytes"] == out.stat().st_size + data.stat().st_size
    x = uniform([3, 512], np.random.default_rng(0))
    before, after = (ort.InferenceSession(str(p)).run(None, {"x": x})[0] for p in (large, out))
    np.testing.assert_allclose(after, before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mode", ["auto", "never"])
def test_a_small_model_keeps_its_weights(mode: str, large: Path) -> None:
    assert call(large, large.with_name("out.onnx"), "--external-data", mode, *QUICK) == 0
    assert names(large.parent) == ["in.onnx", "out.onnx"]


def test_force_removes_the_data_of_the_old_model(large: Path) -> None:
    out = large.with_name("out.onnx")
    assert call(large, out, "--external-data", "always", *QUICK) == 0
    assert call(large, out, "--external-data", "always", "--force", *QUICK) == 0
    assert names(large.parent) == ["in.onnx", "out.onnx", "out.onnx.data"]
    assert call(large, out, "--external-data", "never", "--force", *QUICK) == 0
    assert names(large.parent) == ["in.onnx", "out.onnx"]
    ort.InferenceSession(str(out))


def test_data_of_another_model_is_not_overwritten(
    large: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = large.with_name("out.onnx.data")
    data.write_bytes(b"another model's")
    args = (large, large.with_name("out.onnx"), "--external-data", "always", "--force", *QUICK)
    assert call(*args) == 1
    assert "belongs to another model" in error(capfd)
    assert data.read_bytes() == b"another model's"


def test_in_with_external_data_stays_as_it_is(
    large: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source, out = large.with_name("out.onnx"), large.with_name("second.onnx")
    assert call(large, source, "--external-data", "always", *QUICK) == 0
    files = (source, source.with_name("out.onnx.data"))
    before = [file.read_bytes() for file in files]
    assert call(source, out, "--rank", 4, "--external-data", "always", *QUICK) == 0
    assert [file.read_bytes() for file in files] == before
    assert external(out)
    # The data file of IN as OUT, and as OUT's data.
    assert call(source, files[1], "--force", *QUICK) == 1
    assert "would overwrite" in error(capfd)
    assert [file.read_bytes() for file in files] == before


# Being stopped


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("delay", [0.3, 1.5])
def test_an_interrupt_leaves_nothing_behind(
    number: signal.Signals, delay: float, tmp_path: Path
) -> None:
    source = tmp_path / "in.onnx"
    wide = uniform([1500, 1500], np.random.default_rng(0))
    onnx.save(linear_model(wide), source)
    process = subprocess.Popen(
        [str(COMMAND), str(source), str(tmp_path / "out.onnx"), "--rank", "600"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what runs in the background with SIGINT ignored, and that is inherited.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    end = time.monotonic() + 60
    while not litter(tmp_path) and time.monotonic() < end and process.poll() is None:
        time.sleep(0.02)
    time.sleep(delay)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip() == "onnx-lowrank: error: interrupted; nothing written"
    assert out == ""
    assert names(tmp_path) == ["in.onnx"]


def test_a_reader_that_goes_away_is_no_error(source: Path) -> None:
    out = source.with_name("out.onnx")
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [str(COMMAND), str(source), str(out), *QUICK],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writing)
    assert done.stderr == ""
    assert done.returncode == 0
    assert out.exists()
