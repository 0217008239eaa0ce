"""Models that give the same for several samples at once, and without padding; and others."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_lowrank.data.joining import APART, Joining
from onnx_lowrank.errors import InputError
from onnx_lowrank.evaluation.joinable import joinable
from onnx_lowrank.evaluation.reading import reading_of
from onnx_lowrank.numerics.arrays import Feed
from tests.helpers.models import parse, run_ort, uniform

HEAD = '<ir_version: 8, opset_import: ["": 17]>'
# Attention over the tokens that count, and their mean: nothing of it sees padding.
MASKED = """
    h = MatMul(x, W)
    whole = Cast<to = 1>(mask)
    row = Unsqueeze(whole, one)
    column = Unsqueeze(whole, two)
    turned = Transpose<perm = [0, 2, 1]>(h)
    scores = MatMul(h, turned)
    less = Sub(row, unit)
    far = Mul(less, huge)
    masked = Add(scores, far)
    shares = Softmax<axis = 2>(masked)
    y = MatMul(shares, h)
    counted = Mul(y, column)
    sum = ReduceSum<keepdims = 0>(counted, one)
    count = ReduceSum<keepdims = 1>(whole, one)
    pooled = Div(sum, count)
"""
INPUTS = "float[B, T, 6] x, int64[B, T] mask"
OUTPUTS = "float[B, T, 5] y, float[B, 5] pooled"
CONSTANTS: Feed = {
    "one": np.array([1]),
    "two": np.array([2]),
    "unit": np.array(1, np.float32),
    "huge": np.array(1e9, np.float32),
}


def model(rng: np.random.Generator, body: str, inputs: str, outputs: str) -> onnx.ModelProto:
    return parse(
        f"{HEAD} g ({inputs}) => ({outputs}) {{ {body} }}",
        {"W": uniform((6, 5), rng), **CONSTANTS},
    )


def texts(rng: np.random.Generator, lengths: tuple[int, ...] = (3, 11, 16, 9)) -> list[Feed]:
    return [
        {
            "x": uniform((1, 16, 6), rng),
            "mask": (np.arange(16) < length).astype(np.int64)[None],
        }
        for length in lengths
    ]


def found(
    proto: onnx.ModelProto,
    feeds: Sequence[Feed],
    mask: str | None = "mask",
    most: Callable[[], int] = lambda: 8,
) -> Joining:
    own = ir.from_proto(proto)
    names = {value.name for value in proto.graph.input}

    def run(feed: Feed) -> Feed:
        return run_ort(proto, {name: array for name, array in feed.items() if name in names})

    return joinable(own, feeds, reading_of(own, mask), run, most)


def test_texts_run_together_without_their_padding(rng: np.random.Generator) -> None:
    own = found(model(rng, MASKED, INPUTS, OUTPUTS), texts(rng))
    assert (own.size, own.mask, own.axes) == (8, "mask", {"x": 1, "mask": 1})
    assert own.avoided == {5, 16}  # what a mask of that length would fit as well


def test_without_padding_nothing_is_cut(rng: np.random.Generator) -> None:
    own = found(model(rng, MASKED, INPUTS, OUTPUTS), texts(rng, (16, 16, 16)))
    assert (own.size, own.cuts) == (8, False)


def test_memory_says_how_many(rng: np.random.Generator) -> None:
    proto, feeds = model(rng, MASKED, INPUTS, OUTPUTS), texts(rng)
    own = found(proto, feeds, most=lambda: 1)
    assert (own.size, own.cuts) == (1, True)


# What reads padding, or has sizes that say something else.
READS_PADDING = {
    "a mean over all tokens": (
        "h = MatMul(x, W) pooled = ReduceMean<axes = [1], keepdims = 0>(h)",
        INPUTS,
        "float[B, 5] pooled",
    ),
    "a length that is given out": (
        f"{MASKED} shape = Shape(mask) length = Gather(shape, one)",
        INPUTS,
        f"{OUTPUTS}, int64[K] length",
    ),
    "a size that is fixed": (MASKED, "float[B, 16, 6] x, int64[B, 16] mask", OUTPUTS),
    "a size without a name": (MASKED, "float[B, ?, 6] x, int64[B, ?] mask", OUTPUTS),
}


@pytest.mark.parametrize("case", READS_PADDING)
def test_padding_stays_where_it_is_read(case: str, rng: np.random.Generator) -> None:
    body, inputs, outputs = READS_PADDING[case]
    assert not found(model(rng, body, inputs, outputs), texts(rng)).cuts


# What one sample changes of another's outputs, or what has no axis of samples.
MIXES = {
    "a mean over samples": "h = MatMul(x, W) m = ReduceMean<axes = [0]>(h) y = Sub(h, m)",
    "a largest number of all": ("h = MatMul(x, W) m = ReduceMax<keepdims = 0>(h) y = Div(h, m)"),
    "a step of all": (
        "q, s, z = DynamicQuantizeLinear(x) d = DequantizeLinear(q, s, z) y = MatMul(d, W)"
    ),
    "a flat output": "h = MatMul(x, W) y = Reshape(h, flat)",
}


@pytest.mark.parametrize("case", MIXES)
def test_samples_that_change_each_other_run_apart(case: str, rng: np.random.Generator) -> None:
    proto = parse(
        f"{HEAD} g (float[B, 16, 6] x) => (float[K] y) {{ {MIXES[case]} }}",
        {"W": uniform((6, 5), rng), "flat": np.array([-1, 5])},
    )
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    feeds = [{"x": feed["x"] * scale} for feed, scale in zip(texts(rng), range(1, 5), strict=True)]
    assert found(proto, feeds, mask=None) == APART


def test_equal_samples_tell_nothing(rng: np.random.Generator) -> None:
    proto = model(rng, MIXES["a largest number of all"], "float[B, 16, 6] x", "float[B, 16, 5] y")
    (feed,) = texts(rng, (16,))
    assert found(proto, [{"x": feed["x"]}] * 4, mask=None) == APART


def test_a_batch_of_a_fixed_size_stays(rng: np.random.Generator) -> None:
    proto = model(rng, "y = MatMul(x, W)", "float[1, 16, 6] x", "float[1, 16, 5] y")
    feeds = [{"x": feed["x"]} for feed in texts(rng)]
    assert found(proto, feeds, mask=None) == APART


def test_a_model_that_does_not_run_so_is_left_alone(rng: np.random.Generator) -> None:
    own = ir.from_proto(model(rng, MASKED, INPUTS, OUTPUTS))

    def refuses(feed: Feed) -> Feed:
        raise InputError("no")

    assert joinable(own, texts(rng), reading_of(own, "mask"), refuses, lambda: 8) == APART
