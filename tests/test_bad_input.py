"""What can be wrong with what the command is given: one line each, and nothing is written."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import onnxruntime as ort
import pytest

from onnx_lowrank.cli import _exit_code
from tests.models import known_rank, linear_model, parse, uniform

COMMAND = Path(sysconfig.get_path("scripts")) / "onnx-lowrank"
QUICK = ("--no-simplify", "--no-bench", "--samples", "2")
PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x00\x10\x00\x00\x00\x10\x08\x06\x00\x00\x00"


def call(*args: object) -> int:
    return _exit_code([str(arg) for arg in args])


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


def one_line(text: str) -> str:
    assert text.startswith("onnx-lowrank: error: ")
    assert text.count("\n") == 1
    assert text.endswith("\n")
    assert "internal error" not in text
    return text


def linear(seed: int = 0, m: int = 64, n: int = 48) -> onnx.ModelProto:
    return linear_model(known_rank(m, n, min(m, n, 4), np.random.default_rng(seed)))


def refused(model: onnx.ModelProto | bytes, folder: Path, capfd: pytest.CaptureFixture[str]) -> str:
    """The error that a model gives; nothing else may happen."""
    path = folder / "in.onnx"
    data = model if isinstance(model, bytes) else model.SerializeToString()
    path.write_bytes(data)
    before = names(folder)
    assert call(path, folder / "out.onnx", *QUICK) == 1
    assert names(folder) == before
    assert path.read_bytes() == data
    text = one_line(capfd.readouterr().err)
    assert str(path) in text
    return text


# The model


def test_a_missing_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for verb in ([], ["inspect"]):
        args = [*verb, tmp_path / "nosuch.onnx", *([] if verb else [tmp_path / "out.onnx"])]
        assert call(*args) == 1
        assert "nosuch.onnx: no such file" in one_line(capfd.readouterr().err)
    assert not names(tmp_path)


def test_a_folder_as_model(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert call(tmp_path, tmp_path / "out.onnx") == 1
    assert "folder" in one_line(capfd.readouterr().err)


@pytest.mark.parametrize(
    "content",
    [b"", b"hello, this is text\n", PNG, b'{"json": 1}', b"\x00" * 100, b"\n", b"\x08\x08"],
    ids=["empty", "text", "png", "json", "zeros", "newline", "version only"],
)
def test_a_file_that_is_not_onnx(
    content: bytes, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert "expected an ONNX model" in refused(content, tmp_path, capfd)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98, 0.999])
def test_a_truncated_file(share: float, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = linear().SerializeToString()
    refused(data[: int(share * len(data))], tmp_path, capfd)


def test_a_file_cut_at_any_byte_is_never_an_internal_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = linear(m=2, n=3).SerializeToString()
    path = tmp_path / "in.onnx"
    for size in range(len(data)):
        path.write_bytes(data[:size])
        code = call(path, tmp_path / "out.onnx", "--dry-run", "--no-simplify")
        text = capfd.readouterr().err
        assert (code, bool(text)) in ((0, False), (1, True)), (size, text)
        if text:
            one_line(text)


def test_weights_shorter_than_their_shape(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = linear()
    model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[:-4]
    assert "expected 12288 bytes" in refused(model, tmp_path, capfd)


def test_typed_weights_shorter_than_their_shape(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = linear()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.float_data.extend([1.0] * 10)
    assert "expected 3072 numbers" in refused(model, tmp_path, capfd)


def with_external_data(folder: Path) -> Path:
    path = folder / "in.onnx"
    onnx.save(linear(), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    return path


@pytest.mark.parametrize(
    ("change", "needle"),
    [
        (lambda data: data.unlink(), "w.bin is missing"),
        (lambda data: os.truncate(data, 1000), "it has 1000"),
        (lambda data: os.truncate(data, 0), "it has 0"),
        (lambda data: (data.unlink(), data.mkdir()), "w.bin"),
    ],
    ids=["missing", "short", "empty", "folder"],
)
def test_external_data_missing_or_too_short(
    change: Callable[[Path], object],
    needle: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = with_external_data(tmp_path)
    change(tmp_path / "w.bin")
    text = refused(path.read_bytes(), tmp_path, capfd)
    assert needle in text
    assert "'W'" in text


@pytest.mark.parametrize("location", ["../w.bin", "/etc/hostname", "a/../../w.bin", ".."])
def test_external_data_outside_the_folder(
    location: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    path = with_external_data(folder)
    (folder / "w.bin").rename(tmp_path / "w.bin")
    model = onnx.load(path, load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = location
    assert "in the model's folder" in refused(model, folder, capfd)


@pytest.mark.parametrize("key", ["offset", "length"])
@pytest.mark.parametrize("value", ["-1", "abc", "99999999999999999999"])
def test_nonsense_about_external_data(
    key: str, value: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = onnx.load(with_external_data(tmp_path), load_external_data=False)
    entries = model.graph.initializer[0].external_data
    for entry in [entry for entry in entries if entry.key == key]:
        entries.remove(entry)
    entry = entries.add()
    entry.key, entry.value = key, value
    refused(model, tmp_path, capfd)


def test_sparse_initializers(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = linear()
    model.graph.sparse_initializer.append(
        onnx.helper.make_sparse_tensor(
            onnx.helper.make_tensor("s", onnx.TensorProto.FLOAT, [1], [1.0]),
            onnx.helper.make_tensor("i", onnx.TensorProto.INT64, [1], [2]),
            [64],
        )
    )
    assert "sparse" in refused(model, tmp_path, capfd)


def test_training_info(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = linear()
    model.training_info.add().algorithm.name = "train"
    assert "training_info" in refused(model, tmp_path, capfd)


def test_outputs_that_are_maps(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What skl2onnx writes for a classifier unless it is told not to."""
    model = linear()
    model.graph.node.append(
        onnx.helper.make_node(
            "ZipMap", ["y"], ["z"], domain="ai.onnx.ml", classlabels_int64s=list(range(48))
        )
    )
    model.opset_import.append(onnx.helper.make_opsetid("ai.onnx.ml", 1))
    kind = onnx.helper.make_map_type_proto(
        onnx.TensorProto.INT64, onnx.helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, [])
    )
    model.graph.output.append(
        onnx.helper.make_value_info("z", onnx.helper.make_sequence_type_proto(kind))
    )
    assert "malformed model" in refused(model, tmp_path, capfd)


