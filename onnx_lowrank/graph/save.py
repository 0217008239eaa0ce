"""Save: write a model beside its place, then rename; never half a file, never a damaged one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from onnx_lowrank.errors import InputError, UsageError
from onnx_lowrank.files import data_name
from onnx_lowrank.graph.load import LoadedModel
from onnx_lowrank.graph.serialize import PROTOBUF_LIMIT, write_beside, write_protobuf
from onnx_lowrank.graph.walk import all_graphs, stored_bytes

__all__ = [
    "AUTO",
    "ExternalData",
    "check_embeddable",
    "check_target",
    "commit",
    "runnable_file",
    "write",
    "written_bytes",
]

ExternalData = Literal["auto", "always", "never"]

# Weights go beside the model above this.
AUTO = 1_500_000_000


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
    beside = external == "always" or (external == "auto" and size > AUTO)
    if beside:
        write_beside(model, path, data_name(name))
        data = folder / data_name(name)
        return (data, path) if data.exists() else (path,)
    check_embeddable(size)
    write_protobuf(model, path)
    return (path,)


def runnable_file(source: LoadedModel, folder: Path) -> Path:
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
