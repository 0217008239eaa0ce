"""Refit: layers fitted again to what the compressed model gives them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_lowrank import UsageError, compress
from onnx_lowrank.data.joining import APART, Joining
from onnx_lowrank.fitting.fit import fit as fitted
from onnx_lowrank.fitting.refit import refit
from onnx_lowrank.fitting.segments import Walk
from onnx_lowrank.fitting.statistics import Statistics
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.maps.choice import Choice
from onnx_lowrank.maps.find import find
from onnx_lowrank.maps.forms import all_forms, chosen_forms
from onnx_lowrank.numerics.arrays import Array, Feed
from onnx_lowrank.numerics.ridge import Regression
from tests.helpers.blocks import error, feeds_of, two_blocks
from tests.helpers.models import parse, run_ort


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)


@pytest.fixture
def model(rng: np.random.Generator) -> onnx.ModelProto:
    return two_blocks(rng)


def test_a_refit_is_closer_on_samples_that_it_has_not_seen(
    model: onnx.ModelProto, rng: np.random.Generator
) -> None:
    fit, judge = feeds_of(rng, 40), feeds_of(np.random.default_rng(99), 8)
    options: dict[str, Any] = {"rank": 9, "simplify": False, "check": False, "bench": False}
    plain = compress(model, calibration=fit, **options)
    again = compress(model, calibration=fit, refit=True, **options)
    assert error(model, again.model, judge) < 0.99 * error(model, plain.model, judge)
    refitted = [layer.refit for layer in again.report.layers if layer.refit is not None]
    assert refitted
    assert all(after < before for before, after in refitted)
    assert all(layer.refit is None for layer in plain.report.layers)


def test_a_refit_of_full_rank_changes_nothing(
    model: onnx.ModelProto, rng: np.random.Generator
) -> None:
    fit = feeds_of(rng, 10)
    result = compress(
        model, calibration=fit, refit=True, rank=24, min_gain=-1.0, simplify=False, bench=False
    )
    assert error(model, result.model, fit) < 1e-4


PADDED = """<ir_version: 8, opset_import: ["": 17]>
agraph (float[B, T, 24] x, float[B, T] attention_mask) => (float[B, T, 24] y)
<float[24, 48] w1, float[48, 24] w2, float[24, 24] w3, int64[1] last = {2}>
{
  h1 = MatMul(x, w1)
  r1 = Tanh(h1)
  o1 = MatMul(r1, w2)
  s1 = Add(x, o1)
  m1 = Unsqueeze(attention_mask, last)
  k1 = Mul(s1, m1)
  y = MatMul(k1, w3)
}"""


def test_samples_that_run_together_are_refitted_as_they_are_alone(rng: np.random.Generator) -> None:
    shapes = {"w1": (24, 48), "w2": (48, 24), "w3": (24, 24)}
    model = ir.from_proto(
        parse(PADDED, {name: 0.3 * rng.normal(size=s).astype("f4") for name, s in shapes.items()})
    )
    base, feeds = rng.normal(size=(12, 24)), list[Feed]()
    for _ in range(40):
        mask = (np.arange(20) < rng.integers(4, 16))[None].astype("f4")
        x = (rng.normal(size=(1, 20, 12)) @ base).astype("f4")
        feeds.append({"x": x, "attention_mask": mask})
    constants = Constants(model)
    groups = find(model, constants, all_forms(), chosen_forms(None)).groups
    choices = {group: Choice(9, "test") for group in groups}
    pairs = dict(fitted(choices, Statistics(), lambda _: None))
    found, runs = [], []
    for joining in (APART, Joining(8, "attention_mask", {"x": 1, "attention_mask": 1})):
        lengths = list[tuple[int, ...]]()

        def opened(piece: onnx.ModelProto, lengths: list[tuple[int, ...]] = lengths) -> Any:
            def run(feed: Feed) -> Feed:
                lengths.extend(array.shape[:2] for array in feed.values())
                return run_ort(piece, feed)

            return run

        again = refit(
            *(model, constants, pairs, Statistics(), feeds, "attention_mask", opened),
            lambda _: None,
            joining=joining,
        )
        found.append([again.factors[group].product() for group in groups])
        runs.append(lengths)
    assert {(1, 20)} == {*runs[0]}
    assert len(runs[1]) <= len(runs[0]) / 5
    assert max(length for _, length in runs[1]) < 20
    for alone, together in zip(*found, strict=True):
        np.testing.assert_allclose(together, alone, rtol=1e-3, atol=1e-3)
    assert not np.allclose(found[0][1], pairs[groups[1]].product(), atol=1e-3)


def test_what_cannot_be_refitted_is_named(rng: np.random.Generator) -> None:
    text = """<ir_version: 8, opset_import: ["": 17]>
    agraph (float[N, 24] x) => (float[N, 24] y) <float[24, 24] w>
    { h = MatMul(x, w)
      t = Transpose(w)
      y = MatMul(h, t) }"""
    both = parse(text, {"w": rng.normal(size=(24, 24)).astype("f4")})
    result = compress(
        both, calibration=feeds_of(rng, 8), refit=True, rank=6, simplify=False, bench=False
    )
    assert any("its weight is also read transposed" in note for note in result.report.notes)


def shared_blocks(rng: np.random.Generator, blocks: int) -> onnx.ModelProto:
    """Residual blocks with the same two weights."""
    lines = ["s0 = Identity(x)"]
    for k in range(blocks):
        lines += [
            f"a{k} = MatMul(s{k}, w1)",
            f"t{k} = Tanh(a{k})",
            f"o{k} = MatMul(t{k}, w2)",
            f"s{k + 1} = Add(s{k}, o{k})",
        ]
    text = f"""<ir_version: 8, opset_import: ["": 17]>
    agraph (float[N, 24] x) => (float[N, 24] y) <float[24, 48] w1, float[48, 24] w2>
    {{ {" ".join(lines)} y = Identity(s{blocks}) }}"""
    shapes = {"w1": (24, 48), "w2": (48, 24)}
    return parse(text, {k: rng.normal(size=s).astype("f4") * 0.3 for k, s in shapes.items()})


def unrolled(rng: np.random.Generator, steps: int) -> onnx.ModelProto:
    """``h ← tanh(x_t·U + h·R + b)``, a loop written out: each weight has a reader for each step."""
    lines = ["h0 = Mul(x0, zero)"]
    for step in range(steps):
        lines += [
            f"u{step} = MatMul(x{step}, U)",
            f"r{step} = Gemm(h{step}, R, b)",
            f"s{step} = Add(u{step}, r{step})",
            f"h{step + 1} = Tanh(s{step})",
        ]
    inputs = ", ".join(f"float[N, 24] x{step}" for step in range(steps))
    text = f"""<ir_version: 8, opset_import: ["": 17]>
    agraph ({inputs}) => (float[N, 24] y)
    <float[24, 24] U, float[24, 24] R, float[24] b, float zero>
    {{ {" ".join(lines)} y = Identity(h{steps}) }}"""
    weights = {name: rng.normal(size=(24, 24)).astype("f4") * 0.25 for name in "UR"}
    bias = rng.normal(size=24).astype("f4") * 0.1
    return parse(text, {**weights, "b": bias, "zero": np.array(0.0, "f4")})


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("make", "count", "rank", "margin"), [(shared_blocks, 4, 9, 0.98), (unrolled, 5, 6, 1.0)]
)
def test_a_weight_with_many_readers_is_refitted_to_all_of_them(
    make: Callable[[np.random.Generator, int], onnx.ModelProto],
    count: int,
    rank: int,
    margin: float,
    seed: int,
) -> None:
    model = make(np.random.default_rng(seed), count)
    inputs = [value.name for value in model.graph.input]

    def feeds(number: int, own: int) -> list[dict[str, Array]]:
        rng = np.random.default_rng(own)
        parts = [feeds_of(rng, number) for _ in inputs]
        return [
            {name: feed["x"] for name, feed in zip(inputs, feeds, strict=True)}
            for feeds in zip(*parts, strict=True)
        ]

    fit, judge = feeds(40, 11), feeds(8, 99)
    options: dict[str, Any] = {"rank": rank, "simplify": False, "check": False, "bench": False}
    plain = compress(model, calibration=fit, **options)
    again = compress(model, calibration=fit, refit=True, **options)
    refitted = {layer.weight: layer.refit for layer in again.report.layers if layer.refit}
    assert refitted
    assert all(after < before for before, after in refitted.values())
    assert error(model, again.model, judge) < margin * error(model, plain.model, judge)


def test_a_fork_leaves_the_walk_where_it_is(
    model: onnx.ModelProto, rng: np.random.Generator
) -> None:
    feeds = feeds_of(rng, 3)
    walk = Walk(ir.from_proto(model), feeds, lambda piece: lambda feed: run_ort(piece, feed))
    walk.advance(2)
    fork = walk.fork([2])
    fork.replace("w2", np.zeros((48, 24), "f4"))
    fork.advance(5, ["s1"])
    np.testing.assert_array_equal(fork.live[0]["s1"], feeds[2]["x"])
    walk.advance(len(model.graph.node), ["y"])
    for feed, values in zip(feeds, walk.live, strict=True):
        np.testing.assert_allclose(values["y"], run_ort(model, feed)["y"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"calibration": [], "calibrate": False}])
def test_it_needs_samples(model: onnx.ModelProto, options: Mapping[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"refit=True|calibration=…"):
        compress(model, refit=True, **options)


@pytest.mark.parametrize("stops", [(), (1, 4), (2, 3, 5, 6, 8)])
def test_a_walk_gives_what_the_whole_model_gives(
    model: onnx.ModelProto, rng: np.random.Generator, stops: tuple[int, ...]
) -> None:
    feeds = feeds_of(rng, 3)

    def opened(piece: onnx.ModelProto) -> Any:
        return lambda feed: run_ort(piece, feed)

    walk = Walk(ir.from_proto(model), feeds, opened)
    for stop in stops:
        walk.advance(stop)
    walk.advance(len(model.graph.node), ["y"])
    for feed, values in zip(feeds, walk.live, strict=True):
        np.testing.assert_allclose(values["y"], run_ort(model, feed)["y"], rtol=1e-5, atol=1e-5)


def test_a_walk_uses_replaced_weights_behind_constant_nodes(rng: np.random.Generator) -> None:
    text = """<ir_version: 8, opset_import: ["": 17]>
    agraph (float[N, 3] x) => (float[N, 2] y) <float[2, 3] w>
    { wt = Transpose(w)
      h = Relu(x)
      y = MatMul(h, wt) }"""
    model = parse(text, {"w": np.zeros((2, 3), "f4")})
    feed = {"x": rng.uniform(1, 2, size=(4, 3)).astype("f4")}
    walk = Walk(ir.from_proto(model), [feed], lambda piece: lambda f: run_ort(piece, f))
    walk.advance(2)
    other = rng.normal(size=(2, 3)).astype("f4")
    walk.replace("w", other)
    walk.advance(3, ["y"])
    np.testing.assert_allclose(walk.live[0]["y"], feed["x"] @ other.T, rtol=1e-5)


def test_ridge_goes_from_least_squares_to_the_prior(rng: np.random.Generator) -> None:
    x, true = rng.normal(size=(200, 5)).astype("f4"), rng.normal(size=(5, 3))
    y, prior = (x @ true).astype("f4"), rng.normal(size=(5, 3))
    sums = Regression(5, 3)
    sums.add(x[:50], y[:50])
    sums.add(x[50:], y[50:])
    least, most = (sums.solution(prior, share) for share in (1e-9, 1e9))
    assert least is not None
    assert most is not None
    np.testing.assert_allclose(least, true, atol=1e-4)
    np.testing.assert_allclose(most, prior, atol=1e-4)
    direct: Array = np.linalg.solve(x.T @ x / 200 + np.eye(5) * 0.3, x.T @ y / 200 + 0.3 * prior)
    share = 0.3 / float(np.mean(np.linalg.eigvalsh(x.T @ x / 200)))
    between = sums.solution(prior, share)
    assert between is not None
    np.testing.assert_allclose(between, direct, atol=1e-4)
    assert Regression(5, 3).solution(prior, share) is None
    zero = np.zeros((5, 1)), np.zeros((1, 3))
    assert sums.error(*zero) == pytest.approx(1.0)
    assert sums.error(true, np.eye(3)) == pytest.approx(0.0, abs=1e-6)
