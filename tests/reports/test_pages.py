"""The pages: complete, self-contained, and in a browser at the width of a phone and of a desk."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from onnx_lowrank.phrases import printable
from onnx_lowrank.reports.writers import text_of
from onnx_lowrank.schema.report import EffortStep, OutputVerdict, Report
from tests.helpers.chromium import Page, opened
from tests.helpers.reports import (
    HOSTILE,
    bench_report,
    check_report,
    inspection,
    latency,
    run_report,
    sweep_report,
)

PAGES: dict[str, Callable[[], Any]] = {
    "run": lambda: run_report(17, HOSTILE),
    "empty": lambda: replace(run_report(0), check=None, latency=(), origin=None, notes=()),
    "check": lambda: check_report(HOSTILE[0]),
    "bench": bench_report,
    "sweep": sweep_report,
    "inspect": lambda: inspection(12, HOSTILE),
}


@pytest.fixture(scope="module")
def tab() -> Iterator[Page]:
    with opened() as page:
        yield page


def plain(text: str) -> str:
    """A page without the blanks at which no line ends."""
    return text.replace("&nbsp;", " ")


@pytest.mark.parametrize("kind", PAGES)
def test_a_page_is_one_file_that_loads_nothing(kind: str) -> None:
    text = html.unescape(text_of(PAGES[kind](), ".html"))
    assert text.startswith("<!DOCTYPE html>\n<html")
    assert "default-src 'none'" in text
    assert not re.search(r"<(link|script src|iframe)|@import|url\(|https?://", text)
    assert len(text) < 100_000


def test_the_sentence_is_first_and_a_warning_is_as_plain() -> None:
    report = run_report(3)
    assert f'<h1 class="verdict good">{report.summary}</h1>' in plain(text_of(report, ".html"))
    warning = OutputVerdict("unusable", "outputs are off by 51 % on random input")
    text = plain(text_of(replace(report, verdict=warning), ".html"))
    assert f'<h1 class="verdict bad">Unusable: {warning.text}</h1>' in text
    assert report.summary in text


def test_a_page_holds_everything_to_run_it_again() -> None:
    for report in (run_report(3), check_report(), bench_report(), sweep_report(), inspection()):
        text = text_of(report, ".html")
        assert "onnx-lowrank in.onnx out.onnx --keep 0.6 --data 'my data.npz'" in text
        assert "onnxruntime 1.32.0" in text
        assert "ab" * 32 in text


def test_a_thousand_layers_stay_a_small_file() -> None:
    assert len(text_of(run_report(1000), ".html")) < 2_500_000


# --- in a browser


def rows(tab: Page) -> list[dict[str, Any]]:
    """The rows that are in view, from the top."""
    script = """JSON.stringify([...document.querySelectorAll(".layers tbody tr")]
        .filter((row) => row.checkVisibility())
        .map((row) => [...row.cells].map((cell) => [cell.dataset.label, cell.dataset.value])))"""
    return [dict(cells) for cells in json.loads(tab.run(script))]


def shown(tab: Page, report: Any, folder: Path, width: int = 1280, *, dark: bool = False) -> None:
    path = folder / "page.html"
    path.write_text(text_of(report, ".html"), encoding="utf-8")
    tab.show(path, width=width, dark=dark)


def click(tab: Page, selector: str) -> None:
    tab.run(f"document.querySelector({selector!r}).click()")


def choose(tab: Page, selector: str, value: str, event: str) -> None:
    tab.run(
        f"""{{ const field = document.querySelector({selector!r}); field.value = {value!r};
        field.dispatchEvent(new Event({event!r}, {{ bubbles: true }})); }}"""
    )


def head(column: int) -> str:
    return f".layers th:nth-child({column}) button"


@pytest.mark.parametrize("width", [390, 760, 850, 1000, 1280])
@pytest.mark.parametrize("kind", PAGES)
def test_a_page_fits_and_nothing_complains(
    kind: str, width: int, tab: Page, tmp_path: Path
) -> None:
    shown(tab, PAGES[kind](), tmp_path, width)
    assert tab.run("document.documentElement.scrollWidth") == width
    assert tab.run("window.hit") is None
    assert tab.complaints == []
    assert tab.run("document.querySelector('h1').getBoundingClientRect().top") < 200


def test_the_page_shows_the_numbers_of_the_json(tab: Page, tmp_path: Path) -> None:
    report = run_report(17, HOSTILE)
    shown(tab, report, tmp_path)
    found, layers = rows(tab), json.loads(report.to_json())["layers"]
    assert len(found) == len(layers) == 17
    for row, layer in zip(found, layers, strict=True):
        assert row["Layer"] == printable(layer["name"])
        for column, key in (
            ("m×n", "parameters_before"), ("Rank", "rank"), ("Energy", "energy"),
            ("Predicted", "predicted_error"), ("Error", "output_error"),
        ):  # fmt: skip
            value = None if layer[key] is None else pytest.approx(layer[key])
            assert (None if row.get(column) is None else float(row[column])) == value
        assert row["What became of it"] == layer["reason"]
    texts = json.loads(
        tab.run(
            "JSON.stringify([...document.querySelectorAll('.layers td')].map((c) => c.innerText))"
        )
    )
    first = report.layers[0]
    assert printable(first.name) in texts[0]
    assert first.scope is not None
    assert first.scope in texts[0]
    assert f"{first.energy:.4f}" in texts
    assert tab.run("document.querySelectorAll('svg.spark').length") == 17


def test_the_table_sorts(tab: Page, tmp_path: Path) -> None:
    report = run_report(17)
    shown(tab, report, tmp_path)
    order = [row["Layer"] for row in rows(tab)]

    def errors() -> list[float]:
        return [float(row["Error"]) for row in rows(tab) if row.get("Error") is not None]

    click(tab, head(8))
    assert errors() == sorted(errors(), reverse=True)
    assert rows(tab)[-1].get("Error") is None, "what has no value comes last"
    click(tab, head(8))
    assert errors() == sorted(errors())
    assert rows(tab)[-1].get("Error") is None
    click(tab, head(8))
    assert [row["Layer"] for row in rows(tab)] == order
    click(tab, head(1))
    assert [row["Layer"] for row in rows(tab)] == [f"node_MatMul_{n}" for n in range(17)]
    choose(tab, ".order", "2", "change")
    ranks = [int(row["Rank"]) for row in rows(tab) if row.get("Rank")]
    assert ranks == sorted(ranks, reverse=True)


def test_the_table_searches_and_filters(tab: Page, tmp_path: Path) -> None:
    report = run_report(17)
    shown(tab, report, tmp_path, 390)
    choose(tab, ".filter", "dense", "change")
    assert len(rows(tab)) == sum(layer.status == "dense" for layer in report.layers)
    choose(tab, ".search", "LAYERS.7. left", "input")
    assert rows(tab) == []
    choose(tab, ".search", "LAYERS.7. break-even", "input")
    assert [row["Layer"] for row in rows(tab)] == ["node_MatMul_7"]
    assert tab.run("document.querySelector('.shown').value") == "1 of 1 shown, 17 in all"
    choose(tab, ".filter", "factored", "change")
    assert rows(tab) == []


def test_a_thousand_layers(tab: Page, tmp_path: Path) -> None:
    shown(tab, run_report(1000), tmp_path)
    assert len(rows(tab)) == 100
    click(tab, head(4))
    kept = [float(row["Kept"]) for row in rows(tab)]
    assert kept == sorted(kept, reverse=True)
    choose(tab, ".search", "node_MatMul_999", "input")
    assert [row["Layer"] for row in rows(tab)] == ["node_MatMul_999"]
    choose(tab, ".search", "", "input")
    click(tab, ".more")
    assert len(rows(tab)) == 1000
    assert not tab.run("document.querySelector('.more').checkVisibility()")
    assert tab.complaints == []


def test_where_it_goes_can_be_seen_by_each_measure(tab: Page, tmp_path: Path) -> None:
    report = run_report(40)
    shown(tab, report, tmp_path)
    script = "[...document.querySelectorAll('.bars')].map((list) => list.checkVisibility())"
    for number in range(4):
        click(tab, f"#where-{number} + label")
        assert tab.run(script) == [index == number for index in range(4)]
    assert tab.run("document.querySelector('.bars').children.length") == 13
    first = tab.run("document.querySelector('.bars .who').innerText")
    assert re.fullmatch(r"…\d+.linear", first), "what all names begin with is cut"


def test_a_number_is_no_name_of_a_layer(tab: Page, tmp_path: Path) -> None:
    report = run_report(2)
    layers = (replace(report.layers[0], scope="7"), report.layers[1])
    shown(tab, replace(report, layers=layers), tmp_path)
    names = tab.run("[...document.querySelectorAll('.bars .who')].map((who) => who.innerText)")
    assert names[:2] == ["encoder.layers.1.linear", "node_MatMul_0"]


def test_every_figure_of_a_card_has_its_name(tab: Page, tmp_path: Path) -> None:
    """Also that of the last column, where the last one of a layer is a text of its own."""
    shown(tab, check_report(), tmp_path, 390)
    script = """[...document.querySelectorAll("section:nth-of-type(2) td:last-child")]
        .map((cell) => getComputedStyle(cell, "::before").content)"""
    assert tab.run(script) == ['"Top-1 agreement"']


def test_light_and_dark(tab: Page, tmp_path: Path) -> None:
    colours = []
    for dark in (False, True):
        shown(tab, run_report(3), tmp_path, dark=dark)
        colours.append(tab.run("getComputedStyle(document.body).backgroundColor"))
    assert colours[0] != colours[1]


def test_the_policy_lets_nothing_else_run(tab: Page, tmp_path: Path) -> None:
    """Were a name not escaped, it would still not run."""
    shown(tab, run_report(3), tmp_path)
    tab.run("document.body.insertAdjacentHTML('beforeend', '<svg onload=\"window.hit=1\"></svg>')")
    tab.run(
        "document.body.append(Object.assign(document.createElement('script'), {text: 'hit=1'}))"
    )
    assert tab.run("window.hit") is None
    assert any("Content Security Policy" in text for text in tab.complaints)


@pytest.mark.parametrize("ending", [".html", ".md"])
def test_ways_to_more_accuracy_have_their_outcome(ending: str) -> None:
    steps = (
        EffortStep("refit", True, 0.05, 0.03, 2.0),
        EffortStep("healing", False, 0.03, 0.04, 9.0),
        EffortStep("Fisher information", False, None, None, 0.0, "no derivative of <Loop>"),
    )
    text = html.unescape(text_of(replace(run_report(2), steps=steps), ending))
    assert "More accuracy at the same ranks" in text
    for said in ("0.05", "0.04", "taken", "dropped", "not tried: no derivative of <Loop>"):
        assert said in text
    assert "More accuracy" not in text_of(run_report(2), ending)


def test_a_speed_that_is_too_noisy_is_none() -> None:
    text = text_of(replace(run_report(2), latency=(latency(1.5, 0.8, 2.0),)), ".html")
    assert '<p class="big">too noisy</p>' in text
    assert '<p class="big">1.50×</p>' not in text


@pytest.mark.parametrize("error", [float("nan"), float("inf")])
def test_points_without_a_finite_error_are_in_the_table_alone(error: float) -> None:
    report = sweep_report()
    points = tuple(replace(point, error=error) for point in report.points)
    text = plain(text_of(replace(report, points=points), ".html"))
    assert "Trade-off" not in text
    far = "not measured" if math.isnan(error) else "beyond any measure"
    assert f"up to 60 % smaller, where the worst output is {far}" in text
    for ending in (".md", ".csv", ".json"):
        assert text_of(replace(report, points=points), ending)


@pytest.mark.parametrize("change", [{"layers": ()}, {"check": None}, {"settings": {}}])
def test_what_is_not_there_is_left_out(change: dict[str, Any]) -> None:
    report: Report = replace(run_report(3), **change)
    text = text_of(report, ".html")
    assert "None" not in re.sub(r"<(style|script).*?</\1>", "", text, flags=re.S)
