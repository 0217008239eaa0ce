"""Damage of samples that run together, and of those that run apart."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from onnx_lowrank.data.joining import APART, Joining
from onnx_lowrank.evaluation.reading import reading_of
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.maps.find import Group, find
from onnx_lowrank.maps.forms import all_forms, chosen_forms
from onnx_lowrank.numerics.arrays import Array, Feed
from onnx_lowrank.ranks.probe import Probe
from onnx_lowrank.runtime.memory import Memory
from onnx_lowrank.runtime.taps import Runner
from tests.helpers.models import parse, run_ort, uniform

HEAD = '<ir_version: 8, opset_import: ["": 17]>'
TEXTS = "float[B, T, 6] x, int64[B, T] mask"
APPLIED = "whole = Cast<to = 1>(mask) c = Unsqueeze(whole, two)"
MODELS = {
    "tokens": f"{HEAD} g ({TEXTS}) => (float[B, T, 5] y) {{ y = MatMul(x, W) }}",
    "pooled": f"{HEAD} g ({TEXTS}) => (float[B, 5] y) {{"
    f"{APPLIED} h = MatMul(x, W) k = Mul(h, c) y = ReduceSum<keepdims = 0>(k, one) }}",
    # What is compared in place of the class has the samples in front as well.
    "class": f"{HEAD} g ({TEXTS}) => (int64[B] y) {{"
    f"{APPLIED} h = MatMul(x, W) k = Mul(h, c) s = ReduceSum<keepdims = 0>(k, one)"
    "y = ArgMax<axis = 1, keepdims = 0>(s) }",
}
TOGETHER = Joining(3, "mask", {"x": 1, "mask": 1})


def texts(rng: np.random.Generator, count: int, whole: int = 9) -> list[Feed]:
    lengths = rng.integers(1, whole, count)
    return [
        {"x": uniform((1, whole, 6), rng), "mask": (np.arange(whole) < own)[None].astype(np.int64)}
        for own in lengths
    ]


def probe_of(
    text: str, weight: Array, feeds: Sequence[Feed], joining: Joining, runs: list[Array]
) -> tuple[Probe, Group]:
    proto = parse(text, {"W": weight, "one": np.array([1]), "two": np.array([2])})
    model = ir.from_proto(proto)
    (group,) = find(model, Constants(model, False), all_forms(), chosen_forms(None)).groups

    def opened(copy: ir.Model) -> Runner:
        made = ir.to_proto(copy)
        names = {value.name for value in made.graph.input}

        def run(feed: Feed) -> Feed:
            runs.append(feed["x"])
            return run_ort(made, {name: feed[name] for name in names})

        return run

    reading = reading_of(model, "mask" if "mask" in feeds[0] else None)
    return Probe(model, [group], feeds, opened, reading, joining=joining), group


@pytest.mark.parametrize("name", MODELS)
def test_damage_is_that_of_samples_one_by_one(name: str, rng: np.random.Generator) -> None:
    feeds, weight = texts(rng, 8), uniform((6, 5), rng)
    other = {"W": weight + 0.1 * uniform((6, 5), rng)}
    found = []
    for joining in (APART, TOGETHER):
        runs: list[Array] = []
        probe, _ = probe_of(MODELS[name], weight, feeds, joining, runs)
        begun = len(runs)
        found.append((list(probe.damages(other, range(8))), len(runs) - begun))
        outputs = [own["y"].shape for own in probe.outputs(other)]
        assert outputs == [own["y"].shape for own in probe.reference]  # whole, as metrics read them
        assert name != "tokens" or outputs == [(1, 9, 5)] * 8
    (alone, one_by_one), (joined, fewer) = found
    assert (one_by_one, fewer) == (8, 3)
    assert all(alone)
    np.testing.assert_allclose(np.array(joined, float), np.array(alone, float), rtol=1e-4, atol=0)


def test_where_samples_change_each_other_they_run_apart(rng: np.random.Generator) -> None:
    """What the model gives may be told apart where a value before it is not."""
    text = f"""{HEAD} g (float[B, 6] x) => (int64[B] y) {{
        h = MatMul(x, W) m = ReduceMax<keepdims = 0>(h) s = Div(h, m)
        y = ArgMax<axis = 1, keepdims = 0>(s) }}"""
    feeds = [{"x": uniform((1, 6), rng)} for _ in range(6)]
    weight, runs = uniform((6, 5), rng), list[Array]()
    probe, _ = probe_of(text, weight, feeds, replace(APART, size=3), runs)
    begun = len(runs)
    probe.damages({"W": weight * 1.5}, range(6))
    assert [x.shape[0] for x in runs[begun:]] == [1] * 6


def test_a_probe_serves_those_who_ask_the_same_of_it(rng: np.random.Generator) -> None:
    feeds, weight = texts(rng, 3), uniform((6, 5), rng)
    probe, group = probe_of(MODELS["tokens"], weight, feeds, APART, [])
    reading = reading_of(probe.model, "mask")
    again = [{name: array.copy() for name, array in feed.items()} for feed in feeds]
    assert probe.serves(probe.model, [group], again, reading)
    assert probe.serves(probe.model, [], feeds, reading)
    assert not probe.serves(probe.model.clone(), [group], feeds, reading)
    assert not probe.serves(probe.model, [group], feeds[:2], reading)
    assert not probe.serves(probe.model, [group], [*feeds[:2], feeds[0]], reading)
    assert not probe.serves(probe.model, [group], feeds, reading, by_classes=True)
    other, foreign = probe_of(MODELS["tokens"], weight, feeds, APART, [])
    assert not probe.serves(probe.model, [foreign], feeds, reading)
    narrow = Probe(other.model, (), feeds, other.open_model, reading)
    assert not narrow.serves(other.model, [foreign], feeds, reading)


@pytest.mark.parametrize(("limit", "again"), [(1 << 40, False), (1, True)])
def test_weights_are_read_once_where_memory_allows(
    limit: int, again: bool, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = list[str]()
    elements = ir.TensorProtoTensor.numpy

    def noted(self: ir.TensorProtoTensor) -> Array:
        read.append(self.name or "")
        return elements(self)

    monkeypatch.setattr(ir.TensorProtoTensor, "numpy", noted)
    model = ir.from_proto(
        parse(
            '<ir_version: 8, opset_import: ["": 17]> g (float[N, 6] x) => (float[N, 4] y)'
            "{ y = MatMul(x, W) }",
            {"W": uniform((6, 4), rng)},
        )
    )
    groups = find(model, Constants(model, False), all_forms(), chosen_forms(("all",))).groups

    def opened(copy: ir.Model) -> Runner:
        return functools.partial(run_ort, ir.to_proto(copy))

    feeds = [{"x": uniform((3, 6), rng)} for _ in range(2)]
    probe = Probe(model, groups, feeds, opened, memory=Memory(limit, given=True))
    assert "W" in read
    read.clear()
    assert probe.damage({}) == 0.0
    assert probe.damage({"W": np.zeros((6, 4), np.float32)}) == 1.0
    assert ("W" in read) is again
