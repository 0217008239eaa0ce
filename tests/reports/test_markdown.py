"""Markdown: small enough for a comment, and nothing in it means anything but itself."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from onnx_lowrank.reports.writers import text_of
from onnx_lowrank.schema.report import OutputVerdict
from tests.helpers.reports import (
    HOSTILE,
    bench_report,
    check_report,
    inspection,
    run_report,
    sweep_report,
)

_COMMENT = 65_536


@pytest.mark.parametrize("report", [check_report, bench_report, sweep_report, inspection])
def test_every_kind_begins_with_its_sentence(report: Callable[[], Any]) -> None:
    lines = text_of(report(), ".md").splitlines()
    assert lines[0].startswith("### onnx-lowrank: ")
    assert any(line.lstrip("> ").startswith("**") for line in lines[:4])
    assert "in.onnx out.onnx --keep 0.6" in "\n".join(lines)


def test_the_comment_on_a_run() -> None:
    text = text_of(run_report(1000), ".md")
    assert "**40 % smaller, 1.50× as fast on cpu, outputs off by 2 %**" in text
    assert "| <code>logits</code> | 0.009 | 0.1 | 0.99990 | 99.0 % |" in text
    assert "1000 linear maps, 750 factored: the 20 with the largest error" in text
    assert text.count("<code>encoder") == 20
    assert len(text) < _COMMENT


def test_a_long_list_of_anything_still_fits() -> None:
    report = run_report(60, tuple("x" * 5000 + str(n) for n in range(60)))
    layers = tuple(replace(layer, scope=None) for layer in report.layers)
    report = replace(report, layers=layers, notes=tuple(f"note {n}" for n in range(500)))
    text = text_of(report, ".md")
    assert "- 480 more" in text
    assert len(text) < _COMMENT


def test_a_warning_is_an_alert() -> None:
    warning = OutputVerdict("unusable", "output 'y' is off by 51 %")
    text = text_of(replace(run_report(2), verdict=warning), ".md")
    assert "> [!CAUTION]\n> **Unusable: output 'y' is off by 51 %**" in text
    assert "40 % smaller" in text


def test_names_mean_nothing_to_markdown() -> None:
    report = run_report(8, HOSTILE)
    layers = tuple(replace(layer, scope=None, rank=8, status="factored") for layer in report.layers)
    text = text_of(replace(report, layers=layers), ".md")
    kinds = set(re.findall(r"</?([a-z]+)", text))
    assert kinds == {"code", "details", "summary", "sub"}
    assert "@" not in text
    assert "`" not in text
    assert "a&#124;b &#96;c&#96;" in text
    widths = {
        line.count("|") for line in text.splitlines() if line.startswith("| ") and "<code>" in line
    }
    assert widths == {6, 7}, "a name adds no column to the tables of outputs and of layers"
