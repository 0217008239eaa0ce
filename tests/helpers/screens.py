"""Terminals that are none, for what the command shows."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest

from onnx_lowrank.cli.screen import Screen

__all__ = ["Terminal", "shown"]


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        """It is one."""
        return True


def shown(
    show: Callable[[Screen], object],
    width: int | None,
    monkeypatch: pytest.MonkeyPatch,
    *,
    every: bool = False,
) -> list[str]:
    """The lines that something shows on a terminal of some width, or (None) in a pipe.

    Of a terminal without colours, so that its lines can be read.
    """
    monkeypatch.setenv("TERM", "dumb")
    if width is not None:
        monkeypatch.setenv("COLUMNS", str(width))
    stream = io.StringIO() if width is None else Terminal()
    show(Screen(stream, every=every))
    lines = stream.getvalue().split("\n")
    assert lines.pop() == ""
    for line in lines:
        assert line == line.rstrip(), line
        assert "\t" not in line
        assert "\x1b" not in line
    return lines
