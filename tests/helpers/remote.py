"""What the tests of remote targets share: small models, and an sshd of their own."""

from __future__ import annotations

import contextlib
import getpass
import os
import pwd
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.targets.base import Outcome
from tests.helpers.models import linear_model, run_ort, uniform

__all__ = [
    "Sshd",
    "assert_outputs",
    "eventually",
    "feeds_for",
    "free_port",
    "serving",
    "silent",
    "two_models",
]


def silent(_: int) -> None:
    """Progress that nobody sees."""


def two_models(folder: Path, size: int = 16) -> list[Path]:
    """Two models with one signature, ``x[N, size] -> y[N, 4]``."""
    rng = np.random.default_rng(5)
    paths = []
    for name in ("before", "after"):
        path = folder / f"{name}.onnx"
        onnx.save(linear_model(uniform((size, 4), rng), bias=uniform((4,), rng)), path)
        paths.append(path)
    return paths


def feeds_for(size: int = 16, samples: int = 3) -> list[dict[str, Array]]:
    """Samples of one row each."""
    rng = np.random.default_rng(6)
    return [{"x": uniform((1, size), rng)} for _ in range(samples)]


def assert_outputs(outcomes: tuple[Outcome, ...], models: list[Path], feeds: Any) -> None:
    """Every model ran every sample and gave what ONNX Runtime gives here."""
    assert len(outcomes) == len(models)
    for outcome, model in zip(outcomes, models, strict=True):
        assert outcome.error is None
        assert len(outcome.outputs) == len(feeds)
        for found, feed in zip(outcome.outputs, feeds, strict=True):
            expected = run_ort(onnx.load(model), feed)
            assert list(found) == list(expected)
            for name, array in expected.items():
                assert found[name].dtype == array.dtype
                np.testing.assert_allclose(found[name], array, rtol=2e-5, atol=1e-6)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def eventually(true: Callable[[], bool], seconds: float = 30) -> bool:
    """Whether something becomes true before long."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


@dataclass(frozen=True)
class Sshd:
    """A server that lets one key in."""

    port: int
    key: Path
    other_key: Path
    arguments: str
    board: Path

    def name(self, *options: str, key: Path | None = None, tmp: Path | None = None) -> str:
        """A target on this server, whose temporary folders are made in `board`."""
        parts = [f"key={key or self.key}", f"tmp={tmp or self.board}", *options]
        if not any(option.startswith("python=") for option in options):
            parts.append(f"python={sys.executable}")
        return f"ssh://{getpass.getuser()}@127.0.0.1:{self.port}?{'&'.join(parts)}"


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Sshd]:
    """Run an sshd on the loopback, with keys that are made for it, or skip."""
    program = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if program is None or shutil.which("ssh") is None:
        pytest.skip("no sshd and ssh here: apt-get install openssh-server openssh-client")
    shell = pwd.getpwuid(os.geteuid()).pw_shell
    if Path(shell).name in ("nologin", "false"):
        pytest.skip(f"sshd lets {getpass.getuser()} run nothing: the login shell is {shell}")
    if os.geteuid() == 0:  # where it separates its privileges
        with contextlib.suppress(OSError):
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    for name in ("host", "user", "other"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True
        )
    port = free_port()
    (folder / "authorized").write_text((folder / "user.pub").read_text())
    host_key = " ".join((folder / "host.pub").read_text().split()[:2])
    (folder / "known").write_text(f"[127.0.0.1]:{port} {host_key}\n")
    (folder / "config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\n"
        f"AuthorizedKeysFile {folder}/authorized\nPidFile none\nStrictModes no\nUsePAM no\n"
        "PasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin yes\n"
        "MaxStartups 100\n"
    )
    board = folder / "board"
    board.mkdir()
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([program, "-D", "-e", "-f", folder / "config"], stderr=log)
    try:
        if not eventually(lambda: process.poll() is not None or _answers(port), 10):
            pytest.skip(f"sshd does not listen: {(folder / 'log').read_text()}")
        if process.poll() is not None:
            pytest.skip(f"sshd does not start: {(folder / 'log').read_text()}")
        arguments = f"-F none -o UserKnownHostsFile={folder}/known -o GlobalKnownHostsFile=none"
        yield Sshd(port, folder / "user", folder / "other", arguments, board)
    finally:
        process.terminate()
        process.wait()


def _answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), 1) as connection:
            return connection.recv(4) == b"SSH-"
    except OSError:
        return False
