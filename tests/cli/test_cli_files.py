"""The command and its files: what is overwritten, external data, and being stopped."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import onnx
import onnx.external_data_helper
import onnx.numpy_helper
import onnxruntime as ort
import pytest

from tests.helpers.commands import (
    COMMAND,
    QUICK,
    M,
    call,
    error,
    litter,
    names,
    report_of,
    weight,
)
from tests.helpers.models import linear_model, uniform


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
        target = source.with_name("report.json")
        os.link(source, target)
        args = [source, source.with_name("out.onnx"), "--report", target]
    assert call(*args, "--force", *QUICK) == 1
    assert "would overwrite" in error(capfd)
    assert source.read_bytes() == before


@pytest.mark.parametrize(
    ("out", "option", "name"),
    [
        ("out.json", "--report", "out.json"),
        ("out.onnx", "--save-stats", "out.onnx"),
        ("out.onnx", "--save-stats", "out.onnx.data"),
        ("out.onnx", "--save-costs", "out.onnx"),
    ],
)
def test_nothing_that_is_written_overwrites_out(
    out: str, option: str, name: str, source: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = source.with_name("data.npz")
    np.savez(data, x=np.zeros((8, M), np.float32))
    args = ("--data", data, option, source.with_name(name), "--external-data", "always")
    assert call(source, source.with_name(out), *args, *QUICK) == 1
    assert f"{option} {source.with_name(name)}: would overwrite" in error(capfd)
    assert names(source.parent) == ["data.npz", "in.onnx"]


@pytest.mark.parametrize("place", ["nosuch/r.json", "in.onnx/r.json", "."])
def test_a_report_that_cannot_be_written_is_said_before_the_work(
    place: str, source: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    args = ("--report", source.parent / place)
    assert call(source, source.with_name("out.onnx"), *args, *QUICK) == 1
    assert "--report" in error(capfd)
    assert names(source.parent) == ["in.onnx"]


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
    always = (large, out, "--external-data", "always", "--force", *QUICK)
    assert call(*always) == 0
    assert names(large.parent) == ["in.onnx", "out.onnx", "out.onnx.data"]
    assert call(*always) == 0  # the old data stay whole until the new model is in its place
    assert names(large.parent) == ["in.onnx", "out.onnx", "out.onnx.1.data"]
    ort.InferenceSession(str(out))
    assert call(*always) == 0
    assert names(large.parent) == ["in.onnx", "out.onnx", "out.onnx.data"]
    assert call(large, out, "--external-data", "never", "--force", *QUICK) == 0
    assert names(large.parent) == ["in.onnx", "out.onnx"]
    ort.InferenceSession(str(out))


def test_data_of_another_model_stay(large: Path) -> None:
    data = large.with_name("out.onnx.data")
    data.write_bytes(b"another model's")
    out = large.with_name("out.onnx")
    assert call(large, out, "--external-data", "always", *QUICK) == 0
    assert {location for location, _, _ in external(out).values()} == {"out.onnx.1.data"}
    assert call(large, out, "--external-data", "never", "--force", *QUICK) == 0
    assert names(large.parent) == ["in.onnx", "out.onnx", "out.onnx.data"]
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
    out = tmp_path / "out.onnx"
    # So many samples take any machine longer than the delay.
    process = subprocess.Popen(
        [str(COMMAND), str(source), str(out), "--rank", "600", "--samples", "5000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what runs in the background with SIGINT ignored, and that is inherited.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    end = time.monotonic() + 300
    while not litter(tmp_path) and time.monotonic() < end and process.poll() is None:
        time.sleep(0.02)
    time.sleep(delay)
    process.send_signal(number)
    shown, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert err.strip() == "onnx-lowrank: error: interrupted; nothing written"
    assert shown == ""
    assert names(tmp_path) == ["in.onnx"]


def test_a_home_that_takes_no_files(source: Path) -> None:
    """Libraries that keep something in the home folder do not speak on standard error."""
    home = source.with_name("home")
    home.touch()  # a file, which is closed to root too
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("XDG_", "ORT_"))}
    done = subprocess.run(
        [str(COMMAND), str(source), str(source.with_name("out.onnx")), *QUICK],
        capture_output=True,
        text=True,
        check=False,
        env={**environment, "HOME": str(home)},
    )
    assert done.stderr == ""
    assert done.returncode == 0


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
