"""Memory that is free, and that a piece of work takes."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from onnx_lowrank.runtime import memory
from onnx_lowrank.runtime.memory import Memory, Watch


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


def test_a_limit_leaves_room_for_what_is_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "held", lambda: 700)
    monkeypatch.setattr(memory, "available", lambda: 600)
    assert Memory.of(1000).room() == 300
    assert Memory.of(500).room() == 0
    assert Memory.of(None) == Memory(limit=700 + 300)
    assert Memory.of(1000).given
    assert not Memory.of(None).given


def test_what_does_not_fit_is_said_in_sizes_that_are_read() -> None:
    own = Memory(limit=400 * 10**6, given=True)
    assert own.short("a run", 7 * 10**6, 398 * 10**6) == (
        "a run takes 7 MB beside the 398 MB that the program holds, of 400 MB allowed; expected at "
        "least about 450 MB"
    )
    # The work is not to blame.
    assert own.short("a run", 1700, 412 * 10**6, 80 * 10**6) == (
        "the program itself, with the model and its runtime, holds 412 MB of the 400 MB allowed; "
        "expected at least about 550 MB"
    )


def test_as_many_pieces_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "held", lambda: 0)
    own = Memory(limit=1000)
    assert own.planned() == 1000 * memory.SHARE
    assert own.times(100, 16) == 10 * memory.SHARE
    assert own.times(1, 16) == 16
    assert own.times(2000, 16) == 0
    assert own.times(None, 16) == 16
    assert Memory().times(2000, 16) == 16


def test_without_a_word_from_the_system_nothing_is_limited(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "held", lambda: None)
    assert Memory.of(None).limit is None
    assert Memory.of(5).room() is None


def test_what_is_held_is_watched_only_where_a_limit_was_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = threading.Event()

    def held() -> int:
        seen.set()
        return 3000

    monkeypatch.setattr(memory, "held", held)
    with Watch(Memory(2000, True)) as watch:
        assert seen.wait(30)
    assert watch.exceeded() == "was not kept: the program held 3 kB at most, of 2 kB allowed"
    with Watch(Memory(4000, True)) as watch:
        pass
    assert (watch.most, watch.exceeded()) == (3000, None)
    with Watch(Memory(2000, False)) as watch:
        pass
    assert (watch.most, watch.exceeded()) == (0, None)
    monkeypatch.setattr(memory, "held", lambda: None)
    with Watch(Memory(2000, True)) as watch:
        pass
    assert watch.exceeded() is None
