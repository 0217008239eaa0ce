"""Where the command writes: over what, through what, and what is left when it is stopped."""

from __future__ import annotations

import functools
import json
import os
import stat
import subprocess
import threading
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import onnx_lowrank
from onnx_lowrank.errors import InputError
from onnx_lowrank.files import Output, atomic, check_outputs, pending, write_text
from tests.helpers.commands import COMMAND, QUICK, M, call, error, litter, names, one_line, weight
from tests.helpers.models import factored, linear_model


@pytest.fixture
def data(source: Path) -> Path:
    path = source.with_name("data.npz")
    np.savez(path, x=np.random.default_rng(0).normal(size=(12, M)).astype(np.float32))
    return path


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A layer whose factors are larger than what stays in the model."""
    path = tmp_path / "in.onnx"
    onnx.save(linear_model(weight(0, 512, 512, 4)), path)
    return path


# What is read stays


@pytest.mark.parametrize("victim", ["in.onnx", "data.npz"])
def test_a_sweep_overwrites_nothing_that_it_reads(
    victim: str, source: Path, data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = source.read_bytes(), data.read_bytes()
    args = ("--data", data, "--save-stats", source.with_name(victim), "--no-bench", "--no-simplify")
    assert call("sweep", source, "--out", source.with_name("curve"), *args) == 1
    assert "would overwrite the input" in error(capfd)
    assert (source.read_bytes(), data.read_bytes()) == before


def test_every_verb_checks_its_report(
    source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Against models, external data, samples in a folder, labels, what is loaded, and code."""
    model, samples = tmp_path / "apart.onnx", tmp_path / "samples"
    onnx.save(
        onnx.load(source), model, save_as_external_data=True, location="w.json", size_threshold=0
    )
    samples.mkdir()
    np.savez(samples / "a.npz", x=np.zeros((1, M), np.float32))
    (samples / "b.json").symlink_to("a.npz")
    for name in ("labels", "stats", "costs"):
        (tmp_path / f"{name}.json").write_text("mine")
    (tmp_path / "code.py").write_text("def score(*_): return 1\n")
    (tmp_path / "code.json").symlink_to("code.py")
    job = (model, tmp_path / "out.onnx", "--no-simplify", "--no-bench")
    for args, victim in (
        (("check", model, source), "w.json"),
        (("bench", model, source), "w.json"),
        (("support", model), "w.json"),
        (job, "w.json"),
        ((*job, "--data", samples), "samples/b.json"),
        (("check", model, source, "--data", samples), "samples/b.json"),
        ((*job, "--labels", tmp_path / "labels.json"), "labels.json"),
        ((*job, "--load-stats", tmp_path / "stats.json"), "stats.json"),
        ((*job, "--load-costs", tmp_path / "costs.json"), "costs.json"),
        ((*job, "--calibrate", f"{tmp_path}/code.py:score"), "code.json"),
        ((*job, "--metric", f"{tmp_path}/code.py:score", "--tolerance", 0.1), "code.json"),
    ):
        before = (tmp_path / victim).read_bytes()
        assert call(*args, "--report", tmp_path / victim) == 1, (args, victim)
        assert "--report" in (said := error(capfd))
        assert "would overwrite the input" in said
        assert (tmp_path / victim).read_bytes() == before
    assert not (tmp_path / "out.onnx").exists()


def test_statistics_and_costs_are_replaced(source: Path, data: Path) -> None:
    stats, costs = source.with_name("stats.npz"), source.with_name("costs.json")
    for file in (stats, costs):
        file.write_text("old")
    args = ("--data", data, "--save-stats", stats, "--save-costs", costs, "--speedup", 0.001)
    quick = ("--no-simplify", "--samples", 2, "--threads", 1)
    assert call(source, source.with_name("out.onnx"), *args, *quick) == 0
    assert "header" in np.load(stats)
    assert json.loads(costs.read_text())["version"]


def test_two_outputs_are_two_files(tmp_path: Path) -> None:
    one = Output(tmp_path / "a.json", "report")
    (tmp_path / "link.json").symlink_to("a.json")
    (tmp_path / "a.json").touch()
    for name in ("a.json", "link.json", "../" + tmp_path.name + "/a.json"):
        with pytest.raises(InputError, match=r"save_costs=.* would overwrite report="):
            check_outputs([one, Output(tmp_path / name, "save_costs")], [])
    check_outputs([Output(Path(os.devnull)), Output(Path(os.devnull), "report")], [])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("missing/a", "does not exist"),
        ("file/a", "does not exist"),
        ("folder", "a folder"),
        ("dangling", "got a link to nowhere, which does not exist"),
        ("loop", "Too many levels of symbolic links"),
        ("n" * 300, "File name too long"),
        ("a\0b", "with a NUL"),
    ],
)
def test_places_that_are_refused(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    before = names(tmp_path)
    with pytest.raises(InputError, match=text) as caught:
        check_outputs([Output(tmp_path / name, "--report")], [])
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=text):
        factored(linear_model(weight()), rank=4).save(tmp_path / name, force=True)
    assert names(tmp_path) == before


@pytest.mark.parametrize("name", ["n" * 300 + ".onnx", "a\0b"])
def test_names_that_no_file_system_takes(name: str, source: Path) -> None:
    """Of what is read: there is no such file."""
    with pytest.raises(InputError, match="no such file"):
        onnx_lowrank.compress(name)
    for option in ("data", "load_stats", "calibration"):
        with pytest.raises(InputError, match="no such file"):
            factored(source, rank=4, **{option: name})


