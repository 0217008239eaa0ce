"""Save: write a model beside its place, then rename; never half a file, never a damaged one."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from onnx_lowrank.errors import InputError, UsageError
from onnx_lowrank.load import Source
from onnx_lowrank.serialize import PROTOBUF_LIMIT, write_beside, write_protobuf
from onnx_lowrank.walk import all_graphs, stored_bytes

__all__ = [
    "ExternalData",
    "check_embeddable",
    "check_report_target",
    "check_target",
    "commit",
    "runnable_file",
    "workspace",
    "write",
    "write_text",
    "written_bytes",
]

ExternalData = Literal["auto", "always", "never"]

# Weights go beside the model above this.
_AUTO = 1_500_000_000


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


def check_target(path: Path, *, force: bool, inputs: tuple[Path, ...]) -> None:
    """Refuse a place where a model cannot or must not be written.

    Args:
        path: where the model is to go.
        force: whether an existing model may be overwritten.
        inputs: files that are being read, which must stay.

    Raises:
        InputError: naming the path and what is wrong with it.
    """
    folder = path.parent
    if not folder.is_dir():
        raise InputError(f"{path}: output folder {folder} does not exist")
    if not os.access(folder, os.W_OK):
        raise InputError(f"{path}: output folder {folder} cannot be written")
    if path.is_dir():
        raise InputError(f"{path}: expected a file to write, it is a folder")
    data = folder / data_name(path.name)
    for source in inputs:
        for target in (path, data):
            if target.exists() and target.samefile(source):
                raise InputError(f"{target}: would overwrite the input {source}")
    if path.exists() and not force:
        raise InputError(f"{path}: exists; --force overwrites it")
    if data.exists() and not (path.exists() and data in _data_files(path)):
        raise InputError(f"{data}: exists and belongs to another model; choose another name")


def _data_files(path: Path) -> set[Path]:
    """The external data files that a model on disk refers to."""
    try:
        model = ir.load(path)
    except Exception:  # not a model: it refers to nothing
        return set()
    return {
        path.parent / tensor.location
        for graph in all_graphs(model)
        for tensor in (value.const_value for value in graph.initializers.values())
        if isinstance(tensor, ir.ExternalTensor)
    }


def write(model: ir.Model, folder: Path, name: str, external: ExternalData) -> tuple[Path, ...]:
    """Write a model into a folder.

    Args:
        model: the model; it is not changed.
        folder: where to.
        name: the model's file name; external data goes to ``<name>.data``.
        external: where the weights go; "auto": beside the model above 1.5 GB.

    Returns:
        The files, the model last.

    Raises:
        UsageError: "never" for a model that a protobuf cannot hold.
        OSError: the disk is full, or cannot be written.
    """
    path = folder / name
    size = stored_bytes(model)
    beside = external == "always" or (external == "auto" and size > _AUTO)
    if beside:
        write_beside(model, path, data_name(name))
        data = folder / data_name(name)
        return (data, path) if data.exists() else (path,)
    check_embeddable(size)
    write_protobuf(model, path)
    return (path,)


def runnable_file(source: Source, folder: Path) -> Path:
    """A file of a model that ONNX Runtime can open: its own, or a copy in the folder.

    The copy is for a model in memory, and for one whose data files stand behind links: ONNX
    Runtime opens those only in some places of a model.
    """
    path = source.path
    linked = path is not None and any(
        file.parent != path.parent.resolve() or file.stat().st_nlink > 1
        for file in source.data_files
    )
    if path is not None and not linked:
        return path
    folder.mkdir(exist_ok=True)
    return write(source.model, folder, "original.onnx", "auto")[-1]


def check_embeddable(size: int) -> None:
    """Raise UsageError where so many bytes of weights do not fit into a protobuf."""
    if size > PROTOBUF_LIMIT:
        raise UsageError(
            f"--external-data never: expected at most 2 GiB of weights, got {size} bytes"
        )


def commit(files: tuple[Path, ...], target: Path) -> None:
    """Move written files to their place, the model last; remove data that the old one had.

    Args:
        files: as `write` returned them, in a folder on the same file system.
        target: the model's place.
    """
    own = target.parent / data_name(target.name)
    # The old model is only looked into where there is something to remove.
    stale = _data_files(target) if own.exists() and target.exists() else set()
    placed = set()
    for file in files:
        place = target if file == files[-1] else own
        file.replace(place)
        placed.add(place)
    if own in stale - placed:
        own.unlink(missing_ok=True)


def written_bytes(files: tuple[Path, ...]) -> int:
    """Size of a written model."""
    return sum(file.stat().st_size for file in files)


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
