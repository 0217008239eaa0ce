"""The schema of the JSON: every field of the report is on its page."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from onnx_lowrank.schema import json_report, layer, measures, report
from tests.helpers.places import ROOT

_CLASSES = [
    held
    for module in (json_report, layer, measures, report)
    for held in vars(module).values()
    if dataclasses.is_dataclass(held) and held.__module__ == module.__name__
]


@pytest.mark.parametrize("kind", _CLASSES, ids=lambda kind: str(kind.__name__))
def test_every_field_is_documented(kind: Any) -> None:
    page = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    for field in dataclasses.fields(kind):
        pair = f"`{field.name.removesuffix('_before').removesuffix('_after')}_before/after`"
        assert f"`{field.name}" in page or pair in page, field.name
