"""A board over ssh: a server on the loopback, and everything that can go wrong with one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import venv
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from onnx_lowrank.errors import InputError, UsageError
from onnx_lowrank.targets import open_target, runner
from onnx_lowrank.targets.base import Job
from tests.helpers.disks import small_disk
from tests.helpers.models import linear_model, uniform
from tests.helpers.places import ROOT
from tests.helpers.remote import (
    Sshd,
    assert_outputs,
    eventually,
    feeds_for,
    free_port,
    serving,
    silent,
    two_models,
)

pytestmark = pytest.mark.ssh

LONG = Job(iterations=10_000_000, threads=1, outputs=False)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with serving(tmp_path_factory.mktemp("sshd")) as sshd:
        yield sshd


@pytest.fixture
def sshd(server: Sshd, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sshd]:
    """The server; when the test is over, nothing is left on the board."""
    monkeypatch.setenv("ONNX_LOWRANK_SSH", server.arguments)
    yield server
    assert eventually(lambda: not any(server.board.iterdir())), list(server.board.iterdir())


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    return two_models(tmp_path)


def wrapper(folder: Path, before: str, python: str = sys.executable) -> Path:
    """A program that stands for the board's Python and first does something else."""
    path = folder / "python"
    path.write_text(f'#!/bin/sh\n{before}\nexec {python} "$@"\n')
    path.chmod(0o755)
    return path


def recording(folder: Path) -> tuple[str, Callable[[], list[int]]]:
    """A Python that writes its process id down: first that of the runner, then its children's."""
    pids = folder / "pids"
    pids.touch()  # nothing may have begun there when the time is up
    python = wrapper(folder, f'echo $$ >> "{pids}"')
    return f"python={python}", lambda: [int(line) for line in pids.read_text().split()]


def failure(target: str, models: list[Path], job: Job | None = None) -> str:
    with pytest.raises(InputError) as caught:
        open_target(target).run(models, feeds_for(), job or Job(threads=1), silent)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_outputs_times_memory_and_nodes(sshd: Sshd, models: list[Path]) -> None:
    done: list[int] = []
    feeds = feeds_for()
    target = open_target(sshd.name())
    assert not target.emulated
    assert target.own == "CPUExecutionProvider"
    outcomes = target.run(models, feeds, Job(iterations=7, threads=1), done.append)
    assert_outputs(outcomes, models, feeds)
    assert sum(done) == len(models) * len(feeds) + 7
    for outcome in outcomes:
        assert len(outcome.times_ns) == 7
        assert all(time > 0 for time in outcome.times_ns)
        assert outcome.load_ns is not None
        assert outcome.load_ns > 0
        assert outcome.first_ns is not None
        assert outcome.first_ns > 0
        assert outcome.peak_bytes is not None
        assert outcome.peak_bytes > 2**20
        assert outcome.nodes is not None
        assert "fc" in outcome.nodes["CPUExecutionProvider"][0]
        assert any(f"onnxruntime {ort.__version__}" in note for note in outcome.notes)


