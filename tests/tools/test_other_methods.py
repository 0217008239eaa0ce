"""tools/other_methods.py: the ways of others say what their papers say."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.maps.find import Group, find
from onnx_lowrank.maps.forms import all_forms, chosen_forms
from onnx_lowrank.maps.pair import Factors
from onnx_lowrank.numerics.arrays import Array, Feed
from onnx_lowrank.numerics.moments import Moments
from onnx_lowrank.numerics.output_pca import output_energies, output_pair
from onnx_lowrank.runtime.session import open_session, run
from onnx_lowrank.runtime.taps import Runner
from tests.helpers.calibrated import HEAD
from tests.helpers.models import parse, uniform
from tests.helpers.places import ROOT

sys.path.insert(0, str(ROOT / "tools"))

from other_methods import WAYS, aa_svd, by_layer

RANK = 3


def rows(rng: np.random.Generator, count: int = 400, offset: float = 0.0) -> Array:
    """Rows of 12 elements, of very different size and not independent."""
    mixed = rng.normal(size=(count, 12)) * np.logspace(0, -2, 12)
    return np.asarray(mixed @ rng.normal(size=(12, 12)) + offset)


def moments(x: Array) -> Moments:
    """Those of rows."""
    exact = x.astype(np.float64)
    return Moments(exact.T @ exact / len(exact), exact.mean(axis=0), len(exact))


@pytest.mark.parametrize("way", WAYS)
def test_a_pair_of_full_rank_is_the_weight(way: str, rng: np.random.Generator) -> None:
    weight = rng.normal(size=(12, 8))
    found = moments(rows(rng))
    first, last, shift = WAYS[way](weight, found, 8)
    assert np.abs(first @ last - weight).max() < 1e-6
    assert shift is None or np.abs(shift).max() < 1e-6


@pytest.mark.parametrize("way", ["SVD-LLM", "SVD-LLM v2"])
def test_truncating_the_whitened_weight_is_as_near_as_output_pca(
    way: str, rng: np.random.Generator
) -> None:
    weight, found = rng.normal(size=(12, 8)), moments(rows(rng))
    first, last, _ = WAYS[way](weight, found, RANK)
    ours = output_pair(weight, found, RANK, np.float64)
    error = output_energies(weight, first, last, found)[0]
    assert error == pytest.approx(output_energies(weight, *ours, found)[0], rel=1e-6)
    plain = WAYS["FWSVD"](weight, found, RANK)
    assert error < output_energies(weight, plain[0], plain[1], found)[0]


def test_fwsvd_is_the_plain_svd_of_inputs_of_one_size(rng: np.random.Generator) -> None:
    weight = rng.normal(size=(12, 8))
    first, last, _ = WAYS["FWSVD"](weight, Moments(np.eye(12), np.zeros(12), 100), RANK)
    u, values, vt = np.linalg.svd(weight)
    assert np.abs(first @ last - (u[:, :RANK] * values[:RANK]) @ vt[:RANK]).max() < 1e-9
    uneven = Moments(np.diag([100.0, *[1.0] * 11]), np.zeros(12), 100)
    first, last, _ = WAYS["FWSVD"](weight, uneven, RANK)
    off = np.linalg.norm(weight - first @ last, axis=1)
    assert off[0] < 0.2 * off[1:].mean()  # the row that counts most


def test_lite_asr_keeps_the_mean_output(rng: np.random.Generator) -> None:
    weight, x = rng.normal(size=(12, 8)), rows(rng, offset=3.0)
    found = moments(x)
    first, last, shift = WAYS["LiteASR"](weight, found, RANK)
    assert shift is not None
    assert np.abs((x @ weight - x @ first @ last - shift).mean(axis=0)).max() < 1e-8
    whole = WAYS["SVD-LLM"](weight, found, RANK)
    errors = [
        output_energies(weight, pair[0], pair[1], found, pair[2])[0]
        for pair in (whole, (first, last, shift))
    ]
    assert errors[1] < errors[0]


def in_a_row(rng: np.random.Generator) -> onnx.ModelProto:
    """Two maps, the second of which reads what the first gives."""
    body = "h = MatMul(x, W1) t = Tanh(h) y = MatMul(t, W2)"
    return parse(
        f"{HEAD} g (float[N, 12] x) => (float[N, 10] y) {{ {body} }}",
        {"W1": uniform((12, 16), rng), "W2": uniform((16, 10), rng)},
    )


def test_aa_svd_fits_a_layer_to_what_the_layers_before_it_give(rng: np.random.Generator) -> None:
    proto = in_a_row(rng)
    model = ir.from_proto(proto)
    groups = find(model, Constants(model, False), all_forms(), chosen_forms(None)).groups
    feeds: list[Feed] = [{"x": rows(rng, 100).astype(np.float32)} for _ in range(4)]
    x = np.concatenate([feed["x"] for feed in feeds]).astype(np.float64)
    first, second = (group.matrix.numpy()[0].astype(np.float64) for group in groups)
    hidden = np.tanh(x @ first)
    ranks = dict.fromkeys(groups, RANK)
    known = dict(zip(groups, map(moments, (x, hidden)), strict=True))
    before = by_layer(WAYS["SVD-LLM"], ranks, known)

    def opened(piece: onnx.ModelProto) -> Runner:
        session = open_session(piece.SerializeToString())
        return lambda feed: run(session, feed, "a piece")

    after = aa_svd(model, ranks, feeds, None, opened)

    def product(pairs: Mapping[Group, Factors], group: Group) -> Array:
        return np.asarray(pairs[group].product()[0], np.float64)

    # The first layer reads what it always does.
    assert np.abs(x @ (product(before, groups[0]) - product(after, groups[0]))).max() < 1e-4
    seen = np.tanh(x @ product(after, groups[0]))
    errors = [
        np.linalg.norm(hidden @ second - seen @ product(pairs, groups[1]))
        for pairs in (before, after)
    ]
    assert errors[1] < 0.99 * errors[0]
    assert (
        ir.to_proto(model).SerializeToString()
        == ir.to_proto(ir.from_proto(proto)).SerializeToString()
    )
