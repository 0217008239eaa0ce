"""What else can be wrong with what the command is given: one line each, and nothing is written."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import onnxruntime as ort
import pytest

from tests.helpers.commands import (
    COMMAND,
    QUICK,
    call,
    names,
    one_line,
)
from tests.helpers.disks import small_disk
from tests.helpers.models import (
    known_rank,
    linear_model,
    parse,
    uniform,
)

PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x00\x10\x00\x00\x00\x10\x08\x06\x00\x00\x00"


def linear(seed: int = 0, m: int = 64, n: int = 48) -> onnx.ModelProto:
    return linear_model(known_rank(m, n, min(m, n, 4), np.random.default_rng(seed)))


# Nothing to do


def test_a_model_without_linear_layer_is_copied(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    text = """<ir_version: 8, opset_import: ["": 17]>
    g (float[N, 4] x) => (float[N, 4] y) { h = Relu(x) y = Neg(h) }"""
    onnx.save(parse(text), source)
    assert call(source, out, "--no-bench") == 0
    shown = capfd.readouterr()
    assert shown.err == ""
    assert "the model has no linear map with a constant weight" in shown.out
    assert f"wrote {out}" in shown.out
    onnx.checker.check_model(str(out), full_check=True)
    x = uniform([3, 4], np.random.default_rng(0))
    (result,) = ort.InferenceSession(str(out)).run(None, {"x": x})
    np.testing.assert_array_equal(result, -np.maximum(x, 0))


@pytest.mark.parametrize("verb", [[], ["inspect"]])
def test_a_model_without_weights_or_nodes(
    verb: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in.onnx"
    text = """<ir_version: 8, opset_import: ["": 17]>
    g (float[N, 4] x) => (float[N, 4] y) { y = Identity(x) }"""
    onnx.save(parse(text), source)
    out = [] if verb else [tmp_path / "out.onnx", *QUICK]
    assert call(*verb, source, *out) == 0
    assert capfd.readouterr().err == ""


# Odd weights


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_stays_dense(
    value: float, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    weight = known_rank(64, 48, 4, np.random.default_rng(0))
    weight[17, 3] = value
    source, out, report = (tmp_path / name for name in ("in.onnx", "out.onnx", "report.json"))
    onnx.save(linear_model(weight), source)
    assert call(source, out, "--report", report, *QUICK) == 0
    assert "holds NaN or Inf" in capfd.readouterr().out
    (layer,) = json.loads(report.read_text())["layers"]
    assert (layer["status"], layer["rank"]) == ("dense", None)
    (kept,) = onnx.load(out).graph.initializer
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(kept), weight)


@pytest.mark.parametrize(
    ("m", "n", "kind"),
    [(64, 48, "zeros"), (1, 48, "ones"), (64, 1, "ones"), (1, 1, "ones"), (2, 2, "zeros")],
)
@pytest.mark.parametrize(
    "options", [(), ("--energy", "1", "--min-gain", "-1"), ("--keep", "0.9", "--uniform")]
)
def test_zeros_and_vectors(
    m: int, n: int, kind: str, options: tuple[str, ...], tmp_path: Path
) -> None:
    weight = np.zeros((m, n), np.float32) if kind == "zeros" else np.ones((m, n), np.float32)
    source, out, report = (tmp_path / name for name in ("in.onnx", "out.onnx", "report.json"))
    onnx.save(linear_model(weight), source)
    assert call(source, out, "--report", report, *options, *QUICK) == 0
    (layer,) = json.loads(report.read_text())["layers"]
    assert layer["shape"] == [m, n]
    assert layer["reason"]
    if layer["rank"] is not None:
        assert layer["weight_error"] < 1e-6
    x = uniform([3, m], np.random.default_rng(0))
    (result,) = ort.InferenceSession(str(out)).run(None, {"x": x})
    np.testing.assert_allclose(result, x @ weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("m", "n"), [(0, 8), (8, 0), (0, 0)])
def test_empty_weights(m: int, n: int, tmp_path: Path) -> None:
    source, out, report = (tmp_path / name for name in ("in.onnx", "out.onnx", "report.json"))
    onnx.save(linear_model(np.zeros((m, n), np.float32)), source)
    args = ("--no-check", "--no-simplify", "--no-bench", "--report", report)
    assert call(source, out, *args) == 0
    (layer,) = json.loads(report.read_text())["layers"]
    assert layer["status"] == "dense"
    assert "empty" in layer["reason"]
    assert call("inspect", source) == 0


def test_an_empty_batch_and_empty_data(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(linear(), source)
    assert call(source, out, "--dim", "N=0", *QUICK) in (0, 1)
    capfd.readouterr()
    np.savez(tmp_path / "data.npz", x=np.zeros((0, 64), np.float32))
    assert call(source, out, "--force", "--data", tmp_path / "data.npz", *QUICK) == 1
    assert "'x'" in one_line(capfd.readouterr().err)


# The data


@pytest.mark.parametrize(
    ("arrays", "needle"),
    [
        ({"z": np.zeros((2, 64), np.float32)}, "'z'"),
        ({"x": np.zeros((2, 64), np.float32), "w": np.zeros(1)}, "'w'"),
        ({"x": np.full((2, 64), "a")}, "float32"),
        ({"x": np.zeros((2, 64), np.complex64)}, "float32"),
        ({"x": np.zeros((2, 63), np.float32)}, "64"),
        ({"x": np.zeros((2, 3, 64), np.float32)}, "rank 2"),
    ],
    ids=["name", "extra", "text", "complex", "shape", "rank"],
)
def test_data_that_do_not_fit(
    arrays: dict[str, np.ndarray], needle: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source, data = tmp_path / "in.onnx", tmp_path / "data.npz"
    onnx.save(linear(), source)
    np.savez(data, allow_pickle=True, **arrays)
    assert call(source, tmp_path / "out.onnx", "--data", data, *QUICK) == 1
    text = one_line(capfd.readouterr().err)
    assert str(data) in text
    assert needle in text
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("name", ["nosuch.npz", "text.npz", "text.npy", "text.csv", "folder"])
def test_data_that_are_none(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source, data = tmp_path / "in.onnx", tmp_path / name
    onnx.save(linear(), source)
    if name == "folder":
        data.mkdir()
    elif name != "nosuch.npz":
        data.write_text("no numbers")
    assert call(source, tmp_path / "out.onnx", "--data", data, *QUICK) == 1
    assert str(data) in one_line(capfd.readouterr().err)


# The output


@pytest.mark.parametrize(
    ("place", "needle"),
    [
        ("nosuch/out.onnx", "does not exist"),
        ("in.onnx/out.onnx", "does not exist"),
        ("folder", "folder"),
    ],
)
def test_a_place_that_cannot_be_written(
    place: str, needle: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in.onnx"
    onnx.save(linear(), source)
    (tmp_path / "folder").mkdir()
    assert call(source, tmp_path / place, "--force", *QUICK) == 1
    assert needle in one_line(capfd.readouterr().err)
    assert names(tmp_path) == ["folder", "in.onnx"]


@pytest.mark.skipif(
    os.geteuid() == 0 and not Path("/proc/self").exists(), reason="root can write everywhere"
)
def test_a_folder_that_is_read_only(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in.onnx"
    onnx.save(linear(), source)
    folder = tmp_path / "read-only"
    folder.mkdir(mode=0o555)
    if os.geteuid() == 0:  # to root only the kernel's own file systems are closed
        folder = Path("/proc/self")
    assert call(source, folder / "out.onnx", *QUICK) == 1
    assert "cannot be written" in one_line(capfd.readouterr().err)


def limited(size: int) -> Callable[[], None]:
    """For a child process: no file larger than this; a write beyond it fails as on a full disk."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


