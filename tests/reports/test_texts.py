"""How reports write numbers and names."""

from __future__ import annotations

import pytest

from onnx_lowrank.phrases import size
from onnx_lowrank.reports.texts import (
    change,
    count,
    error,
    milliseconds,
    percent,
    without_common,
)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (size(999), "999 B"),
        (size(3_359_126), "3.36 MB"),
        (size(999_600), "1 MB"),
        (size(999_999_999), "1 GB"),
        (count(999_999), "1 M"),
        (milliseconds(1.32), "1.32 ms"),
        (milliseconds(1234.5), "1.23 s"),
        (milliseconds(25_000), "25 s"),
        (size(7e9), "7 GB"),
        (count(803_098), "803 k"),
        (count(12), "12"),
        (percent(0.0087), "0.87 %"),
        (percent(0.0995), "10 %"),
        (percent(1e-7), "< 0.001 %"),
        (percent(0.0), "0 %"),
        (percent(float("inf")), "beyond any measure"),
        (change(100, 41), "−59 %"),
        (change(100, 141), "+41 %"),
        (change(100, 100), "±0 %"),
        (change(0, 5), ""),
        (error(None), ""),
        (error(float("inf")), "not finite"),
    ],
)
def test_numbers(text: str, shown: str) -> None:
    assert text == shown


def test_what_all_names_begin_with_is_cut() -> None:
    names = ["/model/encoder/layer.0/query", "/model/encoder/layer.0/key", "/model/encoder/pool"]
    assert without_common(names) == ["…layer.0/query", "…layer.0/key", "…pool"]
    assert without_common(["encoder.layers.0.a", "encoder.layers.1.b"]) == ["…0.a", "…1.b"]
    assert without_common(["blocks.0.mlp", "blocks.1.mlp"]) == ["blocks.0.mlp", "blocks.1.mlp"]
    assert without_common(["a.b", "a.c"]) == ["a.b", "a.c"]
    assert without_common(["/model/encoder/x"] * 2) == ["/model/encoder/x"] * 2
    assert without_common([]) == []
