"""Origin: the command that does something again, with its versions and processor."""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from onnx_lowrank.compression.option import Option
from onnx_lowrank.compression.verbs import COMPRESS, Verb
from onnx_lowrank.runtime.machine import processor
from onnx_lowrank.schema.json_report import Origin

__all__ = ["command_line", "origin_of", "versions"]

_DECIDING = ("numpy", "onnx", "onnx-ir", "onnxruntime", "onnxsim", "scipy")
"""Packages that decide on the numbers of a run."""


def origin_of(verb: Verb, values: Mapping[str, Any], files: Sequence[object]) -> Origin:
    """What it takes to do something again.

    Args:
        verb: what was done.
        values: name of an option -> value; of options that are left out the default.
        files: the models, as they were given; None for one in memory.
    """
    return Origin(command_line(verb, values, files), versions(), processor())


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide on the numbers of a run."""
    found = {"python": platform.python_version()}
    return found | {name: version(name) for name in _DECIDING}


def command_line(verb: Verb, values: Mapping[str, Any], files: Sequence[object]) -> str | None:
    """The command, quoted for a shell; None where it cannot be typed: a part of it is in memory.

    Args:
        verb: what was done.
        values: name of an option -> value; of options that are left out the default.
        files: the models, as they were given; None for one in memory.
    """
    words = ["onnx-lowrank", *([] if verb is COMPRESS else [verb.name])]
    for file in files:
        if not isinstance(file, str | os.PathLike):
            return None
        words.append(os.fspath(file))
    for option in verb.options:
        value = values.get(option.name, option.default)
        if not option.given(value):
            continue
        if callable(value) or (option.kind == "samples" and not _typed(value)):
            return None
        if option.kind in ("model", "recipe", "executor") and not _typed(value):
            return None
        words += _words(option, value)
    return shlex.join(words)


def _typed(value: object) -> bool:
    return isinstance(value, str | os.PathLike)


def _words(option: Option, value: Any) -> Iterator[str]:
    """An option as one types it."""
    match option.kind:
        case "switch" | "off":
            yield option.option
        case "wholes" | "texts" | "paths":
            for item in value:
                yield from (option.option, os.fspath(item) if _typed(item) else str(item))
        case "list" | "numbers":
            yield from (option.option, ",".join(map(str, value)))
        case "shapes":
            for name, sizes in value.items():
                yield from (option.option, f"{name}:{','.join(map(str, sizes))}")
        case "dims":
            for name, size in value.items():
                yield from (option.option, f"{name}={size}")
        case _:
            yield from (option.option, os.fspath(value) if _typed(value) else str(value))
