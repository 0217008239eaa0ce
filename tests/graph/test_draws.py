"""Models that draw numbers are judged with means in place of what is drawn."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_lowrank import compress
from onnx_lowrank.graph.draws import drawing, steady
from onnx_lowrank.numerics.arrays import Array
from tests.helpers.models import known_rank, parse, run_ort

_HEAD = '<ir_version: 8, opset_import: ["": 17]>'
_CASES = {
    "normal": "n = RandomNormalLike<mean = 2.0>(h) y = Add(h, n)",
    "seeded": "n = RandomNormalLike<mean = 2.0, seed = 3.0>(h) y = Add(h, n)",
    "uniform": "n = RandomUniform<shape = [8], low = 1.0, high = 3.0>() y = Add(h, n)",
    "dropout": "on = Constant<value = bool {1}>() y, kept = Dropout(h, , on)",
    "bernoulli": "p = Sigmoid(h) n = Bernoulli(p) y = Add(h, n)",
    "truth": "p = Sigmoid(h) n = Bernoulli<dtype = 9>(p) z = Neg(h) y = Where(n, h, z)",
    "class": "c = Multinomial<sample_size = 3>(h) n = Cast<to = 1>(c) s = ReduceMean(n) "
    "y = Add(h, s)",
}
_BRANCH = """yes = Constant<value = bool {1}>()
    y = If(yes) <
        then_branch = a () => (float[N, 8] t) { n = RandomNormalLike(h) t = Add(h, n) },
        else_branch = b () => (float[N, 8] e) { e = Identity(h) }
    >"""


def model(body: str) -> onnx.ModelProto:
    weight = known_rank(8, 8, 2, np.random.default_rng(0))
    text = f"{_HEAD} g (float[N, 8] x) => (float[N, 8] y) {{ h = MatMul(x, W) {body} }}"
    return parse(text, {"W": weight})


def feeds(count: int) -> list[dict[str, Array]]:
    rng = np.random.default_rng(1)
    return [{"x": rng.normal(size=(16, 8)).astype("f4")} for _ in range(count)]


@pytest.mark.parametrize("body", [*_CASES.values(), _BRANCH], ids=[*_CASES, "branch"])
def test_an_exact_pair_is_not_blamed_for_what_is_drawn(body: str) -> None:
    options: dict[str, Any] = {"simplify": False, "bench": False, "rank_multiple": 1}
    result = compress(model(body), keep=0.6, min_gain=0.0, calibration=feeds(20), **options)
    assert [layer.rank for layer in result.report.layers] == [2]
    check = result.report.check
    assert check is not None
    assert check.providers[0].outputs[0].relative_l2 < 1e-4
    assert sum(note.startswith("numbers are drawn by ") for note in result.report.notes) == 1
    drawn = drawing(ir.from_proto(model(body)))
    assert len(drawn) == 1
    assert drawing(result.model) == drawn  # OUT draws as IN does


def test_the_mean_of_what_is_drawn() -> None:
    feed = feeds(1)[0]
    drawn = ir.from_proto(model(_CASES["uniform"]))
    steady(drawn)
    first = run_ort(drawn, feed)["y"]
    weight = np.asarray(known_rank(8, 8, 2, np.random.default_rng(0)))
    np.testing.assert_allclose(first, feed["x"] @ weight + 2.0, rtol=1e-4, atol=1e-4)
    assert not drawing(drawn)


def test_dropout_that_does_not_train_draws_nothing() -> None:
    off = "off = Constant<value = bool {0}>() y, kept = Dropout(h, , off)"
    assert not drawing(ir.from_proto(model(off)))
    assert not drawing(ir.from_proto(model("y = Dropout(h)")))
