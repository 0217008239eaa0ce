"""Which samples are summed together, and how messages call them."""

from __future__ import annotations

import numpy as np

from onnx_lowrank.fitting.parts import parts_of
from onnx_lowrank.numerics.arrays import Feed


def feeds(count: int, first: int = 0) -> list[Feed]:
    return [{"x": np.array(first + number)} for number in range(count)]


def test_every_sample_is_in_one_part_of_its_kind() -> None:
    parts = parts_of(feeds(200), feeds(3, 1000), aside=[0, 7, 199])
    assert [part.kind for part in parts] == ["fit"] * 8 + ["aside", "held"]
    for kind, wanted in (
        ("fit", sorted({*range(200)} - {0, 7, 199})),
        ("aside", [0, 7, 199]),
        ("held", [1000, 1001, 1002]),
    ):
        own = [part for part in parts if part.kind == kind]
        assert [int(feed["x"]) for part in own for feed in part.feeds] == wanted
        assert [n + 1000 * (kind == "held") for part in own for n in part.numbers] == wanted


def test_few_samples_are_one_part_and_none_are_none() -> None:
    assert [len(part.feeds) for part in parts_of(feeds(16), ())] == [16]
    assert parts_of((), ()) == ()


def test_samples_are_called_by_their_numbers() -> None:
    fit, aside, held = parts_of(feeds(6), feeds(2), aside=[1, 4])
    assert fit.where([1]) == "sample 2 of those to fit to"
    assert fit.where([3, 0]) == "samples 0–5 of those to fit to"
    assert aside.where([1]) == "sample 4 of those to fit to"
    assert held.where([0]) == "held-out sample 0"
