"""Kept: wide outputs wait as what they are made of, and come back as they were."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_lowrank.numerics.arrays import Feed
from onnx_lowrank.runtime import kept
from onnx_lowrank.runtime.kept import Kept, heads_of
from tests.helpers.decoder import WIDTH, WORDS, decoder_feeds, decoder_model
from tests.helpers.models import parse, run_ort

_HEAD = '<ir_version: 8, opset_import: ["": 17]>'


def opened(model: ir.Model) -> Callable[[Feed], Feed]:
    proto = ir.to_proto(model)
    names = {value.name for value in proto.graph.input}
    return lambda feed: run_ort(proto, {k: v for k, v in feed.items() if k in names})


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The vocabularies of tests are wide."""
    monkeypatch.setattr(kept, "WIDE", 64)
    monkeypatch.setattr(kept, "TIMES", 2)


def test_logits_come_back_bit_by_bit_of_what_the_tied_head_reads() -> None:
    model = ir.from_proto(decoder_model())
    values = Kept(model, ["logits", "present.0.key"], opened)
    assert values.heads.narrow == {"logits": "norm"}
    for feed in decoder_feeds(3, 7, past=2):
        given = values.read(feed)
        assert "logits" not in given
        assert given["norm"].shape == (1, 7, WIDTH)
        found, expected = values.whole(given), run_ort(ir.to_proto(model), feed)
        assert expected["logits"].shape == (1, 7, WORDS)
        for name in ("logits", "present.0.key"):
            np.testing.assert_array_equal(found[name], expected[name])


def test_what_was_read_becomes_whole_without_the_model() -> None:
    model, (feed,) = ir.from_proto(decoder_model()), decoder_feeds(1, 5)
    values = Kept(model, ["logits"], opened)
    given = values.read(feed)
    values.close()
    expected = run_ort(ir.to_proto(model), feed)["logits"]
    np.testing.assert_array_equal(values.whole(given)["logits"], expected)
    with pytest.raises(AssertionError):
        values.read(feed)


def test_shares_and_logits_have_one_head(rng: np.random.Generator) -> None:
    text = f"""{_HEAD} g (float[N, 8] x) => (float[N, 96] l, float[N, 96] y)
    {{ h = Tanh(x)
       m = MatMul(h, w)
       l = Add(m, b)
       y = Softmax<axis = -1>(l) }}"""
    model = parse(
        text, {"w": rng.normal(size=(8, 96)).astype("f4"), "b": rng.normal(size=96).astype("f4")}
    )
    loaded = ir.from_proto(model)
    heads = heads_of(loaded, ["l", "y", "h"], opened)
    assert heads.narrow == {"l": "h", "y": "h"}
    feed = {"x": rng.normal(size=(3, 8)).astype("f4")}
    found, expected = heads.whole({"h": np.tanh(feed["x"])}), run_ort(model, feed)
    for name in ("l", "y"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("h = Tanh(x) y = MatMul(h, n)", "the product is narrow"),
        ("y = MatMul(x, w)", "it is made of an input"),
        ("h = Tanh(x) m = MatMul(h, w) s = ReduceSum(x) y = Add(m, s)", "something else counts"),
        ("h = Tanh(x) t = Tanh(x) v = MatMul(t, w) y = MatMul(h, v)", "no factor is a constant"),
        ("h = Tanh(x) m = MatMul(h, w) r = RandomNormalLike(m) y = Add(m, r)", "numbers are drawn"),
    ],
)
def test_what_has_no_head_is_kept_as_it_is(body: str, why: str, rng: np.random.Generator) -> None:
    text = f"{_HEAD} g (float[8, 8] x) => (float y) {{ {body} }}"
    constants = {"w": rng.normal(size=(8, 96)).astype("f4")}
    constants["n"] = rng.normal(size=(8, 12)).astype("f4")
    model = parse(text, {k: v for k, v in constants.items() if f" {k})" in body})
    heads = heads_of(ir.from_proto(model), ["y"], opened)
    assert heads.narrow == {}, why
    assert heads.read(["y"]) == {"y"}
    given = {"y": np.zeros(3)}
    assert heads.whole(given) is given


def test_a_weight_that_is_an_input_is_asked_for(rng: np.random.Generator) -> None:
    text = f"""{_HEAD} g (float[N, 8] x, float[8, 96] w) => (float[N, 96] y)
    {{ h = Tanh(x)
       y = MatMul(h, w) }}"""
    model = ir.from_proto(parse(text, {}))
    assert heads_of(model, ["y"], opened).narrow == {}
    heads = heads_of(model, ["y"], opened, {"w"})
    assert heads.weights == {"w"}
    h, w = rng.normal(size=(2, 8)).astype("f4"), rng.normal(size=(8, 96)).astype("f4")
    found = heads.whole({"h": h}, {"w": w})["y"]
    np.testing.assert_allclose(found, h @ w, rtol=1e-4, atol=1e-5)


def test_the_model_stays_as_it_was() -> None:
    model = ir.from_proto(decoder_model())
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    heads_of(model, ["logits"], opened)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    onnx.checker.check_model(ir.to_proto(model))
