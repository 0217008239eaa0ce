"""Entries of the metadata: replaced by a later run, and beside those of others."""

from __future__ import annotations

from onnx_lowrank.graph.provenance import read_metadata, write_metadata


def test_a_later_run_replaces_all_entries_and_no_others() -> None:
    properties = {"author": "somebody"}
    write_metadata(properties, {"goal": "1", "shared": "2"})
    assert read_metadata(properties) == {"goal": "1", "shared": "2"}
    write_metadata(properties, {"goal": "3"})
    assert read_metadata(properties) == {"goal": "3"}
    assert list(properties) == ["author", "onnx_lowrank.goal"]
