"""Narrow: the width between two maps becomes smaller in both, and no node is added."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_lowrank import compress, inspect
from onnx_lowrank.compression.result import Result
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.maps.find import Factorable, Finding, Group, Refused, find
from onnx_lowrank.maps.forms import all_forms, chosen_forms
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.runtime.session import open_session, run
from tests.helpers.models import parse

OPS = ("default", "hidden", "heads")
HEADS, SIZE, UNITS = 3, 8, 64
WIDTH = HEADS * SIZE

ATTENTION = """<ir_version: 8, opset_import: ["": 18]>
g (float[B, T, 24] x) => (float[B, T, 24] y)
<float[24, 24] wq, float[24, 24] wk, float[24, 24] wv, float[24] bv, float[24, 24] wo,
 float[24, 64] up, float[64] bu, float[64, 24] down, float[24] bd, float half, float one,
 int64[4] apart, int64[3] together, float scale>
{
  q0 = MatMul(x, wq)
  q1 = Reshape(q0, apart)
  q = Transpose<perm = [0, 2, 1, 3]>(q1)
  k0 = MatMul(x, wk)
  k1 = Reshape(k0, apart)
  k = Transpose<perm = [0, 2, 3, 1]>(k1)
  v0 = MatMul(x, wv)
  v1 = Add(v0, bv)
  v2 = Reshape(v1, apart)
  v = Transpose<perm = [0, 2, 1, 3]>(v2)
  s0 = MatMul(q, k)
  s1 = Mul(s0, scale)
  p = Softmax<axis = -1>(s1)
  m0 = MatMul(p, v)
  m1 = Transpose<perm = [0, 2, 1, 3]>(m0)
  m2 = Reshape(m1, together)
  o = MatMul(m2, wo)
  z = Add(x, o)
  u0 = MatMul(z, up)
  u1 = Add(u0, bu)
  u2 = Mul(u1, half)
  u3 = Erf(u2)
  u4 = Add(u3, one)
  u5 = Mul(u1, u4)
  d0 = MatMul(u5, down)
  d1 = Add(d0, bd)
  y = Add(z, d1)
}"""


def block(rng: np.random.Generator, *, low: bool = True) -> onnx.ModelProto:
    """A block whose value heads have rank 4 of 8, and whose units are 40 of 64 with copies."""

    def normal(*shape: int) -> Array:
        return np.asarray(rng.normal(size=shape) / np.sqrt(shape[0]), np.float32)

    wo = normal(WIDTH, WIDTH)
    up, bu = normal(WIDTH, UNITS), normal(UNITS) * 4
    if low:
        heads = wo.reshape(HEADS, SIZE, WIDTH)
        wo = np.concatenate([normal(SIZE, 4) @ normal(4, SIZE) @ head for head in heads])
        up[:, 40:], bu[40:] = up[:, :24], bu[:24]
    return parse(
        ATTENTION,
        {
            **{"wq": normal(WIDTH, WIDTH), "wk": normal(WIDTH, WIDTH), "wv": normal(WIDTH, WIDTH)},
            **{"bv": normal(WIDTH), "wo": wo, "up": up, "bu": bu, "down": normal(UNITS, WIDTH)},
            **{
                "bd": normal(WIDTH),
                "half": np.array(0.7071, np.float32),
                "one": np.array(1.0, np.float32),
            },
            "apart": np.array([0, 0, HEADS, SIZE]),
            "together": np.array([0, 0, WIDTH]),
            "scale": np.array(0.35, np.float32),
        },
    )


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    return block(np.random.default_rng(3))


@pytest.fixture(scope="module")
def feeds() -> list[dict[str, Array]]:
    rng = np.random.default_rng(8)
    return [{"x": rng.normal(size=(1, 24, WIDTH)).astype("f4")} for _ in range(60)]


def found(model: onnx.ModelProto, ops: tuple[str, ...] = OPS) -> Finding:
    loaded = ir.from_proto(model)
    return find(loaded, Constants(loaded), all_forms(), chosen_forms(ops))


def narrowed(model: onnx.ModelProto, ops: tuple[str, ...] = OPS) -> dict[str, Group]:
    return {g.members[0].site.node.outputs[0].name or "": g for g in found(model, ops).groups
            if g.inner is not None}  # fmt: skip


def run_of(model: Any, feed: dict[str, Array]) -> Array:
    proto = ir.to_proto(model) if isinstance(model, ir.Model) else model
    (array,) = run(open_session(proto.SerializeToString(), threads=1), feed, "it").values()
    return array


def shapes(result: Result) -> dict[str, tuple[int, ...]]:
    values = result.model.graph.initializers
    return {name: tuple(value.const_value.shape) for name, value in values.items()}  # type: ignore[union-attr,arg-type]


def test_a_width_counts_with_the_second_map(model: onnx.ModelProto) -> None:
    groups = narrowed(model)
    assert set(groups) == {"o", "d0"}
    heads, hidden = groups["o"], groups["d0"]
    assert heads.shape == (HEADS, SIZE, WIDTH)
    assert heads.elements == 2 * WIDTH * WIDTH
    assert heads.pair_elements(4) == WIDTH * WIDTH
    assert not heads.selects
    assert hidden.shape == (1, UNITS, WIDTH)
    assert hidden.selects
    assert hidden.largest(0.9) == 57
    left = {e.node.outputs[0].name for e in found(model).entries if isinstance(e, Refused)}
    assert left == {"v0", "u0"}


def test_by_default_the_maps_stay_apart(model: onnx.ModelProto) -> None:
    assert not narrowed(model, ("default",))
    entries = found(model, ("default",)).entries
    assert all(isinstance(entry, Factorable) for entry in entries)


@pytest.mark.parametrize(("rank", "off"), [(4, 2e-5), (2, 1.0)])
def test_heads_of_low_rank_lose_nothing(
    model: onnx.ModelProto, feeds: list[Any], rank: int, off: float
) -> None:
    options: dict[str, Any] = {"simplify": False, "bench": False, "effort": "quick"}
    result = compress(model, data=feeds, rank=rank, ops=("heads",), **options)
    sizes = shapes(result)
    assert sizes["wv"] == (WIDTH, HEADS * rank)
    assert sizes["bv"] == (HEADS * rank,)
    assert sizes["wo"] == (HEADS * rank, WIDTH)
    nodes = [node.op_type for node in result.model.graph]
    assert nodes == [node.op_type for node in model.graph.node]
    before, after = run_of(model, feeds[0]), run_of(result.model, feeds[0])
    error = np.linalg.norm(after - before) / np.linalg.norm(before)
    assert error < off
    assert rank == 4 or error > 1e-3
    totals = result.report.totals
    # Q and K are no heads of values, the units are off: they are counted as they are.
    assert totals.linear_parameters_before - totals.linear_parameters_after == (
        2 * WIDTH * HEADS * (SIZE - rank)
    )


def test_copies_of_units_are_left_out(model: onnx.ModelProto, feeds: list[Any]) -> None:
    result = compress(
        model, data=feeds, rank=40, ops=("hidden",), simplify=False, bench=False, effort="quick"
    )
    sizes = shapes(result)
    assert sizes["up"] == (WIDTH, 40)
    assert sizes["bu"] == (40,)
    assert sizes["down"] == (40, WIDTH)
    before, after = run_of(model, feeds[0]), run_of(result.model, feeds[0])
    assert np.linalg.norm(after - before) < 2e-3 * np.linalg.norm(before)


def test_a_budget_spends_on_widths_and_ranks(feeds: list[Any]) -> None:
    model = block(np.random.default_rng(5))
    options: dict[str, Any] = {"data": feeds, "simplify": False, "bench": False, "rank_multiple": 1}
    plain = compress(model, keep=0.6, effort="quick", **options)
    narrow = compress(model, keep=0.6, effort="quick", ops=OPS, **options)
    for result in (plain, narrow):
        totals = result.report.totals
        assert totals.linear_parameters_after <= 0.6 * totals.linear_parameters_before
    assert narrow.report.check is not None
    assert plain.report.check is not None
    assert narrow.report.check.damage is not None
    assert plain.report.check.damage is not None
    assert narrow.report.check.damage < 0.5 * plain.report.check.damage
    row = next(layer for layer in narrow.report.layers if layer.form == "hidden")
    assert row.rank is not None


def test_what_is_narrowed_is_healed(feeds: list[Any]) -> None:
    model = block(np.random.default_rng(6), low=False)
    options: dict[str, Any] = {"data": feeds, "simplify": False, "bench": False, "ops": OPS}
    result = compress(model, keep=0.6, heal=40, **options)
    healing = result.report.healing
    assert healing is not None
    assert healing.error_after < 0.95 * healing.error_before
    assert healing.trained >= 9


def test_a_recipe_narrows_again(model: onnx.ModelProto, feeds: list[Any], tmp_path: Any) -> None:
    path = tmp_path / "recipe.json"
    options: dict[str, Any] = {"data": feeds, "bench": False}
    first = compress(model, keep=0.6, ops=OPS, simplify=False, save_recipe=path, **options)
    again = compress(model, recipe=path, **options)
    assert shapes(first) == shapes(again)
    before, after = run_of(first.model, feeds[0]), run_of(again.model, feeds[0])
    np.testing.assert_allclose(before, after, atol=1e-3)


def test_without_samples_no_width_is_narrowed(model: onnx.ModelProto) -> None:
    report = compress(model, rank=4, ops=OPS, simplify=False, bench=False).report
    rows = {layer.form: layer for layer in report.layers if layer.form in ("heads", "hidden")}
    assert {row.reason for row in rows.values()} == {"a width is narrowed by samples, and has none"}


@pytest.mark.parametrize("version", [3, 8])
@pytest.mark.parametrize("weights", ["fp32", "8"])
def test_weights_that_are_inputs_are_narrowed_alike(
    version: int, weights: str, model: onnx.ModelProto, feeds: list[Any]
) -> None:
    """Where they count as constants: what is chosen does not depend on how a file lists them."""
    options: dict[str, Any] = {"data": feeds, "simplify": False, "bench": False, "rank": 4}
    options |= {"ops": ("default", "heads"), "min_gain": -1, "weights": weights}
    plain = compress(model, **options)
    listed = onnx.ModelProto()
    listed.CopyFrom(model)
    for t in model.graph.initializer:
        listed.graph.input.append(onnx.helper.make_tensor_value_info(t.name, t.data_type, t.dims))
    listed.ir_version = version
    del listed.graph.value_info[:]
    result = compress(listed, constant_inputs=True, **options)
    ranks = [(layer.name, layer.form, layer.rank) for layer in result.report.layers]
    assert ranks == [(layer.name, layer.form, layer.rank) for layer in plain.report.layers]
    assert ("o", "heads", 4) in ranks
    after = ir.to_proto(result.model)
    onnx.checker.check_model(after, full_check=True)
    # A weight that has another shape is no input any more; those that stay are.
    assert {"x", "half"} <= {value.name for value in after.graph.input}
    assert not {"wv", "bv", "wo"} & {value.name for value in after.graph.input}
    np.testing.assert_allclose(
        run_of(result.model, feeds[0]), run_of(plain.model, feeds[0]), atol=0.02
    )


def changed(old: str, new: str) -> onnx.ModelProto:
    """The block with another text."""
    assert old in ATTENTION
    base = block(np.random.default_rng(3))
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in base.graph.initializer}
    return parse(ATTENTION.replace(old, new), arrays)


@pytest.mark.parametrize(
    ("old", "new", "left"),
    [
        # Something else reads the values, the attention or a unit.
        ("y = Add(z, d1)", "e = Add(z, d1)  f = Mul(v1, one)  y = Add(e, f)", {"d0"}),
        ("y = Add(z, d1)", "e = Add(z, d1)  f = Mul(m2, one)  y = Add(e, f)", {"d0"}),
        ("u3 = Erf(u2)", "u3 = Softmax(u2)", {"o"}),
        # Elements of different heads are mixed.
        (
            "v = Transpose<perm = [0, 2, 1, 3]>(v2)",
            "v9 = Transpose<perm = [0, 2, 3, 1]>(v2)  v = Transpose<perm = [0, 1, 3, 2]>(v9)",
            {"d0"},
        ),
        # A unit is multiplied with what is not known.
        ("u5 = Mul(u1, u4)", "u6 = Mul(u1, u4)  u7 = ReduceMax(u6)  u5 = Mul(u6, u7)", {"o"}),
    ],
)
def test_what_is_seen_elsewhere_keeps_its_width(old: str, new: str, left: set[str]) -> None:
    assert set(narrowed(changed(old, new))) == left


def test_sizes_at_the_end_of_a_concat(model: onnx.ModelProto, feeds: list[Any]) -> None:
    """Sizes that several Reshapes share are changed for the values alone."""
    text = ATTENTION.replace("int64[4] apart, int64[3] together", (
        "int64[1] many, int64[1] each, int64[1] all, int64[1] i0, int64[1] i1"
    )).replace("  q0 = MatMul(x, wq)", """  shape = Shape(x)
  b = Gather(shape, i0)
  t = Gather(shape, i1)
  apart = Concat<axis = 0>(b, t, many, each)
  together = Concat<axis = 0>(b, t, all)
  q0 = MatMul(x, wq)""")  # fmt: skip
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    arrays |= {"many": np.array([HEADS]), "each": np.array([SIZE]), "all": np.array([WIDTH])}
    arrays |= {"i0": np.array([0]), "i1": np.array([1])}
    del arrays["apart"], arrays["together"]
    other = parse(text, arrays)
    np.testing.assert_allclose(run_of(other, feeds[0]), run_of(model, feeds[0]), atol=1e-5)
    assert set(narrowed(other)) == {"o", "d0"}
    result = compress(
        other, data=feeds, rank=4, ops=("heads",), simplify=False, bench=False, effort="quick"
    )
    before, after = run_of(other, feeds[0]), run_of(result.model, feeds[0])
    assert np.linalg.norm(after - before) < 2e-5 * np.linalg.norm(before)
    assert shapes(result)["each"] == (1,)


def test_inspect_shows_two_maps_as_one_where_asked(
    model: onnx.ModelProto, feeds: list[Any]
) -> None:
    plain = inspect(model, data=feeds)
    assert {row.form for row in plain.entries} == {"matmul-right"}
    asked = {row.form: row for row in inspect(model, data=feeds, ops=OPS).entries}
    assert "'v0' makes its width" in asked["heads"].reason
    assert asked["hidden"].parameters == 2 * WIDTH * UNITS
    assert asked["hidden"].ranks[-1] <= UNITS
    alone = {row.form: row for row in inspect(model, ops=OPS).entries}
    assert alone["hidden"].ranks == ()


def test_a_model_whose_plain_maps_are_off_is_narrowed(
    model: onnx.ModelProto, feeds: list[Any]
) -> None:
    left = {e.node.outputs[0].name: e.refusal.reason for e in found(model, ("conv",)).entries
            if isinstance(e, Refused)}  # fmt: skip
    assert left["o"] == "off; ops='matmul' turns it on"
    assert feeds
