"""What healing is made of: values inside that count, and coordinates in which inputs are white."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_lowrank import compress
from onnx_lowrank.autodiff.gradient import Loss, differentiable
from onnx_lowrank.fitting.batches import Batches
from onnx_lowrank.fitting.bottlenecks import bottlenecks
from onnx_lowrank.fitting.heal import HealPlan
from onnx_lowrank.fitting.whiten import whiten
from onnx_lowrank.numerics.adam import Adam
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.moments import Moments
from onnx_lowrank.numerics.whitening import Whitening
from onnx_lowrank.runtime.kept import Kept
from tests.helpers.healing import healed, opener, perceptron, samples
from tests.helpers.models import parse

BLOCKS = """
    <ir_version: 8, opset_import: ["" : 17]>
    agraph (float[N,T,8] x) => (float[N,8] y) {
        h = Tanh (x)
        a1 = MatMul (h, W1)
        b1 = Relu (a1)
        c1 = MatMul (b1, V1)
        s1 = Add (h, c1)
        n1 = Tanh (s1)
        a2 = MatMul (n1, W2)
        b2 = Relu (a2)
        c2 = MatMul (b2, V2)
        s2 = Add (n1, c2)
        n2 = Tanh (s2)
        p = ReduceMean <axes = [1], keepdims = 0> (n2)
        y = Tanh (p)
    }
"""
TRAINED = ("W1", "V1", "W2", "V2")


def blocks() -> ir.Model:
    """Two residual blocks; what is trained is their weights."""
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=(8, 8)).astype(np.float32) for name in TRAINED}
    return ir.from_proto(parse(BLOCKS, arrays))


def made(model: ir.Model) -> set[str]:
    return {value.name or "" for node in model.graph for value in node.outputs}


def found(model: ir.Model, *trained: str, most: int = 8) -> tuple[str, ...]:
    return bottlenecks(differentiable(model, trained), trained, {}, made(model), most)


def test_a_bottleneck_is_what_all_later_blocks_read() -> None:
    # Around b2 goes the stream, p is n2 pooled, and y is an output.  Around b1 goes only what
    # nothing trained has changed.
    assert found(blocks(), *TRAINED) == ("b1", "n1", "n2")


def test_nothing_before_what_is_trained_is_a_bottleneck() -> None:
    assert found(blocks(), "W2", "V2") == ("b2", "n2")
    assert found(blocks(), "V2") == ("n2",)


def test_at_most_so_many_bottlenecks() -> None:
    chain = "".join(f"h{i + 1} = MatMul (h{i}, W{i})\n" for i in range(20))
    names = [f"W{i}" for i in range(20)]
    proto = parse(
        f"""
        <ir_version: 8, opset_import: ["" : 17]>
        agraph (float[N,4] h0) => (float[N,4] h20) {{ {chain} }}
        """,
        {name: np.eye(4, dtype=np.float32) for name in names},
    )
    model = ir.from_proto(proto)
    assert found(model, *names, most=4) == ("h1", "h7", "h13", "h19")
    assert found(model, *names, most=40) == tuple(f"h{i}" for i in range(1, 20))


def test_a_value_of_the_compressed_model_alone_is_none() -> None:
    base = differentiable(blocks(), TRAINED)
    assert bottlenecks(base, TRAINED, {}, {"n2"}, 8) == ("n2",)


def moments(rows: Array) -> Moments:
    exact = rows.astype(np.float64)
    return Moments(exact.T @ exact / len(rows), exact.mean(axis=0), len(rows))


def test_white_inputs_are_white() -> None:
    rng = np.random.default_rng(1)
    mix, _ = np.linalg.qr(rng.normal(size=(64, 64)))
    scales = np.where(np.arange(64) < 6, 30.0, 1.0)  # a few directions that outgrow the others
    rows = (rng.normal(size=(4000, 64)) * scales) @ mix
    whitening = Whitening.of(moments(rows))
    assert whitening is not None
    assert whitening.basis.shape == (64, 8)
    raw = np.linalg.eigvalsh(moments(rows).second)
    white = np.linalg.eigvalsh(moments(whitening.applied(rows.T, -0.5).T).second)
    assert raw[-1] / raw[0] > 500
    assert white[-1] / white[0] < 20
    there_and_back = whitening.applied(whitening.applied(rows.T, -0.5), 0.5).T
    np.testing.assert_allclose(there_and_back, rows, rtol=1e-3, atol=1e-3)
    square = whitening.applied(whitening.applied(np.eye(64), 0.5), 0.5)
    np.testing.assert_allclose(whitening.applied(np.eye(64), 1.0), square, rtol=1e-3, atol=1e-3)


def test_zeros_are_not_whitened() -> None:
    assert Whitening.of(moments(np.zeros((5, 3)))) is None


def gemms() -> onnx.ModelProto:
    """A product, a transposed Gemm, and one that both outputs read."""
    rng = np.random.default_rng(2)
    return parse(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        agraph (float[N,6] x) => (float[N,5] y, float[N,5] z) {
            h = MatMul (x, A)
            g = Gemm <transB = 1> (h, B, b)
            r = Tanh (g)
            y = MatMul (r, S)
            z = MatMul (g, S)
        }
        """,
        {
            "A": rng.normal(size=(6, 3)).astype(np.float32),
            "B": rng.normal(size=(4, 3)).astype(np.float32),
            "b": rng.normal(size=4).astype(np.float32),
            "S": rng.normal(size=(4, 5)).astype(np.float32),
        },
    )