def test_external_data_and_a_model_that_fails(sshd: Sshd, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    model = linear_model(uniform((16, 4), rng))
    (tmp_path / "in").mkdir()
    apart, broken, other = (tmp_path / "in" / f"{n}.onnx" for n in ("apart", "broken", "other"))
    onnx.save(model, apart, save_as_external_data=True, location="w.bin", size_threshold=0)
    broken.write_bytes(b"not a model")
    model.graph.input[0].name = model.graph.node[0].input[0] = "another"
    onnx.save(model, other)
    feeds = feeds_for()
    job = Job(iterations=2, threads=1)
    good, bad, unlike = open_target(sshd.name()).run([apart, broken, other], feeds, job, silent)
    assert_outputs((good,), [apart], feeds)
    assert len(good.times_ns) == 2
    assert bad.error is not None
    assert "Protobuf parsing failed" in bad.error
    assert unlike.error is not None
    assert "another" in unlike.error
    assert bad.times_ns == unlike.times_ns == ()


def test_noise_of_a_login_shell_does_no_harm(
    sshd: Sshd, models: list[Path], tmp_path: Path
) -> None:
    python = wrapper(tmp_path, "echo Welcome to the board; echo motd >&2")
    outcomes = open_target(sshd.name(f"python={python}")).run(
        models, feeds_for(), Job(threads=1), silent
    )
    assert_outputs(outcomes, models, feeds_for())


def test_refused(models: list[Path]) -> None:
    said = failure(f"ssh://127.0.0.1:{free_port()}", models)
    assert "no connection" in said
    assert "Connection refused" in said


def test_unknown_host(models: list[Path]) -> None:
    assert "Could not resolve hostname" in failure("ssh://nowhere.invalid", models)


def test_host_that_does_not_answer(models: list[Path]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        said = failure(f"ssh://127.0.0.1:{mute.getsockname()[1]}?connect=1", models)
    assert "no connection" in said
    assert "timed out" in said


def test_other_key(sshd: Sshd, models: list[Path]) -> None:
    assert "Permission denied" in failure(sshd.name(key=sshd.other_key), models)


def test_unknown_host_key(sshd: Sshd, models: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNX_LOWRANK_SSH", "-F none -o UserKnownHostsFile=/dev/null")
    assert "Host key verification failed" in failure(sshd.name(), models)


def test_no_python_there(sshd: Sshd, models: list[Path]) -> None:
    said = failure(sshd.name("python=/nowhere/python3"), models)
    assert "no such Python there" in said
    assert "/nowhere/python3" in said


def test_no_onnxruntime_there(sshd: Sshd, models: list[Path], tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", with_pip=False)
    said = failure(sshd.name(f"python={tmp_path}/bare/bin/python"), models)
    assert "has no onnxruntime; there: " in said
    assert "-m pip install onnxruntime" in said


def test_old_python_there(sshd: Sshd, models: list[Path], tmp_path: Path) -> None:
    python = tmp_path / "old"
    pretend = "import sys; sys.version_info = (2, 7); exec(sys.argv[1])"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{pretend}" "$2"\n')
    python.chmod(0o755)
    said = failure(sshd.name(f"python={python}"), models)
    assert "expected Python 3.8 or newer, this is 2.7" in said


def test_no_such_provider_there(sshd: Sshd, models: list[Path]) -> None:
    said = failure(sshd.name("ep=nnapi"), models)
    assert "has no provider 'nnapi'; it has" in said
    assert "cpu" in said


def test_runner_dies_mid_run(sshd: Sshd, models: list[Path], tmp_path: Path) -> None:
    option, pids = recording(tmp_path)
    killed = threading.Event()

    def kill(_: int) -> None:
        if not killed.is_set():
            killed.set()
            os.kill(pids()[0], signal.SIGKILL)

    with pytest.raises(InputError, match=r"the runner there ended with status|broke") as caught:
        open_target(sshd.name(option)).run(models, feeds_for(), LONG, kill)
    assert killed.is_set()
    assert "may be left" not in str(caught.value)
    assert eventually(lambda: not any(alive(pid) for pid in pids()))


def test_connection_dies_mid_run(sshd: Sshd, models: list[Path], tmp_path: Path) -> None:
    option, pids = recording(tmp_path)
    killed = threading.Event()

    def kill(_: int) -> None:
        if not killed.is_set():
            killed.set()
            status = Path(f"/proc/{pids()[0]}/status").read_text()
            session = next(line for line in status.splitlines() if line.startswith("PPid:"))
            os.kill(int(session.split()[1]), signal.SIGKILL)

    with pytest.raises(InputError, match=r"no connection: .*closed|the connection broke"):
        open_target(sshd.name(option)).run(models, feeds_for(), LONG, kill)
    assert killed.is_set()
    assert eventually(lambda: not any(alive(pid) for pid in pids()))


def test_this_side_dies_mid_run(sshd: Sshd, models: list[Path], tmp_path: Path) -> None:
    """Nothing of this program gets to run any more, and the board is clean all the same."""
    option, pids = recording(tmp_path)
    program = (
        "import sys; from pathlib import Path; import os, signal\n"
        "from onnx_lowrank.targets import open_target; from onnx_lowrank.targets.base import Job\n"
        "from tests.helpers.remote import feeds_for\n"
        "job = Job(iterations=10_000_000, threads=1, outputs=False)\n"
        "end = lambda _: os.killpg(0, signal.SIGKILL)\n"
        "open_target(sys.argv[1]).run([Path(p) for p in sys.argv[2:]], feeds_for(), job, end)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, sshd.name(option), *map(str, models)],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        start_new_session=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert pids()
    assert eventually(lambda: not any(alive(pid) for pid in pids()))


def test_interrupted(sshd: Sshd, models: list[Path], tmp_path: Path) -> None:
    option, pids = recording(tmp_path)

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_target(sshd.name(option)).run(models, feeds_for(), LONG, interrupt)
    assert not any(sshd.board.iterdir())
    assert eventually(lambda: not any(alive(pid) for pid in pids()))


def test_time_out(sshd: Sshd, models: list[Path], tmp_path: Path) -> None:
    option, pids = recording(tmp_path)
    job = Job(iterations=10_000_000, threads=1, outputs=False, seconds=6)
    assert "not done within 6 s" in failure(sshd.name(option), models, job)
    assert eventually(lambda: not any(alive(pid) for pid in pids()))


def test_no_room_for_the_models(sshd: Sshd, tmp_path: Path) -> None:
    """A limit on the size of a file there: writing fails in the middle of one."""
    python = wrapper(tmp_path, "ulimit -f 800")
    models = two_models(tmp_path, size=40_000)  # 640 kB each
    with pytest.raises(InputError, match=r"cannot write model0/.*: File too large"):
        open_target(sshd.name(f"python={python}")).run(models, feeds_for(40_000), Job(), silent)


def test_no_room_for_the_outputs(sshd: Sshd, tmp_path: Path) -> None:
    path = tmp_path / "wide.onnx"
    rng = np.random.default_rng(1)
    onnx.save(linear_model(uniform((2, 40_000), rng)), path)
    python = wrapper(tmp_path, "ulimit -f 1000")
    feeds = [{"x": uniform((40, 2), rng)}]
    with pytest.raises(InputError, match="cannot write the outputs: File too large"):
        open_target(sshd.name(f"python={python}")).run([path], feeds, Job(threads=1), silent)


def test_disk_full(sshd: Sshd, tmp_path: Path) -> None:
    """A real file system of 1 MB: the models fit, the outputs do not; or not even the models."""
    with small_disk(tmp_path / "disk", "1m") as disk:
        path = tmp_path / "wide.onnx"
        rng = np.random.default_rng(1)
        onnx.save(linear_model(uniform((2, 40_000), rng)), path)  # 320 kB
        target = open_target(sshd.name(tmp=disk))
        with pytest.raises(InputError, match="No space left on device"):
            target.run([path], [{"x": uniform((40, 2), rng)}], Job(threads=1), silent)
        assert eventually(lambda: not any(disk.iterdir()))
        with pytest.raises(InputError, match=r"expected .* bytes free in"):
            target.run(two_models(tmp_path, 100_000), feeds_for(100_000), Job(), silent)
        assert eventually(lambda: not any(disk.iterdir()))


def test_no_such_folder_there(sshd: Sshd, models: list[Path], tmp_path: Path) -> None:
    said = failure(sshd.name(tmp=tmp_path / "nowhere"), models)
    assert "no folder for temporary files" in said


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ssh://", "expected ssh://"),
        ("ssh://-oProxyCommand=x", "expected ssh://"),
        ("ssh://host:port", "expected a number as port, got 'port'"),
        ("ssh://host?colour=red", "expected an option of key, python"),
        ("ssh://host?key", "expected key=VALUE"),
        ("ssh://host?key=a&key=b", "key is given more than once"),
        ("ssh://host?connect=soon", "expected connect=SECONDS"),
    ],
)
def test_names_that_are_refused(name: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        open_target(name)


def test_options_reach_ssh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNX_LOWRANK_SSH", "-F none")
    target = open_target("ssh://me@[::1]:2222?key=/a%20b&option=LogLevel=QUIET&option=Port=1")
    words = target.words  # type: ignore[attr-defined]
    assert words[:8] == ["ssh", "-T", "-o", "LogLevel=QUIET", "-o", "Port=1", "-F", "none"]
    assert words[-2:] == ["--", "me@::1"]
    assert words[words.index("-p") + 1] == "2222"
    assert words[words.index("-i") + 1] == "/a b"


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_runner_needs_only_an_old_python() -> None:
    import ast

    source = Path(runner.__file__).read_text(encoding="utf-8")
    tree = ast.parse(source, feature_version=(3, 8))
    modules = {
        name.name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for name in node.names
    } | {
        (node.module or "").partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
    }
    assert modules - set(sys.stdlib_module_names) == {"numpy", "onnxruntime"}
