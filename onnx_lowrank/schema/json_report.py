"""What the reports of all verbs share: they become JSON, and name files and their origin."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

__all__ = ["File", "JsonReport", "Origin", "TargetsReport", "tool_name"]


def tool_name() -> str:
    """Name and version of the program, as reports give it."""
    return f"onnx-lowrank {version('onnx-lowrank')}"


class JsonReport:
    """A dataclass that can be written as JSON."""

    def to_dict(self) -> dict[str, Any]:
        """The report as dictionaries, lists, numbers and strings."""
        return dict(_plain(dataclasses.asdict(self)))  # type: ignore[call-overload]

    def to_json(self, *, indent: int | None = 2) -> str:
        """The report as strict JSON (a number that is not finite becomes null)."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False, ensure_ascii=False)


class TargetsReport(JsonReport):
    """A report whose targets each have a name and models with an error or None."""

    targets: tuple[Any, ...]

    @property
    def errors(self) -> tuple[str, ...]:
        """What did not run, one sentence each."""
        return tuple(
            f"{entry.target}: {model.error}"
            for entry in self.targets
            for model in entry.models
            if model.error is not None
        )


@dataclass(frozen=True)
class File:
    """A model file, or one in memory.

    Attributes:
        path: the file; None for a model that was given or is kept in memory.
        bytes: size with its external data; for a model in memory, what saving it takes.
        parameters: elements of all initializers and of the tensors of all Constant nodes, in the
            main graph, every subgraph and every function body; of a byte that holds several numbers
            each counts. None where they cannot be read.
        digest: SHA-256 of the file followed by its external data, in hexadecimal; None for a model
            in memory, and where it was not taken.
    """

    path: str | None
    bytes: int
    parameters: int | None
    digest: str | None = None


@dataclass(frozen=True)
class Origin:
    """What it takes to do something again.

    Attributes:
        command: as one would type it; None where a model, samples or a function were in memory.
        versions: of Python and of the packages that decide on the numbers.
        processor: what the times were taken on.
    """

    command: str | None
    versions: Mapping[str, str]
    processor: str


def _plain(value: Any) -> Any:
    """A value as what JSON knows; numbers that are not finite become None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
