"""Samples in one run, without the padding at their end."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from onnx_lowrank.data.joining import APART, Joining
from onnx_lowrank.numerics.arrays import Array

Feed = dict[str, Array]

CUTTING = Joining(3, "mask", {"mask": 1, "x": 1})


def text(length: int, whole: int = 8, rows: int = 1) -> Feed:
    mask = np.broadcast_to(np.arange(whole) < length, (rows, whole)).astype(np.int64)
    x = np.arange(rows * whole * 2, dtype=np.float32).reshape(rows, whole, 2)
    return {"x": x, "mask": mask, "scale": np.ones((1, 4), np.float32)}


def test_one_by_one_as_they_are() -> None:
    feeds = [text(3), text(8)]
    assert APART.runs(feeds) == [(0,), (1,)]
    assert APART.joined(feeds[:1]) is feeds[0]
    assert APART.shortened(feeds) is feeds


def test_padding_at_the_end_is_cut_off_where_the_names_say_so() -> None:
    short = CUTTING.short(text(3))
    assert {name: array.shape for name, array in short.items()} == {
        "x": (1, 3, 2),
        "mask": (1, 3),
        "scale": (1, 4),
    }
    np.testing.assert_array_equal(short["x"], text(3)["x"][:, :3])


def test_padding_before_and_between_stays() -> None:
    feed = text(8) | {"mask": np.array([[0, 1, 0, 1, 0, 0, 0, 0]])}
    assert CUTTING.short(feed)["mask"].tolist() == [[0, 1, 0, 1]]


@pytest.mark.parametrize("length", [0, 8])
def test_something_is_left_and_nothing_is_added(length: int) -> None:
    assert CUTTING.short(text(length))["x"].shape == (1, max(length, 1), 2)


def test_lengths_that_something_else_has_are_avoided() -> None:
    avoiding = Joining(3, "mask", {"mask": 1, "x": 1}, frozenset({3, 4, 7, 8}))
    assert [avoiding.length(text(n)) for n in (2, 3, 5, 7)] == [2, 5, 5, 8]


def test_samples_of_about_one_length_run_together() -> None:
    feeds = [text(n) for n in (8, 2, 7, 1, 3, 6, 2)]
    assert CUTTING.runs(feeds) == [(3, 1, 6), (4, 5, 2), (0,)]
    joined = CUTTING.joined([feeds[place] for place in (4, 5, 2)])
    assert joined["x"].shape == (3, 7, 2)
    assert joined["mask"].sum(axis=1).tolist() == [3, 6, 7]


def test_other_shapes_and_whole_batches_run_apart() -> None:
    plain = Joining(4)
    feeds = [text(3), text(3, 6), text(3), text(3, rows=2), text(3, rows=2)]
    assert plain.runs(feeds) == [(0, 2), (1,), (3,), (4,)]


def parts(rows: Sequence[int]) -> Feed:
    return {"y": np.arange(24.0).reshape(2, 4, 3)[list(rows)], "pooled": np.eye(2)[list(rows)]}


def test_what_one_sample_has_of_a_run() -> None:
    like = {"y": np.zeros((1, 2, 3)), "pooled": np.zeros((1, 2))}
    own = APART.of(parts([0, 1]), 1, like)
    np.testing.assert_array_equal(own["y"], parts([1])["y"][:, :2])
    np.testing.assert_array_equal(own["pooled"], parts([1])["pooled"])
