"""Finished pieces of work in a folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnx_lowrank.errors import InputError
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.runtime import pieces as module
from onnx_lowrank.runtime.pieces import Bookmark, Pieces, opened, remembered

PROGRAM = {"tool": "1"}


@contextlib.contextmanager
def folder(path: Path, program: dict[str, str] | None = None, **begun: Any) -> Iterator[Pieces]:
    with opened(path, begun, program or PROGRAM, ()) as pieces:
        yield pieces


def doubled(array: Array) -> Array:
    return 2 * array


def files_in(path: Path) -> list[Path]:
    return sorted(path.glob("*.npz"))


def test_a_piece_is_taken_where_all_that_it_was_made_from_is_the_same(tmp_path: Path) -> None:
    made: list[None] = []

    def make() -> list[int]:
        made.append(None)
        return [len(made)]

    for program, parts, expected in (
        (PROGRAM, (1, np.ones(3)), [1]),
        (PROGRAM, (1, np.ones(3)), [1]),
        (PROGRAM, (1, np.zeros(3)), [2]),
        ({"tool": "2"}, (1, np.ones(3)), [3]),
        (PROGRAM, (1, np.ones(3)), [1]),
    ):
        with folder(tmp_path / "work", program) as pieces:
            assert remembered(pieces, "answer", partial(tuple, parts), make) == expected
    assert remembered(None, "answer", lambda: (), make) == [4]


def test_answers_of_a_crew(tmp_path: Path) -> None:
    array = np.arange(4.0)
    with folder(tmp_path) as pieces:
        assert pieces.find(doubled, array) is None
        pieces.store(doubled, array, doubled(array))
        assert pieces.summary() == []
    with folder(tmp_path) as pieces:
        np.testing.assert_array_equal(pieces.find(doubled, array.copy()), 2 * array)
        (note,) = pieces.summary()
    assert note == f"work='{tmp_path}': taken from an earlier run: 1 piece of finished work"


@pytest.mark.parametrize("damage", [b"", b"text", None])
def test_a_damaged_piece_is_named_and_made_again(damage: bytes | None, tmp_path: Path) -> None:
    with folder(tmp_path) as pieces:
        remembered(pieces, "answer", lambda: (1,), lambda: [np.ones(9)])
    (path,) = files_in(tmp_path)
    path.write_bytes(path.read_bytes()[:-40] if damage is None else damage)
    for again in (True, False):
        with folder(tmp_path) as pieces:
            found = remembered(pieces, "answer", lambda: (1,), lambda: [np.ones(9)])
            np.testing.assert_array_equal(found[0], np.ones(9))
            said = f"work='{tmp_path}': damaged, and made again: {path.name}" in pieces.summary()
            assert said == again


def test_a_piece_under_another_name_is_none(tmp_path: Path) -> None:
    with folder(tmp_path) as pieces:
        pieces.save("answer", pieces.key(1), [1])
        (path,) = files_in(tmp_path)
        path.rename(path.with_name(f"answer-{pieces.key(2)}.npz"))
        assert pieces.load("answer", pieces.key(2)) is None


def test_what_changed_is_said_once(tmp_path: Path) -> None:
    with folder(tmp_path, model="a", settings={"keep": 0.5, "seed": 0}) as pieces:
        assert pieces.notes == []
    with folder(tmp_path, model="a", settings={"keep": 0.5, "seed": 0}) as pieces:
        assert pieces.notes == []
    with folder(tmp_path, {"tool": "2"}, model="b", settings={"keep": 0.6, "seed": 0}) as pieces:
        assert pieces.notes == [
            f"work='{tmp_path}': changed since the last run there: model, settings (keep), program "
            "(tool); what depends on that is made again"
        ]
    (tmp_path / "onnx-lowrank-work.json").write_text("{")
    with folder(tmp_path, model="b") as pieces:
        (note,) = pieces.notes
    assert note.endswith("onnx-lowrank-work.json is damaged, and is written again")


def test_pieces_that_a_finished_run_has_no_use_for_go(tmp_path: Path) -> None:
    with folder(tmp_path) as pieces:
        for number in range(3):
            pieces.save("answer", pieces.key(number), [number])
    with folder(tmp_path) as pieces:
        assert pieces.load("answer", pieces.key(1)) == [1]
        pieces.save("answer", pieces.key(7), [7])
        assert len(files_in(tmp_path)) == 4
        pieces.finished()
        assert len(files_in(tmp_path)) == 2


def test_a_state_that_goes_on_changing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with folder(tmp_path) as pieces:
        mark = Bookmark(pieces, "state", pieces.key(1))
        mark.save(lambda: [1])  # too early
        assert mark.load() is None
        monkeypatch.setattr(module, "SECONDS", 0.0)
        for number in range(3):
            mark.save(partial(list, [number]))
        assert mark.load() == [2]
        mark.drop()
        assert mark.load() is None


def test_a_folder_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    for _ in range(2):
        with (
            pytest.raises(InputError, match=r"new or empty folder, or one of an .* thesis\.txt$"),
            folder(tmp_path),
        ):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_places_that_cannot_be_used(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for path, why in ((file, "expected a folder, got a file"), (tmp_path / "no" / "dir", "folder")):
        with pytest.raises(InputError, match=why), folder(path):
            pass
    assert file.read_text() == "mine"


def test_what_a_killed_run_left_unfinished_goes(tmp_path: Path) -> None:
    with folder(tmp_path):
        pass
    (tmp_path / ".onnx-lowrank-0123").write_bytes(b"half")
    (tmp_path / ".onnx-lowrank-4567").mkdir()
    with folder(tmp_path):
        pass
    assert not list(tmp_path.glob(".onnx*"))


def test_two_runs_at_once(tmp_path: Path) -> None:
    with folder(tmp_path):
        with (
            pytest.raises(InputError, match=r"another run works there \(process \d+\); expected"),
            folder(tmp_path),
        ):
            pass
        assert (tmp_path / "onnx-lowrank-work.json").exists()
    with folder(tmp_path):
        pass


def test_a_full_disk_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with folder(tmp_path) as pieces:
        monkeypatch.setattr(module, "write_archive", full)
        assert remembered(pieces, "answer", lambda: (1,), lambda: [1]) == [1]
        assert remembered(pieces, "answer", lambda: (2,), lambda: [2]) == [2]
        assert pieces.summary() == [
            f"work='{tmp_path}': not all was kept there: No space left on device"
        ]
    assert not files_in(tmp_path)
