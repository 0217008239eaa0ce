"""Set up ``.venv`` in the checkout for the programs beside this one.

Only the standard library is needed, and pip is called only when something has changed since the
last time: pyproject.toml, or the extras that are asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

__all__ = ["ROOT", "SetupError", "ensure_environment", "fail", "run"]

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".venv"
STAMP = ENVIRONMENT / "onnx-lowrank-setup.json"
MINIMUM = (3, 11)


class SetupError(Exception):
    """The environment cannot be set up; the message is one line that says why."""


def run(command: Sequence[str | Path]) -> int:
    """Print a command as one would type it in the checkout, run it there, return its status."""
    words = [str(word).replace(f"{ROOT}{os.sep}", "") for word in command]
    print(f"$ {shlex.join(words)}", flush=True)
    return subprocess.run([str(word) for word in command], cwd=ROOT, check=False).returncode


def fail(error: Exception) -> int:
    """Print an error as one line on standard error; returns the exit status for it."""
    print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
    return 1


def ensure_environment(extras: Sequence[str] = (), first: Sequence[str] = ()) -> Path:
    """Create ``.venv`` if it is absent, install the checkout into it, and return its Python.

    Args:
        extras: extras of pyproject.toml to install too; those installed before stay.
        first: requirements to install before the extras, so that the pins in them hold.

    Raises:
        SetupError: this Python is too old, or the environment or pip failed.
    """
    if sys.version_info < MINIMUM:
        raise SetupError(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}")
    if not (ENVIRONMENT / "pyvenv.cfg").is_file() or not _python().exists():
        print(f"creating {ENVIRONMENT.name}", flush=True)
        try:
            venv.create(ENVIRONMENT, clear=True, with_pip=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise SetupError(f"cannot create {ENVIRONMENT}: {error}") from error
    digest = hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()
    installed = _read_stamp()
    wanted = sorted({*extras, *installed.get("extras", "").split()})
    stamp = {"pyproject": digest, "extras": " ".join(wanted)}
    if installed != stamp:
        if first:
            _install(*first)
        _install("-e", f".[{','.join(wanted)}]" if wanted else ".")
        STAMP.write_text(json.dumps(stamp), encoding="utf-8")
    return _python()


def _python() -> Path:
    windows = sys.platform == "win32"
    return ENVIRONMENT / ("Scripts/python.exe" if windows else "bin/python")


def _read_stamp() -> dict[str, str]:
    """What was installed last, or nothing where the stamp is not there or cannot be read."""
    try:
        stamp = json.loads(STAMP.read_text(encoding="utf-8"))
        return {key: str(stamp[key]) for key in ("pyproject", "extras")}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _install(*arguments: str) -> None:
    command = [str(_python()), "-m", "pip", "install", "-qq"]
    command += ["--disable-pip-version-check", *arguments]
    if run(command) != 0:
        raise SetupError(f"pip install {' '.join(arguments)} failed (pip's reason is above)")
