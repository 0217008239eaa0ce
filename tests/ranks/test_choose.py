"""Which rank a layer gets, and the reason that every layer has."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_lowrank import InputError, compress
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.schema.layer import Layer
from tests.helpers.models import (
    assert_same,
    factored,
    known_rank,
    linear_model,
    op_types,
    parameters,
    parse,
    run_ort,
    uniform,
)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(21)


def spectrum(values: list[float], m: int, n: int, seed: int = 0) -> Array:
    """A weight with these singular values."""
    rng = np.random.default_rng(seed)
    u, _, vt = np.linalg.svd(rng.standard_normal((m, n)), full_matrices=False)
    product: Array = (u[:, : len(values)] * values) @ vt[: len(values)]
    return product.astype(np.float32)


def only_layer(weight: Array, **options: Any) -> Layer:
    (layer,) = factored(linear_model(weight), **options).report.layers
    return layer


# --- the rank


@settings(max_examples=25)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.floats(0.05, 1.0),
    st.sampled_from([-1.0, -0.5, 0.0, 0.1, 0.5, 0.9]),
    st.sampled_from([1, 2, 8]),
    st.integers(0, 2**32 - 1),
)
def test_energy_is_met_within_the_gain_limit(
    m: int, n: int, energy: float, min_gain: float, multiple: int, seed: int
) -> None:
    weight = np.random.default_rng(seed).standard_normal((m, n)).astype(np.float32)
    values = np.linalg.svd(weight.astype(np.float64), compute_uv=False) ** 2
    share = np.cumsum(values) / values.sum()
    needed = int(np.argmax(share >= energy - 1e-9)) + 1
    layer = only_layer(weight, energy=energy, min_gain=min_gain, rank_multiple=multiple)
    budget = (1 - min_gain) * m * n
    if layer.rank is None:
        assert needed * (m + n) > budget
        return
    assert layer.rank <= min(m, n)
    assert layer.rank * (m + n) <= budget + 1e-6
    assert layer.energy is not None
    assert layer.weight_error is not None
    assert layer.energy >= energy - 1e-6
    assert layer.energy == pytest.approx(share[layer.rank - 1], abs=1e-6)
    assert layer.weight_error**2 == pytest.approx(1 - layer.energy, abs=1e-5)
    assert needed - 1 <= layer.rank < needed + multiple + 1
    if multiple == 1 and layer.rank > 1:
        assert share[layer.rank - 2] < energy + 1e-6


@settings(max_examples=25)
@given(
    st.integers(2, 60),
    st.integers(2, 60),
    st.floats(0.01, 1.0),
    st.sampled_from([-1.0, 0.0, 0.1, 0.5]),
    st.sampled_from([1, 8]),
)
def test_keep_is_a_budget(m: int, n: int, keep: float, min_gain: float, multiple: int) -> None:
    weight = np.random.default_rng(m * n).standard_normal((m, n)).astype(np.float32)
    layer = only_layer(weight, keep=keep, min_gain=min_gain, rank_multiple=multiple)
    limit = min(keep, 1 - min_gain) * m * n
    if layer.rank is None:
        assert m + n > limit - 1e-6
        return
    pair = layer.rank * (m + n)
    assert pair <= (1 - min_gain) * m * n + 1e-6
    if pair > keep * m * n + 1e-6:  # only to reach the next multiple
        assert layer.rank % multiple == 0
        assert (layer.rank - multiple) * (m + n) < keep * m * n
    elif multiple == 1:
        assert pair + m + n > limit or layer.rank == min(m, n)


@pytest.mark.parametrize(("size", "rank", "after"), [(1000, 10, 20_000)])
def test_parameters_of_a_given_rank(size: int, rank: int, after: int) -> None:
    rng = np.random.default_rng(0)
    model = linear_model(uniform((size, size), rng))
    result = factored(model, rank=rank)
    (layer,) = result.report.layers
    assert (layer.parameters_before, layer.parameters_after) == (size * size, after)
    assert parameters(model) == size * size
    assert parameters(result.model) == after
    totals = result.report.totals
    assert (totals.parameters_before, totals.parameters_after) == (size * size, after)
    assert totals.linear_parameters_after == after


def test_parameters_of_rank_512_of_4096() -> None:
    result = factored(linear_model(np.zeros((4096, 4096), np.float16)), rank=512, dry_run=True)
    (layer,) = result.report.layers
    assert (layer.parameters_before, layer.parameters_after) == (16_777_216, 4_194_304)
    assert result.report.output.parameters == 4_194_304


@pytest.mark.parametrize("r", [1, 3, 5])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_full_energy_of_a_low_rank_weight_is_its_rank(
    r: int, dtype: type, rng: np.random.Generator
) -> None:
    layer = only_layer(known_rank(40, 24, r, rng, dtype), energy=1.0, rank_multiple=1)
    assert layer.rank == r
    assert layer.energy == 1.0
    assert f"energy 1 needs rank {r}" in layer.reason


def test_a_given_rank_is_not_rounded(rng: np.random.Generator) -> None:
    assert only_layer(uniform((64, 64), rng), rank=5, rank_multiple=8).rank == 5


def test_a_chosen_rank_is_rounded_and_says_so(rng: np.random.Generator) -> None:
    layer = only_layer(known_rank(64, 64, 5, rng), energy=1.0)
    assert layer.rank == 8
    assert layer.reason == "energy 1 needs rank 5, rounded to 8"


def test_a_rank_above_full_rank_is_full_rank(rng: np.random.Generator) -> None:
    layer = only_layer(uniform((12, 20), rng), rank=100, min_gain=-1.0)
    assert layer.rank == 12
    assert layer.reason == "rank 100 was given, 12 is full rank"
    assert layer.weight_error is not None
    assert layer.weight_error < 1e-6


# --- reasons


def test_a_layer_that_gains_nothing_says_how_far_it_is(rng: np.random.Generator) -> None:
    weight = spectrum([1.0] * 40, 40, 40)
    layer = only_layer(weight, energy=0.9)
    assert (layer.status, layer.rank, layer.energy) == ("dense", None, None)
    # 36 of 40 equal values hold 0.9; break-even is 20; 0.9 of that is 18.
    assert layer.reason == (
        "energy 0.9 needs rank 36, 1.80 of break-even (20.0); 18 is the largest that saves 10 %"
    )
    assert layer.parameters_after == layer.parameters_before == 1600


def test_a_given_rank_above_the_limit(rng: np.random.Generator) -> None:
    layer = only_layer(uniform((40, 40), rng), rank=19)
    assert layer.reason == ("rank 19 is above 18, the largest that saves 10 % (break-even 20.0)")


@pytest.mark.parametrize(("m", "n"), [(1, 9), (9, 1), (2, 2), (1, 1)])
@pytest.mark.parametrize("goal", [{"energy": 0.5}, {"rank": 1}, {"keep": 0.9}])
def test_too_small_to_gain(m: int, n: int, goal: dict[str, Any], rng: np.random.Generator) -> None:
    layer = only_layer(uniform((m, n), rng), **goal)
    assert layer.status == "dense"
    assert f"not even rank 1 of {m}×{n} saves 10 %" in layer.reason


@pytest.mark.parametrize(("m", "n"), [(1, 9), (9, 1), (1, 1)])
def test_a_single_row_or_column_is_factored_where_growth_is_allowed(
    m: int, n: int, rng: np.random.Generator
) -> None:
    model = linear_model(uniform((m, n), rng))
    result = factored(model, energy=1.0, min_gain=-1.0)
    (layer,) = result.report.layers
    assert layer.rank == 1
    assert_same(model, result.model, {"x": uniform((3, m), rng)})


def test_a_share_too_small_for_rank_one(rng: np.random.Generator) -> None:
    layer = only_layer(uniform((20, 20), rng), keep=0.05)
    assert layer.reason == "not even rank 1 of 20×20 keeps within 0.05"


def test_a_share_above_the_gain_limit_says_what_decided(rng: np.random.Generator) -> None:
    layer = only_layer(uniform((20, 20), rng), keep=1.0, min_gain=0.5, rank_multiple=1)
    assert layer.rank == 5
    assert "50 %" in layer.reason
    assert "keeps 1 of the parameters" not in layer.reason


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("goal", [{"energy": 0.5}, {"rank": 2}, {"keep": 0.5}])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_nan_and_inf_stay_dense(
    bad: float, goal: dict[str, Any], dtype: type, rng: np.random.Generator
) -> None:
    weight = uniform((24, 16), rng, dtype)
    weight[3, 4] = bad
    layer = only_layer(weight, **goal)
    assert layer.status == "dense"
    assert layer.reason == "W holds NaN or Inf"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_zeros_get_the_smallest_pair(dtype: type, rng: np.random.Generator) -> None:
    model = linear_model(np.zeros((24, 16), dtype))
    result = factored(model, energy=0.9, rank_multiple=1)
    (layer,) = result.report.layers
    assert (layer.rank, layer.energy, layer.weight_error) == (1, 1.0, 0.0)
    assert "all zeros" in layer.reason
    assert not run_ort(result.model, {"x": uniform((3, 24), rng, dtype)})["y"].any()


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
def test_empty_weights_stay(shape: tuple[int, int]) -> None:
    model = linear_model(np.zeros(shape, np.float32))
    result = factored(model, energy=0.9)
    (layer,) = result.report.layers
    assert layer.status == "dense"
    assert layer.reason == f"{shape[0]}×{shape[1]} is empty"
    assert op_types(result.model) == ["MatMul"]


@pytest.mark.parametrize("exponent", [700, -600])
def test_the_scale_of_a_float64_weight_does_not_matter(
    exponent: int, rng: np.random.Generator
) -> None:
    """Squares of these leave the range of float64."""
    layer = only_layer(
        known_rank(24, 16, 3, rng, np.float64, scale=2.0**exponent), energy=1.0, rank_multiple=1
    )
    assert layer.rank == 3
    assert layer.energy == 1.0
    assert layer.weight_error is not None
    assert layer.weight_error < 1e-12
    assert "zeros" not in layer.reason


# --- include and exclude


def scoped(rng: np.random.Generator) -> onnx.ModelProto:
    model = parse(
        """<ir_version: 10, opset_import: ["": 17]>
        g (float[3, 16] x) => (float[3, 16] y) {
            h = MatMul(x, A)
            k = MatMul(h, B)
            y = MatMul(k, C)
        }""",
        {name: known_rank(16, 16, 2, rng) for name in "ABC"},
    )
    scopes = ["encoder.layer.0.query", "encoder.layer.1.query", "classifier"]
    for index, (node, scope) in enumerate(zip(model.graph.node, scopes, strict=True)):
        node.name = f"node_linear_{index}"
        node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=str(["", scope, "linear"]))
    return model


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ({}, "ABC"),
        ({"include": ["node_linear_1"]}, "B"),
        ({"include": ["encoder.*"]}, "AB"),
        ({"include": ["*query", "classifier"]}, "ABC"),
        ({"exclude": ["classifier"]}, "AB"),
        ({"exclude": ["node_linear_?"]}, ""),
        ({"include": ["encoder.*"], "exclude": ["*.1.*"]}, "A"),
        ({"include": ["linear"]}, "ABC"),
    ],
)
def test_globs_on_names_and_scopes(
    options: dict[str, Any], chosen: str, rng: np.random.Generator
) -> None:
    report = factored(scoped(rng), rank=2, **options).report
    assert "".join(row.weight for row in report.layers if row.status == "factored") == chosen
    for row in report.layers:
        if row.status == "dense":
            assert "include=" in row.reason or "exclude=" in row.reason


def test_the_reason_names_the_glob(rng: np.random.Generator) -> None:
    rows = factored(scoped(rng), rank=2, exclude=["class*"]).report.layers
    assert rows[2].reason == "left out by exclude='class*'"
    rows = factored(scoped(rng), rank=2, include=["class*"]).report.layers
    assert rows[0].reason == "no glob of include=… matches it"


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_glob_without_a_match_lists_near_names(option: str, rng: np.random.Generator) -> None:
    with pytest.raises(InputError, match=rf"{option}='clasifier'.*near names: 'classifier'"):
        factored(scoped(rng), rank=2, **{option: ["clasifier"]})


# --- options out of range


def test_a_matrix_that_embeds_too_is_no_part_of_a_share(rng: np.random.Generator) -> None:
    text = """<ir_version: 8, opset_import: ["": 17]>
    agraph (int64[N] i) => (float[N, 80] y) <float[80, 24] table, float[24, 24] w>
    { e = Gather(table, i)
      h = MatMul(e, w)
      t = Transpose<perm = [1, 0]>(table)
      y = MatMul(h, t) }"""
    shapes = {"table": (80, 24), "w": (24, 24)}
    model = parse(text, {name: rng.normal(size=s).astype("f4") for name, s in shapes.items()})
    data = {"i": rng.integers(0, 80, (40,))}
    result = compress(
        model, data=data, keep=0.6, rank_multiple=1, simplify=False, bench=False, samples=8
    )
    totals, layers = result.report.totals, {own.weight: own for own in result.report.layers}
    assert layers["table"].status == "dense"
    assert totals.linear_parameters_before == 24 * 24
    assert totals.linear_parameters_after == 7 * (24 + 24)  # at most 345.6
    assert totals.parameters_before == 80 * 24 + 24 * 24
