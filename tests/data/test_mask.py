"""Which input of a sample is a mask of its padding."""

from __future__ import annotations

from typing import Any

import numpy as np

from onnx_lowrank.data.mask import find_mask
from onnx_lowrank.numerics.arrays import Feed


def fed(**arrays: Any) -> Feed:
    return {name: np.asarray(array) for name, array in arrays.items()}


def test_a_mask_is_found_by_name_and_shape() -> None:
    ids, ones = np.zeros((2, 3), np.int64), np.ones((2, 3))
    assert find_mask(fed(ids=ids, attention_mask=ones.astype(np.int64))) == "attention_mask"
    assert find_mask(fed(ids=ids, mask=ones.astype(np.float32))) == "mask"
    assert find_mask(fed(ids=ids, input_mask=ones.astype(bool))) == "input_mask"
    assert find_mask(fed(ids=ids, attention_mask=ones * -1e4)) is None  # added to the scores
    assert find_mask(fed(ids=ids, attention_mask=np.ones((2, 4)))) is None
    assert find_mask(fed(ids=ids, attention_mask=np.ones((2, 1, 1, 3)))) is None
    assert find_mask(fed(attention_mask=ones)) is None
    assert find_mask(fed(ids=ids, weights=ones)) is None


def test_ones_that_mark_padding_are_no_mask_of_rows() -> None:
    ids, none = np.zeros((2, 3), np.int64), np.zeros((2, 3), bool)
    late = np.array([[False, False, False], [False, False, True]])
    for name in ("padding_mask", "mask"):
        assert find_mask(fed(ids=ids, **{name: none})) is None
        assert find_mask(fed(ids=ids, **{name: late})) is None
        assert find_mask(fed(ids=ids, **{name: ~late})) == name
    assert find_mask(fed(ids=ids, attention_mask=late[:, ::-1])) == "attention_mask"  # at the left