def test_white_coordinates_are_the_same_model() -> None:
    model = ir.from_proto(gemms())
    trained = ("A", "B", "b", "S")
    arrays: Mapping[str, Array] = {
        name: np.array(value.const_value.numpy())
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    }
    base = differentiable(model, trained)
    rng = np.random.default_rng(3)
    scales = np.geomspace(0.1, 10.0, 6)
    feeds = [{"x": (rng.normal(size=(50, 6)) * scales).astype(np.float32)} for _ in range(4)]
    white = whiten(base, arrays, feeds, None, opener)
    assert set(white.by) == {"A", "B"}  # a bias has no input, and S two
    inside = white.into(arrays)
    assert not np.allclose(inside["A"], arrays["A"])
    for name, array in white.back(inside).items():
        np.testing.assert_allclose(array, arrays[name], rtol=1e-4, atol=1e-4)
    plain, same = opener(model)(feeds[0]), opener(white.model)({**feeds[0], **inside})
    for name, array in plain.items():
        np.testing.assert_allclose(same[name], array, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("masked", [False, True])
def test_masked_rows_are_not_whitened_with(masked: bool) -> None:
    model = blocks()
    base = differentiable(model, TRAINED)
    rng = np.random.default_rng(4)
    mask = np.array([[1, 1, 0], [1, 0, 0]], np.int64)
    clean = rng.normal(size=(2, 3, 8)).astype(np.float32)
    wild = np.where(mask[..., None] == 0, rng.normal(size=(2, 3, 8)) * 9, clean)
    arrays = {
        name: np.array(value.const_value.numpy())
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    }
    one, other = (
        whiten(
            base,
            arrays,
            [{"x": x.astype(np.float32), "attention_mask": mask}],
            "attention_mask" if masked else None,
            opener,
        )
        for x in (clean, wild)
    )
    same = np.allclose(one.by["W1"][0].variances, other.by["W1"][0].variances)
    assert same == masked


def test_moments_are_gathered_within_a_fixed_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = blocks()
    base = differentiable(model, TRAINED)
    arrays = {
        name: np.array(value.const_value.numpy())
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    }
    feeds = [{"x": np.random.default_rng(5).normal(size=(2, 40, 8)).astype(np.float32)}]
    at_once = whiten(base, arrays, feeds, None, opener).by
    assert set(at_once) == set(TRAINED)
    opened: list[int] = []

    def counted(copy: ir.Model) -> Any:
        opened.append(len(copy.graph.outputs))
        return opener(copy)

    monkeypatch.setattr("onnx_lowrank.numerics.moments.MEMORY", 2 * 8 * 8 * 8)
    in_turns = whiten(base, arrays, feeds, None, counted).by
    assert opened == [2, 2]
    for name, (whitening, _) in at_once.items():
        np.testing.assert_array_equal(whitening.variances, in_turns[name][0].variances)
    monkeypatch.setattr("onnx_lowrank.numerics.moments.MEMORY", 8)
    assert not whiten(base, arrays, feeds, None, counted).by


@pytest.mark.parametrize("op", ["LSTM", "GRU"])
def test_what_a_recurrent_cell_reads_is_healed(op: str) -> None:
    rng = np.random.default_rng(3)
    gates = {"LSTM": 4, "GRU": 3}[op]
    proto = parse(
        f"""
        <ir_version: 8, opset_import: ["" : 17]>
        agraph (float[T,N,16] x) => (float[T,N,6] y) {{
            h = MatMul (x, W1)
            a = Relu (h)
            s = {op} <hidden_size = 12, direction = "bidirectional"> (a, W, R, B)
            t = Transpose <perm = [0, 2, 1, 3]> (s)
            u = Reshape (t, flat)
            y = MatMul (u, W2)
        }}
        """,
        {
            "W1": (rng.normal(size=(16, 24)) / 4).astype("f4"),
            "W": (rng.normal(size=(2, gates * 12, 24)) / 5).astype("f4"),
            "R": (rng.normal(size=(2, gates * 12, 12)) / 4).astype("f4"),
            "B": (rng.normal(size=(2, 2 * gates * 12)) / 4).astype("f4"),
            "flat": np.array([0, 0, 24], np.int64),
            "W2": (rng.normal(size=(24, 6)) / 4).astype("f4"),
        },
    )
    feeds = [{"x": rng.normal(size=(7, 8, 16)).astype("f4")} for _ in range(60)]
    result = compress(
        proto, rank=4, ops=("all",), heal=60, calibration=feeds, bench=False, min_gain=0.0
    )
    assert sum(layer.rank is not None for layer in result.report.layers) == 3
    healing = result.report.healing
    assert healing is not None
    assert healing.best_step > 30
    assert healing.error_after < 0.9 * healing.error_before


def test_a_rate_that_leads_astray_is_halved_until_it_helps() -> None:
    proto, feeds = perceptron(), samples(60)
    fine = healed(proto, feeds, HealPlan(steps=240, rate=1e-2))
    coarse = healed(proto, feeds, HealPlan(steps=240, rate=10.0))
    assert not fine.notes
    (note,) = coarse.notes
    wanted = r"healing went back and lowered its rate from 10 to [\d.]+, as the held-out error rose"
    assert re.fullmatch(wanted, note)
    assert coarse.best_step > 0
    assert coarse.error_after < 0.95 * coarse.error_before


def test_adam_restarts_as_if_no_step_had_been_taken() -> None:
    rng = np.random.default_rng(0)
    start = {"a": rng.normal(size=(4, 3)).astype("f4"), "b": np.zeros(3, "f4")}
    slopes = [{k: rng.normal(size=v.shape).astype("f4") for k, v in start.items()} for _ in "123"]
    gone, fresh = Adam(start, 0.5), Adam(start, 0.01)
    gone.step(slopes[0], 1.0)
    gone.restart(start, 0.01)
    for slope in slopes[1:]:
        gone.step(slope, 0.7)
        fresh.step(slope, 0.7)
    assert gone.rate == fresh.rate
    for name, array in fresh.arrays.items():
        np.testing.assert_array_equal(gone.arrays[name], array)


def test_outputs_count_as_much_as_all_that_is_inside() -> None:
    original = blocks()
    feeds = [{"x": np.random.default_rng(1).normal(size=(3, 5, 8)).astype("f4")}]
    values = ("y", "n1", "n2")
    shares = {"y": 0.5, "n1": 0.25, "n2": 0.25}
    batches = Batches(feeds, None, values, Kept(original, values, opener), shares)
    given = batches.inputs(0)
    for value, share in shares.items():
        target, weight = given[Loss.of(value).target], given[Loss.of(value).weight]
        # A value of zeros would have the loss of its share.
        assert float(np.sum(weight * target**2)) == pytest.approx(share, rel=1e-5)
