"""What a value is known by."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest

from onnx_lowrank.data.samples import Lazy
from onnx_lowrank.numerics.contents import content_of


@dataclass(frozen=True, eq=False)
class Pair:
    first: object
    second: object


@dataclass(frozen=True, eq=False)
class Other:
    first: object
    second: object


def test_equal_contents_have_one_digest() -> None:
    ones = np.ones((3, 4), np.float32)
    for value, again in (
        (ones, ones.copy()),
        (ones.T, np.ones((4, 3), np.float32, order="F")),
        (ones[:, :2], np.ones((3, 2), np.float32)),
        (Pair(1, {"a": ones}), Pair(1, {"a": ones.copy()})),
        ([1, 2], Lazy(2, lambda index: index + 1)),
        (frozenset({"a", "b"}), frozenset({"b", "a"})),
        (np.ones(3, ml_dtypes.bfloat16), np.ones(3, ml_dtypes.bfloat16)),
        (np.array(["a", "b"], object), np.array(["a", "b"], object)),
    ):
        assert content_of(value) == content_of(again)


def test_other_contents_have_another_one() -> None:
    ones = np.ones((3, 4), np.float32)
    values = [
        *(None, 0, 0.0, -0.0, False, "0", "", b"", [], {}, [0], [[0]], [0, 0], {"a": 0}, {"b": 0}),
        *(
            ones,
            ones.reshape(4, 3),
            ones.astype(float),
            np.asfortranarray(ones),
            2 * ones,
            ones[:2],
        ),
        *(Pair(1, 2), Pair(2, 1), Other(1, 2), np.float32(1), np.float64(1), np.zeros(1, np.int32)),
        *(np.zeros(1, np.float32), np.zeros(2, np.float16), np.array(["a", "b"], object)),
        *(np.array(["ab", ""], object), np.zeros(1, ml_dtypes.bfloat16), frozenset({"a"})),
    ]
    found = [content_of(value) for value in values]
    assert len(set(found)) == len(values)
    assert content_of("a", "b") != content_of("ab") != content_of(["a", "b"])


def test_what_has_no_content() -> None:
    with pytest.raises(TypeError, match="expected numbers, texts, arrays"):
        content_of(object())
