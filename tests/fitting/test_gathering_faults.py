"""Masks and activations that the moments cannot take."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnx_lowrank import InputError
from tests.helpers.calibrated import HEAD, gathered, narrow, texts
from tests.helpers.models import (
    factored,
    parse,
    uniform,
)


def test_wrong_masks(shared: onnx.ModelProto, rng: np.random.Generator) -> None:
    feeds = texts(rng, 3)
    with pytest.raises(InputError, match=r"mask='maks': expected one of .*attention_mask"):
        gathered(shared, feeds, mask="maks")
    empty = [{**feed, "attention_mask": 0 * feed["attention_mask"]} for feed in feeds]
    with pytest.raises(InputError, match="'attention_mask': masks all rows of all 3 samples"):
        gathered(shared, empty, mask="attention_mask")
    gathered(shared, [feeds[0], *empty[1:]], mask="attention_mask")
    shared.graph.input.append(onnx.helper.make_tensor_value_info("s", 1, [7]))
    more = [{**feed, "s": np.ones(7, np.float32)} for feed in feeds]
    with pytest.raises(InputError, match=r"mask='s': its shape \[7\] fits no activation"):
        gathered(shared, more, mask="s")


def test_a_mask_that_was_only_found_may_fit_nothing(
    linear: onnx.ModelProto, rng: np.random.Generator
) -> None:
    linear.graph.node[0].input[0] = "turned"
    turn = onnx.helper.make_node("Transpose", ["x"], ["turned"], perm=[1, 0])
    linear.graph.node.insert(0, turn)
    feeds = [
        {"x": feed["x"].T.copy(), "mask": np.ones((32, 40), np.int64)} for feed in narrow(rng, 4)
    ]
    del linear.graph.input[:]
    for name, kind in (("x", 1), ("mask", 7)):
        linear.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, [32, 40]))
    factored(linear, rank=3, calibration=feeds)
    with pytest.raises(InputError, match="fits no activation"):
        factored(linear, rank=3, calibration=feeds, mask="mask")


def test_nan_names_the_layer_and_the_sample(
    shared: onnx.ModelProto, rng: np.random.Generator
) -> None:
    feeds = texts(rng, 3)
    shared.graph.node[1].name = "query"
    bad = [feeds[0], {**feeds[1], "x": feeds[1]["x"] * np.nan}]
    with pytest.raises(InputError, match="the input of 'query' holds NaN or Inf in sample 1"):
        gathered(shared, bad)
    with pytest.raises(InputError, match="'query' holds NaN or Inf in held-out sample 1"):
        gathered(shared, feeds, held=bad)


def test_few_rows_are_said(shared: onnx.ModelProto, rng: np.random.Generator) -> None:
    feed = {"x": uniform((1, 3, 6), rng), "attention_mask": np.ones((1, 3), np.int64)}
    statistics, _, _ = gathered(shared, [feed])
    assert any("fewer rows than columns" in note for note in statistics.notes)
    assert not gathered(shared, texts(rng, 20))[0].notes


BRANCHES = f"""{HEAD} g (float[N, 8] x, bool flag) => (float[N, 8] y) {{
    h = MatMul(x, W)
    y = If(flag) <
        then_branch = a () => (float[N, 8] t) {{ t = MatMul(h, Wt) }},
        else_branch = b () => (float[N, 8] e) {{ e = Identity(h) }}
    >
}}"""


def test_a_layer_in_a_branch_falls_back(rng: np.random.Generator) -> None:
    proto = parse(BRANCHES, {"W": uniform((8, 8), rng), "Wt": uniform((8, 8), rng)})
    feeds = [{"x": uniform((9, 8), rng), "flag": np.array(False)} for _ in range(8)]
    result = factored(proto, rank=2, rank_multiple=1, calibration=feeds)
    made = result.report.calibration
    assert made is not None
    assert made.layers == 1
    assert list(made.missing.values()) == ["its activation is inside a subgraph or function"]
    assert any("fitted to the weight alone" in note for note in result.report.notes)
    assert all(layer.status == "factored" for layer in result.report.layers)


def test_a_layer_that_no_sample_reaches_falls_back(rng: np.random.Generator) -> None:
    proto = parse(
        f"""{HEAD} g (float[N, 8] x) => (float[K, 8] y) {{
            zero = Constant<value = float {{0.0}}>()
            sums = ReduceSum<keepdims=0>(x, axis)
            taken = Greater(sums, zero)
            rows = Compress<axis=0>(x, taken)
            y = MatMul(rows, W)
        }}""",
        {"W": uniform((8, 8), rng), "axis": np.array([1])},
    )
    feeds = [{"x": -np.ones((3, 8), np.float32)} for _ in range(4)]
    result = factored(proto, rank=2, calibration=feeds)
    assert result.report.calibration is not None
    assert list(result.report.calibration.missing.values()) == ["no sample reaches it"]