def dangling_input(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = "nosuch"


def dangling_output(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = "nosuch"


def cycle(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = "y"


def output_twice(model: onnx.ModelProto) -> None:
    model.graph.node.append(model.graph.node[0])


def no_type(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].data_type = 0


def unknown_type(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].data_type = 99


def negative_size(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[0] = -64


@pytest.mark.parametrize(
    ("damage", "needle"),
    [
        (dangling_input, "node 'fc' reads 'nosuch', which nothing gives"),
        (dangling_output, "graph 'linear' reads 'nosuch', which nothing gives"),
        (cycle, "cycle"),
        (output_twice, "redeclared"),
        (no_type, "'W': expected an element type"),
        (unknown_type, "99"),
        (negative_size, "[-64, 48]"),
    ],
)
def test_a_malformed_graph(
    damage: Callable[[onnx.ModelProto], None],
    needle: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    model = linear()
    damage(model)
    assert needle in refused(model, tmp_path, capfd)


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
    np.savez(data, **arrays)  # type: ignore[arg-type]
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
def small_disk(tmp_path: Path) -> object:
    """A file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if done.returncode:
        pytest.skip(f"may not mount: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("external", ["always", "never"])
def test_a_disk_that_is_full(external: str, small_disk: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.onnx"
    onnx.save(linear_model(uniform([1200, 1200], np.random.default_rng(0))), source)
    done = subprocess.run(
        [
            *(str(COMMAND), str(source), str(small_disk / "out.onnx"), "--rank", "500"),
            *("--external-data", external, "--no-check", *QUICK),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "No space left" in one_line(done.stderr)
    assert not names(small_disk)


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
