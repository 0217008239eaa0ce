"""The table of writers: every kind of result as every kind of file."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

import onnx_lowrank
from onnx_lowrank.cli.reports import ENDINGS, JSON
from onnx_lowrank.errors import InputError, UsageError
from onnx_lowrank.reports.writers import WRITERS, endings_of, text_of
from onnx_lowrank.targets.support import SupportReport
from tests.helpers.reports import (
    HOSTILE,
    bench_report,
    check_report,
    inspection,
    run_report,
    sweep_report,
)


@pytest.mark.parametrize(
    "report",
    [run_report(5), check_report(), bench_report(), sweep_report(), inspection()],
    ids=lambda report: type(report).__name__,
)
def test_every_result_can_be_every_file(report: Any) -> None:
    assert endings_of(type(report)) == (".json", ".html", ".md", ".csv")
    for ending in WRITERS:
        text = text_of(report, ending.upper())
        assert text.endswith("\n")
    assert json.loads(text_of(report, ".json")) == json.loads(report.to_json())


def table(report: Any) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text_of(report, ".csv"))))


def test_csv_has_a_row_for_each_layer_with_its_numbers() -> None:
    report = run_report(9, HOSTILE)
    rows = table(report)
    assert [row["name"] for row in rows] == [layer.name for layer in report.layers]
    for row, layer in zip(rows, report.layers, strict=True):
        assert row["rank"] == ("" if layer.rank is None else str(layer.rank))
        assert float(row["bytes_after"]) == layer.bytes_after
        assert layer.shape is not None
        assert (int(row["m"]), int(row["n"])) == layer.shape


def test_csv_of_a_comparison_names_what_did_not_run() -> None:
    rows = table(check_report())
    assert [(row["target"], row["compared"]) for row in rows] == [
        ("cpu", "B with A"),
        ("openvino", "B"),
    ]
    assert rows[0]["relative_l2"] == "0.009"
    assert rows[1]["error"] == "no kernel for <Gemm>"


def test_a_report_is_written_by_the_ending_of_its_name(tmp_path: Path) -> None:
    report = run_report(3)
    page = tmp_path / "r.html"
    onnx_lowrank.write_report(report, page)
    assert page.read_text("utf-8") == text_of(report, ".html")
    with pytest.raises(InputError, match="exists"):
        onnx_lowrank.write_report(report, page)
    onnx_lowrank.write_report(report, page, force=True)
    with pytest.raises(UsageError, match=r"with \.json or \.html or \.md or \.csv, got '\.pdf'"):
        onnx_lowrank.write_report(report, tmp_path / "r.pdf")
    assert [file.name for file in tmp_path.iterdir()] == ["r.html"]


def test_what_has_no_page_says_what_it_has() -> None:
    assert endings_of(SupportReport) == JSON


def test_the_command_knows_the_same_endings() -> None:
    assert tuple(WRITERS) == ENDINGS
