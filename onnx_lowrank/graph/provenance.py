"""Provenance: what a model says in its metadata of the run that made it.

The keys begin with ``onnx_lowrank.``; a later run replaces them, and leaves all others.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["read_metadata", "write_metadata"]

_PREFIX = "onnx_lowrank."


def write_metadata(properties: dict[str, str], entries: Mapping[str, str]) -> None:
    """Put entries in place of those of an earlier run.

    Args:
        properties: the metadata of a model; they are changed.
        entries: name without the prefix -> text.
    """
    for key in [key for key in properties if key.startswith(_PREFIX)]:
        del properties[key]
    properties.update({f"{_PREFIX}{name}": text for name, text in entries.items()})


def read_metadata(properties: Mapping[str, str]) -> dict[str, str]:
    """The entries of the run that made a model; none where no run of this package did."""
    return {
        key.removeprefix(_PREFIX): text
        for key, text in properties.items()
        if key.startswith(_PREFIX)
    }
