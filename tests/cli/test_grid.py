"""Tables within a width."""

from __future__ import annotations

from onnx_lowrank.cli.grid import Column, Grid
from onnx_lowrank.cli.shorten import GAP

COLUMNS = (
    Column("layer", left=True, least=8),
    Column("form", left=True, leave=1),
    Column("rank"),
    Column("error"),
)


def grid(*, fold: bool = False) -> Grid:
    made = Grid(COLUMNS, fold=fold)
    made.add("encoder.layer.0.attention", "matmul-right", "24", "0.1")
    made.add("encoder.layer.1.attention", "matmul-right", rest="dense: no rank saves anything here")
    return made


def test_a_pipe_has_it_all() -> None:
    laid = grid().laid(None)
    assert laid.lines == (
        "layer                      form          rank  error",
        "encoder.layer.0.attention  matmul-right    24    0.1",
        "encoder.layer.1.attention  matmul-right  dense: no rank saves anything here",
    )
    assert not laid.cut
    assert not laid.left_out


def test_names_are_cut_then_columns_go() -> None:
    laid = grid().laid(40)
    assert max(map(len, laid.lines)) <= 40
    assert not laid.left_out
    narrow = grid().laid(24)
    assert narrow.left_out == ("form",)
    assert all(len(line) <= 24 for line in narrow.lines)
    assert "…0…" in narrow.lines[1]
    assert "…1…" in narrow.lines[2]


def test_a_text_is_cut_at_a_word_and_returned() -> None:
    laid = grid().laid(60)
    assert laid.cut == {1: "dense: no rank saves anything here"}
    assert laid.lines[2].endswith(GAP)
    assert max(map(len, laid.lines)) <= 60


def test_or_it_goes_on_below() -> None:
    lines = grid(fold=True).laid(36).lines
    assert not any(GAP in line.replace("…0…", "").replace("…1…", "") for line in lines)
    start = lines[2].index("dense:")
    assert lines[3][:start].strip() == ""
    assert " ".join(line[start:] for line in lines[2:]) == "dense: no rank saves anything here"


def test_wide_characters_take_two_columns() -> None:
    made = Grid((Column("name", left=True), Column("n")))
    made.add("層層", "1")
    made.add("abcd", "2")
    assert made.laid(None).lines[1:] == ("層層  1", "abcd  2")
    assert len(made) == 2
