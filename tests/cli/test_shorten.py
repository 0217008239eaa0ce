"""Names and texts in a few columns."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from onnx_lowrank.cli.shorten import GAP, cut_names, cut_text, wrapped
from onnx_lowrank.phrases import printable

PARTS = ("attention/self/query", "attention/self/key", "attention/output/dense", "output/dense")
LAYERS = [f"/encoder/layer.{i}/{part}/MatMul" for i in range(12) for part in PARTS]


def test_names_that_fit_stay() -> None:
    assert cut_names(["a", "bc"], 2) == ["a", "bc"]
    assert cut_names([], 5) == []


def test_words_that_all_names_have_go_first() -> None:
    found = cut_names(LAYERS, 26)
    assert found[:2] == ["…0/attention/self/query…", "…0/attention/self/key…"]
    assert found[-1] == "…11/output/dense…"


@pytest.mark.parametrize("width", [14, 16, 20, 24, 30])
def test_names_that_differ_differ_still(width: int) -> None:
    found = cut_names(LAYERS, width)
    assert len(set(found)) == len(LAYERS)
    assert max(map(cell_len, found)) <= width


def test_what_differs_in_the_middle_is_kept() -> None:
    names = [f"a_long_beginning_{n}_and_a_long_end" for n in (1, 2, 3)]
    assert len(set(cut_names(names, 21))) == 3


@given(st.lists(st.text("ab/._層", max_size=30), max_size=8, unique=True), st.integers(3, 40))
def test_no_name_is_wider_than_its_column(names: list[str], width: int) -> None:
    found = cut_names(names, width)
    assert len(found) == len(names)
    assert all(cell_len(name) <= width for name in found)


@given(st.text("ab ,…層", max_size=60), st.integers(1, 50))
def test_a_text_ends_with_a_word(text: str, width: int) -> None:
    found = cut_text(text, width)
    assert cell_len(found) <= width
    if found not in (text, ""):
        assert found.endswith(GAP)
        assert text.startswith(found.removesuffix(GAP))


def test_a_cut_text() -> None:
    assert cut_text("energy 0.95 needs rank 93, 0.92 of it", 27) == "energy 0.95 needs rank 93…"


@given(st.lists(st.text("ab/", min_size=1, max_size=30), min_size=1), st.integers(5, 40))
def test_lines_end_between_words(words: list[str], width: int) -> None:
    lines = wrapped(" ".join(words), width)
    assert [word for line in lines for word in line.split()] == words
    for line in lines:
        assert cell_len(line) <= width or len(line.split()) == 1


def test_what_moves_the_cursor_is_written_out() -> None:
    assert printable("a\tb\x1b[31m\u202ec") == r"a\tb\x1b[31m\u202ec"
    assert printable("層/ö") == "層/ö"
