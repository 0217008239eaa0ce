"""A folder as IN and OUT, as ``optimum-cli export onnx`` leaves one: the model and what it needs.

The model is the only ``.onnx`` file, or ``model.onnx`` among several.  Everything else, such as the
configuration and the tokenizer, is copied beside the result as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from onnx_lowrank.errors import InputError, named
from onnx_lowrank.files import exists, same_file
from onnx_lowrank.phrases import listed

__all__ = ["Places", "places"]

_MODEL = "model.onnx"


@dataclass(frozen=True)
class Places:
    """Where the model is read and written.

    Attributes:
        source: the model's file.
        target: the result's file.
        beside: the folder whose other files are copied beside the result; None for none.
    """

    source: Path
    target: Path
    beside: Path | None = None


@contextmanager
def places(source: Path, target: Path, *, force: bool) -> Iterator[Places]:
    """The files of a run whose IN may be a folder; OUT is one then, and is made where it is not.

    Args:
        source: IN.
        target: OUT.
        force: whether OUT may be a folder with something in it.

    Raises:
        InputError: the folder has no model, or several; or OUT must not be written.
    """
    try:
        folder = source.is_dir()
    except (OSError, ValueError):  # a name that no file system takes
        folder = False
    if not folder:
        yield Places(source, target)
        return
    model = _model_in(source)
    if same_file(source, target):
        raise InputError(f"{target}: would overwrite the input {source}")
    if exists(target) and not target.is_dir():
        raise InputError(f"{target}: expected a folder, as {source} is one, got a file")
    made = not exists(target)
    if not made and not force and any(target.iterdir()):
        raise InputError(f"{target}: exists; {named('force', True)} overwrites what is in it")
    if made:
        try:
            target.mkdir()
        except OSError as error:
            raise InputError(f"{target}: cannot be made: {error.strerror or error}") from error
    try:
        yield Places(model, target / model.name, source)
    finally:
        if made:
            with contextlib.suppress(OSError):  # there is something in it: the result
                target.rmdir()


def _model_in(folder: Path) -> Path:
    try:
        models = sorted(file for file in folder.iterdir() if file.suffix == ".onnx")
    except OSError as error:
        raise InputError(f"{folder}: cannot be read: {error.strerror or error}") from error
    chosen = [file for file in models if file.name == _MODEL] or models
    if len(chosen) != 1:
        names = listed([file.name for file in models], 4) or "none"
        raise InputError(
            f"{folder}: expected one .onnx file in the folder, or {_MODEL} among several, got "
            f"{names}"
        )
    return chosen[0]
