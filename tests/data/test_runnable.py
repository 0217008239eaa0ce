"""Sizes that are found by trying: windows of audio, the batch of a state, sample rates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from onnx_lowrank import check, compress
from onnx_lowrank.data.declared import input_specs
from onnx_lowrank.data.index_bounds import compared_with
from onnx_lowrank.data.runnable import runnable_shapes
from onnx_lowrank.data.samples import random_samples
from onnx_lowrank.data.shapes import ConcreteShapes
from onnx_lowrank.numerics.arrays import Feed
from tests.helpers.models import parse, uniform

HEAD = '<ir_version: 8, opset_import: ["": 17]>'

# As recurrent voice detectors are exported: no size is declared, and the rate chooses a branch.
DETECTOR = f"""{HEAD}
g (float[A, B] input, float[2, C, 16] state, int64 sr)
=> (float[D, E] output, float[S, T, U] stateN)
{{
    rate = Constant<value = int64 {{16000}}>()
    fast = Equal(sr, rate)
    output = If (fast) <
        then_branch = a () => (float[N, M] p)
        {{ one = Constant<value = int64[1] {{1}}>() x3 = Unsqueeze(input, one)
           f = Conv<strides = [128]>(x3, F) m = ReduceMean<axes = [2], keepdims = 0>(f)
           h0 = Constant<value = int64 {{0}}>() s = Gather(state, h0) t = Add(m, s)
           p = MatMul(t, W) }},
        else_branch = b () => (float[N, M] q)
        {{ size = Constant<value = int64[2] {{1, 4}}>() q = ConstantOfShape(size) }}
    >
    stateN = Tanh(state)
}}"""


def detector() -> ir.Model:
    rng = np.random.default_rng(0)
    weights = {"F": uniform((16, 1, 256), rng), "W": uniform((16, 4), rng)}
    model = ir.from_proto(parse(DETECTOR, weights))
    for value in model.graph.inputs:  # exporters leave the sizes without a name
        if value.shape is not None:
            value.shape = ir.Shape([d if isinstance(d, int) else None for d in value.shape])
    return model


def test_a_voice_detector_is_checked_without_data() -> None:
    """The filter is 256 long, the state is of one stream, and the rate is 16000."""
    report = compress(detector(), ops=["all"], rank=2, min_gain=-1, bench=False).report
    assert report.check is not None
    notes = "\n".join(report.notes)
    assert "input: [1, 512] (assumed axis 0=1, axis 1=512" in notes
    assert "state: [2, 1, 16] (assumed axis 1=1" in notes
    assert "does not run on input [1, 64], state [2, 64, 16]: other sizes were tried" in notes
    assert "sr always 16000" in notes


def test_check_finds_the_same() -> None:
    found = check(detector(), detector())
    assert not found.errors
    assert any("input: [1, 512]" in note for note in found.notes)


def found(model: ir.Model, runs: Any, **options: Any) -> ConcreteShapes:
    specs = input_specs(model)
    return runnable_shapes(runs, model, specs, {}, {}, **{"lengths": True, **options})


def test_what_was_found_nowhere_is_said() -> None:
    tried: list[tuple[int, ...]] = []

    def runs(feed: Feed) -> bool:
        tried.append((*feed["input"].shape, *feed["state"].shape))
        return False

    shapes = found(detector(), runs)
    assert shapes.shapes["input"] == (1, 64)
    assert len(set(tried)) == len(tried)
    assert (1, 512, 2, 1, 16) in tried
    (note,) = [note for note in shapes.notes if "no sizes were found" in note]
    assert f"{len(tried)} were tried" in note
    assert "input_shapes=…" in note


def test_a_crash_ends_the_trials() -> None:
    """Each may take minutes: a process that dies or hangs is not started for every size."""
    answers = [False, False, None]
    shapes = found(detector(), lambda _: answers.pop(0))
    assert not answers
    assert any("no sizes were found with which the model runs, 3 were" in n for n in shapes.notes)


def test_sizes_of_the_users_and_of_samples_are_not_tried() -> None:
    model = detector()
    specs = input_specs(model)
    given: dict[str, tuple[int, ...]] = {"input": (1, 300), "state": (2, 1, 16)}

    def never(_: Feed) -> bool:
        pytest.fail("tried")

    assert runnable_shapes(never, model, specs, given, {}, lengths=True).shapes["input"] == (1, 300)
    assert found(model, never, lengths=False).shapes["input"] == (1, 64)


@pytest.mark.parametrize(
    ("body", "weight", "size"),
    [
        ("y = MatMul(x, W)", (40, 8), 40),
        ("a = Tanh(x) y = MatMul(a, W)", (72, 8), 72),
        ("y = Gemm(x, W)", (24, 8), 24),
        ("y = Gemm<transB=1>(x, W)", (8, 24), 24),
    ],
)
def test_the_side_of_the_weight_is_the_size(
    body: str, weight: tuple[int, ...], size: int, tmp_path: Path
) -> None:
    """An exporter that leaves the number of features open."""
    text = f"{HEAD} g (float[N, features] x) => (float[N, 8] y) {{ {body} }}"
    proto = parse(text, {"W": uniform(weight, np.random.default_rng(0))})
    report = compress(proto, rank=4, min_gain=-1, bench=False, simplify=False).report
    assert report.check is not None
    assert any(f"x: [1, {size}] (assumed" in note for note in report.notes)


def test_a_number_is_compared_through_casts() -> None:
    text = f"""{HEAD} g (int64 a, int64[N] b, int64[1] c) => (bool[M] y, bool z, bool w) {{
        k = Constant<value = int32 {{8000}}>() i = Cast<to = 6>(a) p = Equal(i, k)
        l = Constant<value = int64 {{16000}}>() w = Equal(l, a)
        z = Identity(p) n = Constant<value = int64 {{3}}>() y = Equal(b, n) }}"""
    model = ir.from_proto(parse(text))
    assert set(compared_with(model.graph.inputs[0])) == {8000, 16000}
    specs = input_specs(model)
    shapes = found(model, lambda _: True)
    samples = random_samples(model, specs, shapes, count=20, seed=0)
    assert {int(feed["a"]) for feed in samples.feeds} == {8000, 16000}
    assert {int(n) for feed in samples.feeds for n in feed["b"]} == {0, 1}  # several: no rate
    assert samples.notes[0].count("a always 8000 or 16000") == 1
