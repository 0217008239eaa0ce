"""A bias brings along what a pair loses of the mean of its inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_lowrank import compress
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.maps.find import find
from onnx_lowrank.maps.forms import all_forms, chosen_forms
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.moments import Accumulator, Moments
from onnx_lowrank.numerics.ridge import Regression
from onnx_lowrank.numerics.stacks import (
    StackComponents,
    achieved_error,
    fitted_pair,
    lost_energies,
    shift_of,
    squares,
)
from tests.helpers.models import (
    as_proto,
    assert_same,
    factored,
    parse,
    run_ort,
    uniform,
)

HEAD = '<ir_version: 8, opset_import: ["": 17]>'
M, N, RANK = 24, 20, 3


def model_of(body: str, x: str, weights: dict[str, Array], out: str = "") -> onnx.ModelProto:
    model = parse(f"{HEAD} agraph (float[{x}] x) => (float y{out}) {{ {body} }}", weights)
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    return model


def matrix(rng: np.random.Generator, *shape: int) -> Array:
    return uniform(shape, rng)


def bias_name(model: onnx.ModelProto, ops: tuple[str, ...] = ("all",)) -> str | None:
    graph = ir.from_proto(model)
    groups = find(graph, Constants(graph, False), all_forms(), chosen_forms(ops)).groups
    return groups[0].bias.name if groups[0].bias is not None else None


# --- which constant it is

FOUND = {
    "Add behind": ("p = MatMul(x, W) y = Add(p, b)", "K,24", (N,)),
    "Add, other way round": ("p = MatMul(x, W) y = Add(b, p)", "2,K,24", (1, N)),
    "Gemm": ("y = Gemm(x, W, b)", "K,24", (N,)),
    "Gemm, a row": ("y = Gemm(x, W, b)", "K,24", (1, N)),
    "behind a chain": ("c = Identity(b) p = MatMul(x, W) y = Add(p, c)", "K,24", (N,)),
}


@pytest.mark.parametrize("name", FOUND)
def test_bias_is_found(name: str, rng: np.random.Generator) -> None:
    body, x, shape = FOUND[name]
    model = model_of(body, x, {"W": matrix(rng, M, N), "b": matrix(rng, *shape)})
    assert bias_name(model) == "b"


NOT_FOUND = {
    "none": ("y = MatMul(x, W)", ()),
    "a scalar": ("p = MatMul(x, W) y = Add(p, b)", ()),
    "one for each row": ("p = MatMul(x, W) y = Add(p, b)", (4, 1)),
    "a matrix": ("p = MatMul(x, W) y = Add(p, b)", (4, N)),
    "no sum": ("p = MatMul(x, W) y = Mul(p, b)", (N,)),
    "scaled": ("y = Gemm<beta = 0.5>(x, W, b)", (N,)),
    "product scaled": ("y = Gemm<alpha = 0.5>(x, W, b)", (N,)),
    "read twice": ("p = MatMul(x, W) q = Add(p, b) y = Mul(q, b)", (N,)),
    "product read twice": ("p = MatMul(x, W) q = Add(p, b) y = Mul(q, p)", (N,)),
    "weight read twice": ("p = MatMul(x, W) q = Add(p, b) r = MatMul(x, W) y = Mul(q, r)", (N,)),
}


@pytest.mark.parametrize("name", NOT_FOUND)
def test_what_is_no_bias_of_its_own(name: str, rng: np.random.Generator) -> None:
    body, shape = NOT_FOUND[name]
    model = model_of(body, "4,24", {"W": matrix(rng, M, N), "b": matrix(rng, *shape)})
    assert bias_name(model) is None


def test_a_product_that_is_given_out_has_none(rng: np.random.Generator) -> None:
    weights = {"W": matrix(rng, M, N), "b": matrix(rng, N)}
    model = model_of("p = MatMul(x, W) y = Add(p, b)", "4,24", weights, ", float p")
    assert bias_name(model) is None


def test_bias_inside_a_branch_is_left(rng: np.random.Generator) -> None:
    body = """
        s = ReduceSum<keepdims = 0>(x) z = Constant<value = float {0.0}>() c = Greater(s, z)
        y = If(c) <
            then_branch = g1 () => (float[4, 20] t) { p = MatMul(x, W) t = Add(p, b) },
            else_branch = g2 () => (float[4, 20] e) { e = Expand(z2, sh) }
        >
    """
    weights = {
        "W": matrix(rng, M, N), "b": matrix(rng, N), "z2": np.zeros(1, np.float32),
        "sh": np.array([4, 20], np.int64),
    }  # fmt: skip
    assert bias_name(model_of(body, "4,24", weights)) is None


# --- numbers


def moments_of(rows: Array) -> Moments:
    adding = Accumulator(rows.shape[1])
    adding.add(rows)
    found = adding.moments()
    assert found is not None
    return found


def around(rng: np.random.Generator, count: int, rank: int = RANK, size: int = M) -> Array:
    """Rows that differ from their mean, which is large, by a few directions."""
    mean, basis = 3.0 * rng.standard_normal(size), rng.standard_normal((rank, size))
    return mean + rng.standard_normal((count, rank)) @ basis


@given(seed=st.integers(0, 2**32 - 1), rank=st.integers(1, 6))
def test_predicted_is_achieved(seed: int, rank: int) -> None:
    rng = np.random.default_rng(seed)
    rows = around(rng, 2000, 8)
    weight = rng.standard_normal((1, M, N))
    plain = moments_of(rows)
    own = Moments(plain.second, plain.mean, plain.rows, plain.mean)
    first, second = fitted_pair(weight, [own], rank, np.float64)
    shift = shift_of(weight, first, second, [own])
    assert shift is not None
    energies = squares(weight, [own])
    outputs = rows @ weight[0]
    off = outputs - rows @ first[0] @ second[0] - shift
    found = np.linalg.norm(off) / np.linalg.norm(outputs)
    assert achieved_error(weight, first, second, [plain], shift) == pytest.approx(found, rel=1e-6)
    tail = np.sqrt(energies[rank:].sum() / energies.sum())
    assert found == pytest.approx(tail, rel=1e-4, abs=1e-6)
    bases = StackComponents(weight, [own]).bases(min(M, N))
    lost = lost_energies(weight, bases, [own], [plain])
    tails = np.concatenate([np.cumsum(energies[::-1])[::-1], [0.0]])
    np.testing.assert_allclose(lost[1:], tails[1:], atol=1e-8 * energies[0])
    np.testing.assert_allclose(lost, lost_energies(weight, bases, [own]), atol=1e-8 * energies[0])
    # A pair that brings the mean itself, as it has to without a bias, is further off.
    other = fitted_pair(weight, [plain], rank, np.float64)
    assert found < achieved_error(weight, *other, [plain])


@pytest.mark.parametrize("biased", [False, True])
def test_ridge_with_an_intercept(biased: bool, rng: np.random.Generator) -> None:
    x = rng.normal(size=(300, 5)).astype("f4") + 2.0
    true, more = rng.normal(size=(5, 3)), rng.normal(size=3)
    sums = Regression(5, 3, biased=biased)
    sums.add(x, (x @ true + more).astype("f4"))
    found = sums.solution(np.zeros((5, 3)), 1e-9)
    assert found is not None
    shift = sums.shift(found, np.eye(3))
    if not biased:
        assert shift is None
        assert sums.error(found, np.eye(3)) > 1e-4
        return
    assert shift is not None
    np.testing.assert_allclose(found, true, atol=1e-3)
    np.testing.assert_allclose(shift, more, atol=1e-2)
    assert sums.error(found, np.eye(3), shift) == pytest.approx(0.0, abs=1e-6)
    apart = x.astype(np.float64) @ true + more - 1.0
    whole = float(np.sum((x.astype(np.float64) @ true + more) ** 2))
    zero = np.zeros((5, 1)), np.zeros((1, 3))
    expected = np.sum((apart + 1.0 - 0.5) ** 2) / whole
    assert sums.error(*zero, np.full(3, 0.5)) == pytest.approx(expected, rel=1e-5)


# --- whole models

BODIES = {
    "MatMul and Add": ("h = MatMul(x, W) y = Add(h, b)", (M, N)),
    "Gemm": ("y = Gemm(x, W, b)", (M, N)),
    "Gemm transB": ("y = Gemm<transB = 1>(x, W, b)", (N, M)),
}


def samples_in(folder: Path, rows: Array) -> Path:
    folder.mkdir(exist_ok=True)
    for index in range(0, len(rows), 8):
        np.savez(folder / f"{index:04}.npz", x=rows[index : index + 8].astype("f4"))
    return folder


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("refit", [False, True])
def test_the_mean_costs_no_rank(
    name: str, refit: bool, tmp_path: Path, rng: np.random.Generator
) -> None:
    body, shape = BODIES[name]
    model = model_of(body, "K,24", {"W": matrix(rng, *shape), "b": matrix(rng, N)})
    rows = around(rng, 400)
    data = samples_in(tmp_path / "data", rows)
    result = factored(model, data=data, rank=RANK, refit=refit)
    feed = {"x": rows[:50].astype("f4")}
    before, after = (next(iter(run_ort(m, feed).values())) for m in (model, result.model))
    assert np.linalg.norm(before - after) < 1e-5 * np.linalg.norm(before)
    (layer,) = result.report.layers
    assert layer.rank == RANK
    assert layer.output_error is not None
    assert layer.output_error < 1e-3  # moments are sums in float32
    assert any("mean" in note and "bias" in note for note in result.report.notes)
    # No node and no constant more than with any pair.
    kept = {tensor.name: tensor for tensor in as_proto(result.model).graph.initializer}
    assert len(kept) == 3
    assert onnx.numpy_helper.to_array(kept["b"]).shape == (N,)
    # Without a bias of its own the same rank has to bring the mean as well.
    plain = factored(model, data=data, rank=RANK, calibrate=False)
    off = next(iter(run_ort(plain.model, feed).values())) - before
    assert np.linalg.norm(off) > 1e-2 * np.linalg.norm(before)


def test_convolution(tmp_path: Path, rng: np.random.Generator) -> None:
    weights = {"W": matrix(rng, N, M, 1, 1), "b": matrix(rng, N)}
    model = model_of("y = Conv(x, W, b)", "K,24,5,5", weights)
    rows = around(rng, 2000).reshape(80, 25, M).transpose(0, 2, 1).reshape(80, M, 5, 5)
    result = factored(model, data=samples_in(tmp_path / "d", rows), rank=RANK, ops=("conv",))
    assert_same(model, result.model, {"x": rows[:4].astype("f4")}, within=1e-5)


def test_half_precision_and_a_constant_node(tmp_path: Path, rng: np.random.Generator) -> None:
    bias = ", ".join(f"{value:.3f}" for value in rng.uniform(-1, 1, N))
    body = f"c = Constant<value = float[20] {{{bias}}}>() d = Cast<to = 10>(c) h = MatMul(x, W) "
    body += "y = Add(h, d)"
    model = parse(
        f"{HEAD} agraph (float16[K, 24] x) => (float16[K, 20] y) {{ {body} }}",
        {"W": matrix(rng, M, N).astype(np.float16)},
    )
    folder = tmp_path / "data"
    folder.mkdir()
    rows = around(rng, 400).astype(np.float16)
    for index in range(0, 400, 8):
        np.savez(folder / f"{index}.npz", x=rows[index : index + 8])
    result = factored(model, data=folder, rank=RANK)
    feed = {"x": rows[:40]}
    before, after = (next(iter(run_ort(m, feed).values())) for m in (model, result.model))
    assert after.dtype == np.float16
    off = before.astype("f4") - after.astype("f4")
    assert np.linalg.norm(off) < 5e-3 * np.linalg.norm(before.astype("f4"))


def test_groups_of_one_activation_agree(tmp_path: Path, rng: np.random.Generator) -> None:
    # One of the two has no bias: they might share a factor, so both are fitted to all of x.
    body = "h = MatMul(x, W) g = Add(h, b) k = MatMul(x, V) y = Mul(g, k)"
    weights = {"W": matrix(rng, M, N), "V": matrix(rng, M, N), "b": matrix(rng, N)}
    data = samples_in(tmp_path / "data", around(rng, 400))
    result = factored(model_of(body, "K,24", weights), data=data, rank=RANK)
    errors = [layer.output_error for layer in result.report.layers]
    assert all(error is not None and error > 1e-3 for error in errors)


def test_damage_counts_the_bias_in(tmp_path: Path, rng: np.random.Generator) -> None:
    body = "h = Gemm(x, W, b) g = Relu(h) y = Gemm(g, V, c)"
    weights = {
        "W": matrix(rng, M, 40), "b": matrix(rng, 40), "V": matrix(rng, 40, N), "c": matrix(rng, N)
    }  # fmt: skip
    model = model_of(body, "K,24", weights)
    data = samples_in(tmp_path / "data", around(rng, 800, 10))
    result = compress(model, data=data, keep=0.5, bench=False, rank_multiple=1)
    goal = result.report.goal
    assert goal is not None
    assert goal.achieved_damage is not None
    assert goal.predicted_damage is not None
    assert 0.3 < goal.achieved_damage / goal.predicted_damage < 3.0


def test_maps_that_share_a_factor_have_biases_of_their_own(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    body = "p = MatMul(x, q) hq = Add(p, a) hk = Gemm(x, k, b) hv = Gemm(x, v, c) "
    body += "g = Mul(hq, hk) y = Add(g, hv)"
    plane = rng.normal(size=(M, 6))
    weights = {
        name: 0.2 * (plane @ rng.normal(size=(6, N)) + 0.02 * rng.normal(size=(M, N)))
        for name in "qk"
    }
    weights["v"] = 0.2 * rng.normal(size=(M, N))
    weights |= {name: rng.normal(size=N) for name in "abc"}
    model = model_of(body, "K,24", {name: array.astype("f4") for name, array in weights.items()})
    rows = rng.normal(size=(800, M)) + 3.0 * rng.normal(size=M)
    data = samples_in(tmp_path / "data", rows)
    result = compress(model, data=data, keep=0.45, bench=False, rank_multiple=1, simplify=False)
    layers = {layer.weight: layer for layer in result.report.layers}
    assert "whose first factor it shares" in layers["q"].reason
    # Their ranks are those that the spread asks for: the mean, which is most of x, is exact.
    mean = {"x": rows.mean(axis=0, keepdims=True).astype("f4")}
    before, after = (next(iter(run_ort(m, mean).values())) for m in (model, result.model))
    assert np.linalg.norm(before - after) < 2e-2 * np.linalg.norm(before)
    check = result.report.check
    assert check is not None
    assert check.providers[0].outputs[0].relative_l2 < 0.2
    goal = result.report.goal
    assert goal is not None
    assert goal.achieved_damage is not None
    assert goal.predicted_damage is not None
    assert 0.3 < goal.achieved_damage / goal.predicted_damage < 3.0
