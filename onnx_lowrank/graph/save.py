"""Save: write a model beside its place, then rename; never half a file, never a damaged one.

A model whose weights stand in a file of their own is two files.  The data file of a new model gets
an unused name, and the model refers to it.  So the rename of the model alone replaces the old one:
whenever a run ends, there is either the old model with its weights or the new one with its own.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import onnx
import onnx_ir as ir

from onnx_lowrank.errors import UsageError, named
from onnx_lowrank.files import place, resolved, same_file, written_through
from onnx_lowrank.graph.load import LoadedModel
from onnx_lowrank.graph.serialize import (
    PROTOBUF_LIMIT,
    data_locations,
    write_beside,
    write_protobuf,
)
from onnx_lowrank.graph.walk import stored_bytes

__all__ = [
    "AUTO",
    "ExternalData",
    "check_embeddable",
    "commit",
    "data_name",
    "free_data_name",
    "runnable_file",
    "write",
    "written_bytes",
]

ExternalData = Literal["auto", "always", "never"]

# Weights go beside the model above this.
AUTO = 1_500_000_000
# Bytes of a data file's name: file systems take 255, and onnx_ir writes it in a folder whose name
# is longer.
_LONGEST_NAME = 200
_NUMBERED = re.compile(r"(?:\.(\d+))?\.data$")


def data_name(name: str, number: int = 0) -> str:
    """The name of a model's data file: ``<name>.data``, or ``<name>.<number>.data`` from 1.

    A name that would be too long for a file system is cut.
    """
    suffix = f".{number}.data" if number else ".data"
    while len(os.fsencode(name)) + len(suffix) > _LONGEST_NAME:
        name = name[:-1]
    return name + suffix


def free_data_name(path: Path) -> str:
    """The first name of a data file for a model at this place that nothing there has yet."""
    path = resolved(path)
    names = (data_name(path.name, number) for number in itertools.count())
    return next(name for name in names if not os.path.lexists(path.with_name(name)))


def write(
    model: ir.Model, folder: Path, name: str, external: ExternalData, data: str | None = None
) -> tuple[Path, ...]:
    """Write a model into a folder.

    Args:
        model: the model; it is not changed.
        folder: where to.
        name: the model's file name.
        external: where the weights go; "auto": beside the model above 1.5 GB.
        data: the name of the data file; default: ``<name>.data``.

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
        weights = folder / (data or data_name(name))
        write_beside(model, path, weights.name)
        return (weights, path) if weights.exists() else (path,)
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
            f"{named('external_data', 'never')}: expected at most 2 GiB of weights, got {size} "
            "bytes"
        )


def commit(files: tuple[Path, ...], target: Path, keep: Iterable[Path] = ()) -> None:
    """Move written files to their place: the data first, then the model, which decides.

    Data that only the old model had are removed after that.

    Args:
        files: as `write` returned them, in a folder on the same file system; the data file under a
            name of `free_data_name`.
        target: the model's place.
        keep: files that are never removed, such as those that the run reads.

    Raises:
        OSError: a file cannot be moved; the old model is as it was.
    """
    *data, model = files
    stale = set() if written_through(target) else _own_data(resolved(target))
    placed = [resolved(target).with_name(file.name) for file in data]
    try:
        for file, spot in zip(data, placed, strict=True):
            place(file, spot)
        place(model, target)
    finally:
        if model.exists():  # it did not get to its place
            for spot in placed:
                spot.unlink(missing_ok=True)
    for spot in stale.difference(placed):
        if not any(same_file(spot, other) for other in keep):
            spot.unlink(missing_ok=True)


def _own_data(path: Path) -> set[Path]:
    """The data files of the model that stands at a place, as far as their names are its own."""
    own = set()
    for file in path.parent.iterdir():
        number = _NUMBERED.search(file.name)
        if number is not None and file.name == data_name(path.name, int(number[1] or 0)):
            own.add(file)
    if not own or not path.exists():  # the old model is only read where there is something
        return set()
    try:
        locations = data_locations(onnx.load(path, load_external_data=False))
    except Exception:  # not a model: it refers to nothing
        return set()
    return {file for file in own if file.name in locations}


def written_bytes(files: tuple[Path, ...]) -> int:
    """Size of a written model."""
    return sum(file.stat().st_size for file in files)
