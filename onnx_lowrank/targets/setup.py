"""Set-up: where what a target needs is installed, and the commands and programs that install it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from onnx_lowrank.errors import InputError
from onnx_lowrank.phrases import listed

__all__ = ["Say", "folder_of", "hint", "packages", "renewed", "run", "stamped", "user_cache"]

Say = Callable[[str], None]
"""Takes one line on what is being done."""

_VARIABLES = {"web": "ONNX_LOWRANK_WEB", "arm64": "ONNX_LOWRANK_ARM64"}


def folder_of(kind: str) -> Path:
    """Where the files of a kind of target are.

    That is where the environment says, else in the checkout where there are some, else in the
    user's cache.

    Args:
        kind: "web" or "arm64".
    """
    given = os.environ.get(_VARIABLES[kind])
    if given:
        return Path(given).absolute()
    checkout = Path(__file__).resolve().parents[2] / f".{kind}"
    return checkout if checkout.is_dir() else user_cache() / kind


def user_cache() -> Path:
    """The user's folder for what can be had again."""
    if sys.platform == "darwin":
        place = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        place = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        place = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return place / "onnx-lowrank"


def packages(*names: str) -> str | None:
    """The command for packages of the system; None where that is not Debian's kind of system."""
    return f"apt-get install {' '.join(names)}" if shutil.which("apt-get") else None


def hint(how: str | None) -> str:
    """A command as the end of a message; "" where there is none."""
    return "" if how is None else f"; {how}"


def run(command: Sequence[str | Path], what: str, folder: Path | None = None) -> str:
    """Run a program; its standard output.

    Args:
        command: its words.
        what: names it in an error.
        folder: where it runs.

    Raises:
        InputError: it failed, with the last line of what it said.
    """
    try:
        done = subprocess.run(
            list(map(str, command)),
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            cwd=folder,
        )
    except OSError as error:
        raise InputError(f"{what}: {error}") from error
    if done.returncode != 0:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        told = [line for line in lines if "error" in line.lower()] or lines[-1:]
        raise InputError(f"{what}: {told[0].strip() if told else f'status {done.returncode}'}")
    return done.stdout


def stamped(file: Path, key: str) -> object:
    """An entry of a JSON file; None where the file or the entry is not there, or is damaged."""
    try:
        found: object = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found.get(key) if isinstance(found, dict) else None


def renewed(target: Path, make: Callable[[Path], None], own: Collection[str]) -> None:
    """Make a folder anew: beside it first, so that what is there is whole.

    Args:
        target: the folder.
        make: fills an empty folder that will take its place.
        own: names of what an earlier set-up left in it; nothing else is removed.

    Raises:
        InputError: from ``make``, the folder holds something else, or a file cannot be written.
    """
    inside = sorted(path.name for path in target.iterdir()) if target.is_dir() else []
    foreign = [name for name in inside if name not in own]
    if foreign:
        raise InputError(
            f"{target}: expected a folder for this target alone, got one that also holds "
            f"{listed(foreign, 3)}"
        )
    new = target.with_name(f"{target.name}.new")
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        make(new)
        shutil.rmtree(target, ignore_errors=True)
        new.rename(target)
    except OSError as error:
        raise InputError(f"{error.filename or target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
