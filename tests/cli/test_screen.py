"""Terminals and pipes."""

from __future__ import annotations

import io

import pytest

from onnx_lowrank.cli.screen import Screen
from tests.helpers.screens import Terminal, shown

TEXT = "note: one two three four five six seven eight nine ten /a/path/" + "x" * 60


def test_a_pipe_has_lines_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    assert shown(lambda screen: screen.line(TEXT + "  "), None, monkeypatch) == [TEXT]


def test_a_terminal_breaks_between_words(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(lambda screen: screen.line(TEXT), 40, monkeypatch)
    assert lines == [
        "note: one two three four five six seven",
        "  eight nine ten",
        "  /a/path/" + "x" * 60,
    ]


@pytest.mark.parametrize(
    ("variable", "value", "coloured"),
    [("NO_COLOR", "1", False), ("TERM", "dumb", False), ("TERM", "xterm-256color", True)],
)
def test_colours(
    variable: str, value: str, coloured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv(variable, value)
    stream = Terminal()
    Screen(stream).line("text", "yellow")
    assert ("\x1b[33m" in stream.getvalue()) == coloured
    piped = io.StringIO()
    Screen(piped).line("text", "bold yellow")
    assert piped.getvalue() == "text\n"


@pytest.mark.parametrize(("columns", "width"), [("100", 100), ("", 80), ("x", 80), ("0", 80)])
def test_columns(columns: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert Screen(Terminal()).width == width


def test_a_terminal_shows_some_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Screen(io.StringIO()).rows is None
    assert Screen(Terminal()).rows == 20
    assert Screen(Terminal(), every=True).rows is None
