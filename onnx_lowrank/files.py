"""Files: may a file be written here, and writing it whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from onnx_lowrank.errors import InputError

__all__ = ["check_report_target", "check_statistics_target", "data_name", "workspace", "write_text"]


@contextmanager
def workspace(folder: Path | None) -> Iterator[Path]:
    """A hidden folder that is removed afterwards, in the given one or the system's."""
    try:
        path = Path(tempfile.mkdtemp(prefix=".onnx-lowrank-", dir=folder))
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {error.strerror or error}") from error
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def data_name(name: str) -> str:
    """The external data file of a model file."""
    return f"{name}.data"


def check_report_target(path: Path, others: tuple[Path, ...]) -> None:
    """Refuse a place for a report before the work is done; raises InputError."""
    if not path.parent.is_dir():
        raise InputError(f"--report {path}: folder {path.parent} does not exist")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError(f"--report {path}: cannot be written")
    for other in (*others, *(other.with_name(data_name(other.name)) for other in others)):
        if path.absolute() == other.absolute() or (
            path.exists() and other.exists() and path.samefile(other)
        ):
            raise InputError(f"--report {path}: would overwrite the model {other}")


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all.  Raises InputError where it cannot be written."""
    beside: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=".onnx-lowrank-", delete=False, encoding="utf-8"
        ) as file:
            beside = Path(file.name)
            file.write(text)
        beside.chmod(0o666 & ~_umask())
        beside.replace(path)
    except OSError as error:
        if beside is not None:
            beside.unlink(missing_ok=True)
        raise InputError(f"{path}: {error.strerror or error}") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_statistics_target(
    path: Path, inputs: tuple[Path, ...], option: str = "--save-stats"
) -> None:
    """Refuse a place for what an option saves before the work is done; raises InputError."""
    if not path.parent.is_dir():
        raise InputError(f"{option} {path}: folder {path.parent} does not exist")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError(f"{option} {path}: cannot be written")
    for other in inputs:
        if path.absolute() == other.absolute() or (path.exists() and path.samefile(other)):
            raise InputError(f"{option} {path}: would overwrite the input {other}")
