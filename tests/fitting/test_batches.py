"""Batches: targets of losses, and how many samples go into a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from onnx_lowrank.fitting import batches
from onnx_lowrank.fitting.batches import Batches, batch_size
from onnx_lowrank.numerics.arrays import Array, Feed
from onnx_lowrank.runtime import kept
from onnx_lowrank.runtime.kept import Kept
from onnx_lowrank.runtime.memory import Memory
from onnx_lowrank.runtime.shelf import Shelf
from tests.helpers.decoder import WORDS, decoder_feeds, decoder_model
from tests.helpers.models import run_ort


def opened(model: ir.Model) -> Callable[[Feed], Feed]:
    proto = ir.to_proto(model)
    names = {value.name for value in proto.graph.input}
    return lambda feed: run_ort(proto, {k: v for k, v in feed.items() if k in names})


@pytest.mark.parametrize("classes", [("logits",), ()], ids=["kl", "relative"])
def test_wide_targets_are_made_again(
    classes: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, feeds = ir.from_proto(decoder_model()), decoder_feeds(3, 6)
    values, mask = ("logits", "layer0/out"), "attention_mask"

    class Noted(Shelf):
        """Knows how wide what waits is."""

        def __init__(self) -> None:
            super().__init__()
            self.widths: list[int] = []

        def put(self, array: Array) -> Any:
            self.widths.append(array.shape[-1])
            return super().put(array)

    shelves = Noted(), Noted()

    def made(shelf: Shelf) -> Batches:
        original = Kept(model, values, opened)
        return Batches(feeds, mask, values, original, shelf=shelf, by_classes=classes)

    plain = made(shelves[0])
    monkeypatch.setattr(kept, "WIDE", 64)
    monkeypatch.setattr(kept, "TIMES", 2)
    again = made(shelves[1])
    for index in range(len(feeds)):
        for _ in range(2):  # computed, and known
            expected, found = plain.inputs(index), again.inputs(index)
            assert expected.keys() == found.keys()
            for name, array in expected.items():
                np.testing.assert_array_equal(found[name], array)
        for value in values:
            assert plain.energy(index, value) == again.energy(index, value)
    assert [WORDS in shelf.widths for shelf in shelves] == [True, False]


def test_a_batch_of_long_samples_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "ELEMENTS", 1000)
    sizes = {}
    for elements in (10, 200, 300, 5000):
        targets = {"y/target": np.zeros(elements, np.float32), "y/weight": np.ones(1, np.float32)}
        trained = {"w": np.zeros(4000, np.float32)}  # is there once, whatever the batch
        sizes[elements] = batch_size(lambda feed: feed, targets, 16, Memory(), trained)
    assert sizes == {10: 16, 200: 5, 300: 3, 5000: 1}
