"""Probe: damage by exchanged weights is what the models themselves show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from onnx_lowrank.evaluation.reading import reading_of
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.maps.find import Group, find
from onnx_lowrank.maps.forms import all_forms, chosen_forms
from onnx_lowrank.numerics.arrays import Array, Feed
from onnx_lowrank.numerics.divergence import divergences
from onnx_lowrank.ranks.damage import alone
from onnx_lowrank.ranks.probe import Probe
from onnx_lowrank.runtime import kept
from onnx_lowrank.runtime.shelf import Shelf
from tests.helpers.decoder import WORDS, decoder_feeds, decoder_model
from tests.helpers.models import run_ort


def opened(model: ir.Model) -> Callable[[Feed], Feed]:
    proto = ir.to_proto(model)
    names = {value.name for value in proto.graph.input}
    return lambda feed: run_ort(proto, {k: v for k, v in feed.items() if k in names})


def groups_of(model: ir.Model) -> tuple[Group, ...]:
    return find(model, Constants(model, False), all_forms(), chosen_forms(None)).groups


def probed(feeds: list[Feed], *, by_classes: bool) -> tuple[Probe, dict[str, Array]]:
    """A probe of the small decoder, and the weight of its first layer with noise."""
    model = ir.from_proto(decoder_model())
    groups = groups_of(model)
    reading = reading_of(model, "attention_mask")
    probe = Probe(model, groups, feeds, opened, reading, by_classes)
    name, weight = groups[0].matrix.name, groups[0].matrix.tensor.numpy()
    noise = np.random.default_rng(1).standard_normal(weight.shape).astype(np.float32)
    return probe, {name: weight + 0.05 * noise}


@pytest.mark.parametrize("wide", [True, False], ids=["logits made again", "logits kept"])
@pytest.mark.parametrize("by_classes", [True, False], ids=["kl", "relative"])
def test_damage_is_that_of_whole_outputs(
    wide: bool, by_classes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "WIDE", 64 if wide else 10_000)
    monkeypatch.setattr(kept, "TIMES", 2)
    feeds, waiting = decoder_feeds(3, 6), list[int]()
    put = Shelf.put

    def noted(shelf: Shelf, array: Array) -> Any:
        waiting.append(array.shape[-1])
        return put(shelf, array)

    monkeypatch.setattr(Shelf, "put", noted)
    probe, constants = probed(feeds, by_classes=by_classes)
    assert waiting
    assert (WORDS in waiting) != wide
    proto = decoder_model()
    changed = decoder_model()
    ((name, weight),) = constants.items()
    (stored,) = [own for own in changed.graph.initializer if own.name == name]
    stored.raw_data = weight.tobytes()
    expected = []
    for feed, reference in zip(feeds, probe.reference, strict=True):
        before, after = run_ort(proto, feed), run_ort(changed, feed)
        for output, array in before.items():
            np.testing.assert_allclose(reference[output], array, rtol=1e-5, atol=1e-6)
        keep = feed["attention_mask"].astype(bool)
        if by_classes:
            own = divergences(before["logits"][keep], after["logits"][keep]).mean()
        else:
            errors = []
            for output, array in before.items():
                a, b = array.astype("f8"), after[output].astype("f8")
                if output == "logits":
                    a, b = a[keep], b[keep]
                errors.append(((a - b) ** 2).sum() / (a**2).sum())
            own = np.mean(errors)
        expected.append(float(own))
    assert min(expected) > 0.0
    assert probe.damage(constants) == pytest.approx(np.mean(expected), rel=1e-4)


def test_the_same_weights_do_no_damage_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "WIDE", 64)
    monkeypatch.setattr(kept, "TIMES", 2)
    probe, _ = probed(decoder_feeds(2, 6), by_classes=False)
    assert probe.damage({}) == 0.0


class Counting:
    """Stands for a probe; says how many samples a damage is measured on."""

    def __init__(self, samples: int, rows: int) -> None:
        self.feeds, self.rows = (None,) * samples, rows

    def damage(self, _: dict[str, Array], most: int | None = None) -> float:
        return float(len(self.feeds) if most is None else most)


@pytest.mark.parametrize(
    ("samples", "rows", "layers", "used"),
    [
        (32, 1, 36, 12),  # one row a sample: twelve, however many layers
        (32, 1, 5000, 12),
        (5, 1, 5000, 5),  # as many as there are
        (12, 256, 210, 1),  # long samples, many layers: 30 runs for each sample
        (32, 256, 210, 4),
        (32, 4, 2000, 3),  # rows enough to set a scale
        (32, 256, 20, 12),
    ],
)
def test_all_layers_together_take_so_many_runs(
    samples: int, rows: int, layers: int, used: int
) -> None:
    probe = Counting(samples, rows)
    assert alone(probe, {}, layers, 12) == used  # type: ignore[arg-type]


def test_what_the_first_samples_do_not_show_the_others_are_asked_for() -> None:
    class Unseen(Counting):
        def damage(self, _: dict[str, Array], most: int | None = None) -> float:
            return 0.0 if most is not None else 0.5

    assert alone(Unseen(32, 256), {}, 1000, 12) == 0.5  # type: ignore[arg-type]