@pytest.mark.parametrize("external", ["always", "never"])
@pytest.mark.parametrize("options", [("--rank", "128"), ("--energy", "1", "--min-gain", "0.9")])
@pytest.mark.parametrize("old", [False, True], ids=["new", "over an old file"])
def test_a_disk_that_fills_up(
    external: str, options: tuple[str, ...], old: bool, tmp_path: Path
) -> None:
    """The factors are stored, or the dense weight is copied; either is larger than the limit."""
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(linear_model(uniform([1200, 1200], np.random.default_rng(0))), source)
    if old:
        out.write_bytes(b"old")
    done = subprocess.run(
        [
            *(str(COMMAND), str(source), str(out), *options, *QUICK, "--no-check", "--force"),
            *("--external-data", external),
        ],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limited(1_000_000),
    )
    assert done.returncode == 1
    assert "nothing written" in one_line(done.stderr)
    assert names(tmp_path) == ["in.onnx", "out.onnx"][: 1 + old]
    assert not old or out.read_bytes() == b"old"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    with small_disk(tmp_path / "disk", "4m") as folder:
        yield folder


@pytest.mark.parametrize("external", ["always", "never"])
def test_a_disk_that_is_full(external: str, disk: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.onnx"
    onnx.save(linear_model(uniform([1200, 1200], np.random.default_rng(0))), source)
    done = subprocess.run(
        [
            *(str(COMMAND), str(source), str(disk / "out.onnx"), "--rank", "500"),
            *("--external-data", external, "--no-check", *QUICK),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "No space left" in one_line(done.stderr)
    assert not names(disk)


def test_a_report_on_a_full_disk(tmp_path: Path) -> None:
    source = tmp_path / "in.onnx"
    onnx.save(linear(), source)
    report = tmp_path / "report.json"
    done = subprocess.run(
        [
            *(str(COMMAND), str(source), str(tmp_path / "out.onnx"), *QUICK, "--no-check"),
            *("--report", str(report), "--dry-run"),
        ],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limited(100),
    )
    assert done.returncode == 1
    assert str(report) in one_line(done.stderr)
    assert names(tmp_path) == ["in.onnx"]


# Models that ONNX Runtime does not run


def custom(folder: Path) -> Path:
    model = parse(
        """<ir_version: 8, opset_import: ["": 17, "my.domain": 1]>
        g (float[N, 64] x) => (float[N, 48] y) {
            h = my.domain.Odd(x)
            y = MatMul(h, W)
        }""",
        {"W": known_rank(64, 48, 4, np.random.default_rng(0))},
    )
    path = folder / "in.onnx"
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("options", [(), ("--no-check", "--no-bench")])
def test_an_unknown_operator_is_kept(
    options: tuple[str, ...], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.onnx"
    assert call(custom(tmp_path), out, "--no-simplify", "--rank", 4, *options) == 0
    shown = capfd.readouterr()
    assert shown.err == ""
    assert shown.out.count("my.domain") == 1  # said, and said once
    assert [node.op_type for node in onnx.load(out).graph.node] == ["Odd", "MatMul", "MatMul"]


def test_the_gate_is_not_passed_unseen(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.onnx"
    assert call(custom(tmp_path), out, "--no-simplify", "--max-error", 1) == 1
    assert "--max-error cannot be judged" in one_line(capfd.readouterr().err)
    assert not out.exists()
