"""An Android device behind a program that plays adb."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from urllib.parse import quote

import onnx
import pytest

from onnx_lowrank.errors import InputError, UsageError
from onnx_lowrank.targets import open_target, runner
from onnx_lowrank.targets.base import Job
from tests.helpers.places import HELPERS
from tests.helpers.remote import (
    assert_outputs,
    feeds_for,
    silent,
    two_models,
)

pytestmark = pytest.mark.adb


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files on the device; nothing is in it afterwards."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, script in (("adb", "fake_adb.py"), ("perf_test", "fake_perf_test.py")):
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} {HELPERS / script} "$@"\n')
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    folder = tmp_path / "device"
    folder.mkdir()
    return folder


def named(device: Path, *options: str, serial: str = "") -> str:
    perf_test = device.parent / "bin" / "perf_test"
    return f"adb{serial}?{'&'.join((f'tmp={device}', f'perf_test={perf_test}', *options))}"


def test_times_memory_and_nodes(device: Path, tmp_path: Path) -> None:
    model = two_models(tmp_path)[0]
    apart, broken = tmp_path / "apart.onnx", tmp_path / "broken.onnx"
    onnx.save(onnx.load(model), apart, save_as_external_data=True, location="w", size_threshold=0)
    broken.write_bytes(b"not a model")
    done: list[int] = []
    target = open_target(named(device, serial=":board-1"))
    *outcomes, bad = target.run(
        [model, apart, broken], feeds_for(), Job(iterations=7, warmup=2, threads=1), done.append
    )
    assert sum(done) == 7
    for outcome in outcomes:
        assert outcome.error is None
        assert len(outcome.times_ns) == 7
        assert all(time > 0 for time in outcome.times_ns)
        assert outcome.load_ns
        assert outcome.first_ns is not None
        assert outcome.peak_bytes is not None
        assert outcome.peak_bytes > 2**20
        assert outcome.nodes is not None
        assert "fc" in outcome.nodes["CPUExecutionProvider"][0]
        assert outcome.outputs == ()
        assert "gives no outputs" in outcome.notes[-1]
    assert "Protobuf parsing failed" in str(bad.error)
    assert bad.times_ns == ()
    assert not any(device.iterdir())


@pytest.mark.parametrize("folder", ["My Files", "it's", "a;touch x", "$(touch x)", "-rf", "*"])
def test_every_word_is_quoted_there(
    folder: str, device: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the temporary folder and of the program; what else is there stays."""
    monkeypatch.chdir(device)
    place = device / folder
    place.mkdir()
    (place / "mine").write_text("kept")
    (device / "My").write_text("kept")
    program = place / "perf_test"
    program.symlink_to(tmp_path / "bin" / "perf_test")
    name = f"adb?tmp={quote(str(place))}&perf_test={quote(str(program))}"
    model = two_models(tmp_path)[:1]
    (outcome,) = open_target(name).run(model, feeds_for(), Job(iterations=2), silent)
    assert outcome.error is None
    assert len(outcome.times_ns) == 2
    assert outcome.nodes
    command = f"{sys.executable} {runner.__file__} run"
    name = f"adb?tmp={quote(str(place))}&runner={quote(command)}"
    assert_outputs(open_target(name).run(model, feeds_for(), Job(), silent), model, feeds_for())
    assert sorted(item.name for item in device.iterdir()) == sorted(["My", folder])
    assert sorted(item.name for item in place.iterdir()) == ["mine", "perf_test"]


def test_outputs_alone_are_not_to_be_had(device: Path, tmp_path: Path) -> None:
    outcomes = open_target(named(device)).run(two_models(tmp_path), feeds_for(), Job(), silent)
    for outcome in outcomes:
        assert "gives no outputs" in str(outcome.error)
        assert outcome.nodes


def test_a_runner_gives_outputs(device: Path, tmp_path: Path) -> None:
    """Our own runner is one; it is started as an app's would be."""
    models, feeds = two_models(tmp_path), feeds_for()
    option = f"runner={sys.executable} {runner.__file__} run"
    outcomes = open_target(named(device, option)).run(models, feeds, Job(iterations=2), silent)
    assert_outputs(outcomes, models, feeds)
    assert [len(outcome.times_ns) for outcome in outcomes] == [2, 2]
    assert not any(device.iterdir())


def test_a_device_that_hands_no_status_over(
    device: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_ADB_OLD", "1")
    models = two_models(tmp_path)
    with pytest.raises(InputError, match="no program /nowhere there; build onnxruntime_perf_test"):
        open_target(f"adb?tmp={device}&perf_test=/nowhere").run(models, feeds_for(), Job(), silent)
    (outcome,) = open_target(named(device, "ep=nnapi")).run(
        models[:1], feeds_for(), Job(iterations=1), silent
    )
    assert outcome.error == "status 1: nnapi is not supported in this build"
    with pytest.raises(InputError, match="false ended with status 1"):
        open_target(named(device, "runner=false")).run(models, feeds_for(), Job(), silent)
    assert not any(device.iterdir())


def test_no_device(device: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = two_models(tmp_path)
    with pytest.raises(InputError, match="no device: device 'other' not found"):
        open_target(named(device, serial=":other")).run(models, feeds_for(), Job(), silent)
    target = open_target(named(device).replace(f"tmp={device}", f"tmp={device}/nowhere"))
    with pytest.raises(InputError, match="No such file or directory"):
        target.run(models, feeds_for(), Job(), silent)
    monkeypatch.setenv("FAKE_ADB_GONE", str(device))
    with pytest.raises(InputError, match="no device: no devices/emulators found"):
        open_target(named(device)).run(models, feeds_for(), Job(), silent)


def test_unplugged_mid_run(device: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    monkeypatch.setenv("FAKE_ADB_GONE", str(gone))
    with pytest.raises(InputError, match=r"no devices/emulators found; .* is left there"):
        open_target(named(device)).run(
            two_models(tmp_path), feeds_for(), Job(iterations=9), lambda _: gone.touch()
        )


def test_time_out_and_interruption(
    device: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = two_models(tmp_path)

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_target(named(device)).run(models, feeds_for(), Job(iterations=9), interrupt)
    assert not any(device.iterdir())
    monkeypatch.setenv("FAKE_PERF_TEST_SLEEPS", "1")
    with pytest.raises(InputError, match="not done within 5 s"):
        open_target(named(device)).run(models, feeds_for(), Job(iterations=9, seconds=5), silent)
    assert not any(device.iterdir())


def test_names_that_are_refused(
    device: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="expected an option of perf_test"):
        open_target("adb?colour=red")
    assert open_target("adb:10.0.0.5:5555").words == [  # type: ignore[attr-defined]
        "adb",
        "-s",
        "10.0.0.5:5555",
    ]
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="no adb on the PATH"):
        open_target("adb")