def test_the_longest_name(large: Path) -> None:
    out = large.with_name("n" * 250 + ".onnx")
    for _ in range(3):
        assert call(large, out, "--external-data", "always", "--force", *QUICK) == 0
        ort.InferenceSession(str(out))
        assert len(names(large.parent)) == 3


# Atomic


def test_an_atomic_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    half = atomic(path)
    half.__enter__().write(b"half")
    assert pending()
    assert not half.__exit__(RuntimeError, RuntimeError(), None)
    assert names(tmp_path) == []
    assert not pending()
    mask = os.umask(0o027)
    try:
        write_text(Output(path), "whole \udcff")
    finally:
        os.umask(mask)
    assert path.read_text() == "whole \\udcff"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("link", ["symbolic", "into another folder"])
def test_a_link_is_followed(link: str, source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "real"
    folder.mkdir()
    home = tmp_path if link == "symbolic" else folder
    for name in ("model", "report.json"):
        (home / f"real-{name}").write_text("old")
        (tmp_path / name).symlink_to(home / f"real-{name}")
    args = ("--report", tmp_path / "report.json", "--force", *QUICK)
    assert call(source, tmp_path / "model", *args) == 0
    for name in ("model", "report.json"):
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / name).resolve() == (home / f"real-{name}").resolve()
    onnx.checker.check_model(str(home / "real-model"))
    assert json.loads((home / "real-report.json").read_text())["version"]
    assert not litter(tmp_path)


def test_weights_beside_a_link(large: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """They are found from both names, or refused."""
    folder = large.with_name("real")
    folder.mkdir()
    for place in (large.with_name("other.onnx"), folder / "other.onnx"):
        place.write_text("old")
        link = large.with_name(f"link-{place.parent.name}.onnx")
        link.symlink_to(place)
        code = call(large, link, "--external-data", "always", "--force", *QUICK)
        if place.parent == folder:
            assert code == 2
            assert "got a link to another folder" in error(capfd)
            assert place.read_text() == "old"
        else:
            assert code == 0
            assert (place.parent / "other.onnx.data").exists()
            for name in (link, place):
                ort.InferenceSession(str(name))


@pytest.mark.parametrize("option", ["OUT", "--report", "--save-stats"])
def test_devices_and_pipes_are_written_through(option: str, source: Path, data: Path) -> None:
    pipe, out = source.with_name("pipe"), source.with_name("out.onnx")
    os.mkfifo(pipe)
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()), daemon=True)
    reader.start()
    job = ("--data", data, "--rank", 4, *QUICK)
    for place in (pipe, Path(os.devnull)):
        if option == "OUT":
            assert call(source, place, *job) == 0
        else:
            assert call(source, out, *job, option, place, "--force") == 0
    reader.join(30)
    if option == "OUT":
        onnx.checker.check_model(onnx.load_from_string(got[0]))
    elif option == "--report":
        assert json.loads(got[0])["version"]
    else:
        assert got[0].startswith(b"PK")
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert stat.S_ISCHR(Path(os.devnull).stat().st_mode)
    assert not litter(source.parent)


@pytest.mark.parametrize("redirected", ["pipe", "file"])
def test_the_model_on_standard_output(redirected: str, source: Path, tmp_path: Path) -> None:
    """The tables go to standard error then."""
    path = tmp_path / "redirected.onnx"
    with path.open("wb") as file:
        done = subprocess.run(
            [str(COMMAND), str(source), "/dev/stdout", "--rank", "4", *QUICK],
            stdout=subprocess.PIPE if redirected == "pipe" else file,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert b"totals" in done.stderr
    model = done.stdout if redirected == "pipe" else path.read_bytes()
    onnx.checker.check_model(onnx.load_from_string(model))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_device(source: Path) -> None:
    run = functools.partial(subprocess.run, stderr=subprocess.PIPE, text=True, check=False)
    job = [str(COMMAND), str(source)]
    done = run([*job, "/dev/full", *QUICK], stdout=subprocess.DEVNULL)
    assert done.returncode == 1
    assert "/dev/full: No space left on device; nothing written" in one_line(done.stderr)
    out = source.with_name("out.onnx")
    with Path("/dev/full").open("wb") as full:
        done = run([*job, str(out), *QUICK], stdout=full)
        assert (done.returncode, out.exists()) == (0, True)
        assert done.stderr == (
            "onnx-lowrank: warning: standard output: No space left on device; "
            "the files are written\n"
        )
        done = run([str(COMMAND), "inspect", str(source)], stdout=full)
    assert done.returncode == 1
    assert "standard output: No space left on device" in one_line(done.stderr)


@pytest.mark.parametrize("verb", ["compress", "check", "bench", "support"])
@pytest.mark.parametrize("name", ["page.htm", "report", "r.json.txt"])
def test_a_report_of_an_unknown_kind(
    verb: str, name: str, source: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    args = {
        "compress": (source, source.with_name("out.onnx")),
        "check": ("check", source, source),
        "bench": ("bench", source),
        "support": ("support", source),
    }[verb]
    assert call(*args, "--report", source.with_name(name)) == 2
    assert "expected a name with .json" in error(capfd)
    assert names(source.parent) == ["in.onnx"]
