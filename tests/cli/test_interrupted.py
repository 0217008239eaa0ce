"""What is left when the command is stopped, and streams and disks that take no more."""

from __future__ import annotations

import functools
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest

import onnx_lowrank
from onnx_lowrank.errors import UsageError
from tests.helpers.commands import COMMAND, QUICK, call, litter, names, one_line, weight
from tests.helpers.models import factored, linear_model


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A layer whose factors are larger than what stays in the model."""
    path = tmp_path / "in.onnx"
    onnx.save(linear_model(weight(0, 512, 512, 4)), path)
    return path


# One rename decides


@pytest.mark.parametrize("end", ["raise", "exit"])
@pytest.mark.parametrize("old", [False, True], ids=["new", "over an old model"])
def test_a_kill_between_weights_and_model(end: str, old: bool, large: Path) -> None:
    """What stands there afterwards is whole: nothing, or the old model on its own weights."""
    out, source = large.with_name("out.onnx"), large
    if old:
        assert call(source, out, "--rank", 4, "--external-data", "always", *QUICK) == 0
    before = {name: (large.parent / name).read_bytes() for name in names(large.parent)}
    script = f"""
import os, sys
from onnx_lowrank.cli.program import exit_code
real, moved = os.replace, []
def replace(one, other):
    moved.append(other)
    if len(moved) == 2:
        {"raise OSError(5, 'Input/output error')" if end == "raise" else "os._exit(9)"}
    real(one, other)
os.replace = replace
sys.exit(exit_code({[str(a) for a in (source, out, "--rank", 8, "--force", *QUICK)]!r}
    + ["--external-data", "always"]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == (1 if end == "raise" else 9), done.stderr
    if end == "raise":
        assert "Input/output error; nothing written" in one_line(done.stderr)
        assert names(large.parent) == sorted(before)
    for name, content in before.items():
        assert (large.parent / name).read_bytes() == content
    if old:
        ort.InferenceSession(str(out))
    assert call(source, out, "--external-data", "always", "--force", *QUICK) == 0
    ort.InferenceSession(str(out))


def test_data_that_is_read_is_not_removed(large: Path) -> None:
    """IN shares the data file of the old OUT, which the new OUT does not need."""
    out, other = large.with_name("out.onnx"), large.with_name("copy.onnx")
    assert call(large, out, "--external-data", "always", *QUICK) == 0
    other.write_bytes(out.read_bytes())
    assert call(other, out, "--external-data", "never", "--force", *QUICK) == 0
    ort.InferenceSession(str(other))


# Disks, streams and signals


def limited(size: int) -> Callable[[], None]:
    """For a child process: no file larger than this; a write beyond it fails as on a full disk."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


@pytest.mark.parametrize("verb", ["check", "bench", "sweep"])
def test_a_full_disk_of_temporary_files(verb: str, tmp_path: Path) -> None:
    """A copy of the model goes there: its weights stand behind a hard link."""
    model, temporary = tmp_path / "in.onnx", tmp_path / "temporary"
    proto = linear_model(weight(0, 256, 256, 4))
    onnx.save(proto, model, save_as_external_data=True, location="w", size_threshold=0)
    os.link(tmp_path / "w", tmp_path / "w2")
    temporary.mkdir()
    args = {
        "check": ["check", str(model), str(model)],
        "bench": ["bench", str(model), "--iterations", "1"],
        "sweep": ["sweep", str(model), "--no-bench", "--out", str(tmp_path / "curve")],
    }[verb]
    done = subprocess.run(
        [str(COMMAND), *args],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TMPDIR": str(temporary)},
        preexec_fn=limited(100_000),
    )
    assert done.returncode == 1
    assert f"{temporary}: " in one_line(done.stderr)
    assert not litter(temporary)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_streams_that_cannot_encode(encoding: str, two: Path) -> None:
    model = onnx.load(two)
    model.graph.node[0].name = "層/ö"
    onnx.save(model, two)
    out = two.with_name("out.onnx")
    for args in ([str(two), str(out), *QUICK], ["inspect", str(two)]):
        done = subprocess.run(
            [str(COMMAND), *args],
            capture_output=True,
            check=False,
            env={**os.environ, "PYTHONIOENCODING": encoding},
        )
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout.decode(encoding)
    assert out.exists()


def test_brackets_in_a_path_are_no_markup(source: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = source.with_name("[bold]x [b] :smile:")
    folder.mkdir()
    inner = folder / "[red]in.onnx"
    inner.write_bytes(source.read_bytes())
    assert call(inner, folder / "out[i].onnx", *QUICK) == 0
    assert f"wrote {folder}/out[i].onnx\n" in capfd.readouterr().out
    assert call("inspect", inner) == 0
    assert f"{inner}: " in capfd.readouterr().out
    args = ("--budgets", "0.5", "--no-bench", "--no-simplify", "--samples", 2)
    assert call("sweep", inner, "--out", folder / "[i]", *args) == 0
    assert f"wrote {folder}/[i]/sweep.json\n" in capfd.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("module", ["click", "numpy", "onnx", "onnxruntime", "scipy.linalg"])
def test_an_interrupt_while_imports_run(
    number: signal.Signals, module: str, source: Path, tmp_path: Path
) -> None:
    """The signal comes the moment that a module is looked for."""
    script = f"""
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), {int(number)})
        return None
sys.meta_path.insert(0, Finder())
from onnx_lowrank.cli import main
sys.argv[1:] = {[str(source), str(tmp_path / "out.onnx"), *QUICK]!r}
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler),
    )
    assert done.returncode == 130
    assert done.stderr == "onnx-lowrank: error: interrupted; nothing written\n"
    assert names(tmp_path) == ["in.onnx"]


def test_threads_keep_standard_error(source: Path) -> None:
    """`compress` in several threads at once."""
    before = os.fstat(2)
    failed: list[BaseException] = []

    def work() -> None:
        try:
            onnx_lowrank.compress(source, rank=4, simplify=False, bench=False, samples=2)
        except BaseException as found:
            failed.append(found)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join()
    assert not failed
    assert os.path.samestat(os.fstat(2), before)


def test_save_to_a_pipe_with_weights_beside(source: Path) -> None:
    result = factored(source, rank=4)
    with pytest.raises(UsageError, match="got a link to another folder, a pipe or a device"):
        result.save(os.devnull, external_data="always")
    assert result.save(os.devnull).output.path == os.devnull
