"""Caches of decoders: what of a mask is a step's, and what the outputs of a cache count."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnx_lowrank.data.cache import cache_outputs, new_tokens, output_shares
from onnx_lowrank.data.mask import find_mask, kept_rows
from onnx_lowrank.numerics.arrays import Array, Feed
from tests.helpers.decoder import decoder_feeds, decoder_model
from tests.helpers.models import parse


def test_the_cache_of_a_decoder() -> None:
    found = cache_outputs(ir.from_proto(decoder_model()))
    assert found == {f"present.{layer}.{part}" for layer in (0, 1) for part in ("key", "value")}


def test_without_a_past_nothing_is_a_cache() -> None:
    text = """<ir_version: 8, opset_import: ["": 17]>
    g (float[N, 4] x) => (float[N, 4] present) { present = Tanh(x) }"""
    assert not cache_outputs(ir.from_proto(parse(text, {})))


@pytest.mark.parametrize(("tokens", "past", "new"), [(6, 0, None), (1, 5, 1), (3, 4, 3)])
def test_the_columns_of_a_mask_that_are_new(tokens: int, past: int, new: int | None) -> None:
    (feed,) = decoder_feeds(1, tokens, past=past)
    assert new_tokens(feed, feed["attention_mask"]) == new
    assert find_mask(feed) == "attention_mask"


def test_padding_of_a_step_behind_a_cache() -> None:
    feed = dict(decoder_feeds(2, 5, past=3)[1])  # ends in two tokens of padding
    keep = kept_rows(feed, "attention_mask")
    assert keep is not None
    assert keep.tolist() == [[True, True, True, False, False]]


def test_a_mask_of_something_else_is_whole() -> None:
    mask: Array = np.ones((1, 7), np.int64)
    feed: Feed = {"past": np.zeros((1, 2, 4, 8), np.float32), "image": np.zeros((1, 5, 9))}
    assert new_tokens({**feed, "mask": mask}, mask) is None
    assert find_mask({**feed, "mask": mask}) is None


def test_all_of_a_cache_count_as_one_output() -> None:
    shares = output_shares(["logits", "a", "b", "c", "d"], {"a", "b", "c", "d"})
    assert shares["logits"] == 0.5
    assert shares["a"] == 0.125
    assert output_shares(["x", "y"], ()) == {"x": 0.5, "y": 0.5}
    assert sum(output_shares(["a", "b"], {"a", "b"}).values()) == 1.0
