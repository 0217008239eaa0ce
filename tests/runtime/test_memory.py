"""Memory that is free, and that a piece of work takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onnx_lowrank.runtime import memory


def test_what_is_free_is_a_number_of_bytes() -> None:
    free = memory.available()
    assert free is None or free > 1 << 20


def test_the_growth_of_work_that_fills_an_array() -> None:
    def work() -> int:
        return int(np.ones(64 << 20, np.uint8).sum())

    answer, grown = memory.growth(work)
    assert answer == 64 << 20
    assert grown is None or 48 << 20 < grown < 160 << 20


def test_where_the_system_does_not_tell_nothing_is_known(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("STATUS", "RESET", "SYSTEM"):
        monkeypatch.setattr(memory, name, tmp_path / "none" / name)
    assert memory.available() is None
    assert memory.growth(lambda: 7) == (7, None)
