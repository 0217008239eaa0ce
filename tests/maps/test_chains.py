"""A pair stays a pair: a second run makes no chain of four, and no larger file.

Where it can have a lower rank, that of the product of its factors, it gets one.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnx_lowrank import compress
from onnx_lowrank.maps.emit import PAIR
from onnx_lowrank.numerics.arrays import Array
from tests.helpers.models import (
    all_node_protos,
    as_proto,
    assert_same,
    factored,
    known_rank,
    op_types,
    parse,
    run_ort,
    uniform,
)
from tests.helpers.onnxsim_here import onnxsim_here

__all__ = ["onnxsim_here"]

D, RANK = 32, 4


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)


def model(rng: np.random.Generator, text: str, **weights: int) -> onnx.ModelProto:
    """A graph of "x" [3, D] and "y" with weights of rank 4, their sizes given by their columns."""
    return parse(
        f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[3, {D}] x) => (float[3, {D}] y) {{ {text} }}""",
        {name: known_rank(D, n, RANK, rng, scale=2**-3) for name, n in weights.items()},
    )


def two_layers(rng: np.random.Generator) -> onnx.ModelProto:
    return model(rng, "h = MatMul(x, W) r = Relu(h) y = Gemm(r, V)", W=D, V=D)


def joint(rng: np.random.Generator) -> onnx.ModelProto:
    """Two maps of one activation that may share their first factor."""
    return model(rng, "p = MatMul(x, W) q = MatMul(x, V) y = Mul(p, q)", W=D, V=D)


def tied(rng: np.random.Generator) -> onnx.ModelProto:
    return model(
        rng, "h = MatMul(x, W) r = Relu(h) T = Transpose<perm = [1, 0]>(W) y = MatMul(r, T)", W=D
    )


def shared(rng: np.random.Generator) -> onnx.ModelProto:
    """Two maps that share their first factor."""
    dense = joint(rng)
    del dense.graph.node[:]
    dense.graph.node.extend(
        parse(
            f"""<ir_version: 8, opset_import: ["": 17]>
            g (float[3, {D}] x) => (float[3, {D}] y) {{
                h = MatMul(x, A) p = MatMul(h, B) q = MatMul(h, C) y = Mul(p, q)
            }}"""
        ).graph.node
    )
    del dense.graph.initializer[:]
    for name, shape in {"A": (D, RANK), "B": (RANK, D), "C": (RANK, D)}.items():
        dense.graph.initializer.append(onnx.numpy_helper.from_array(uniform(shape, rng), name))
    return dense


def without_provenance(proto: onnx.ModelProto) -> onnx.ModelProto:
    """As tools leave it that drop what they do not know."""
    stripped = onnx.ModelProto()
    stripped.CopyFrom(proto)
    for number, node in enumerate(all_node_protos(stripped)):
        del node.metadata_props[:]
        node.name = f"n{number}"
    return stripped


@pytest.mark.parametrize("kept", [True, False], ids=["marked", "not marked"])
@pytest.mark.parametrize("make", [shared, tied])
def test_a_pair_with_other_readers_stays(
    make: Callable[[np.random.Generator], onnx.ModelProto], kept: bool, rng: np.random.Generator
) -> None:
    first = as_proto(factored(make(rng), rank=RANK).model)
    given = first if kept else without_provenance(first)
    result = factored(given, rank=1, min_gain=-1)
    after = as_proto(result.model)
    assert after.graph.node == given.graph.node
    assert after.graph.initializer == given.graph.initializer
    reasons = [layer.reason for layer in result.report.layers]
    assert all(f"of a pair of rank {RANK} already" in reason for reason in reasons)


@pytest.mark.usefixtures("onnxsim_here")
@pytest.mark.parametrize("make", [two_layers, joint])
def test_a_second_run_makes_the_file_no_larger(
    make: Callable[[np.random.Generator], onnx.ModelProto], tmp_path: Path, rng: np.random.Generator
) -> None:
    onnx.save(make(rng), tmp_path / "0.onnx")
    for number in range(2):
        result = compress(tmp_path / f"{number}.onnx", energy=0.99, bench=False, samples=2)
        result.save(tmp_path / f"{number + 1}.onnx")
    sizes = [(tmp_path / f"{number}.onnx").stat().st_size for number in range(3)]
    assert sizes[2] <= sizes[1] < sizes[0]
    once, twice = (onnx.load(tmp_path / f"{number}.onnx") for number in (1, 2))
    assert op_types(twice) == op_types(once)
    assert_same(once, twice, {"x": uniform((3, D), rng)})


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("h = MatMul(x, W) y = MatMul(h, V)", {"W": D, "V": D}),
        ("h = MatMul(x, W) b = Add(h, h) y = MatMul(b, V)", {"W": D, "V": D}),
    ],
    ids=["as wide inside", "something between"],
)
def test_other_neighbours_are_factored(
    text: str, weights: dict[str, int], rng: np.random.Generator
) -> None:
    result = factored(model(rng, text, **weights), rank=RANK)
    assert [layer.rank for layer in result.report.layers] == [RANK, RANK]


def test_a_narrow_product_that_something_else_reads_is_no_pair(rng: np.random.Generator) -> None:
    narrow = parse(
        f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[3, {D}] x) => (float[3, {D}] y, float[3, 8] h) {{
            h = MatMul(x, W)
            y = MatMul(h, V)
        }}""",
        {"W": known_rank(D, 8, 2, rng), "V": known_rank(8, D, 2, rng)},
    )
    result = factored(narrow, rank=2)
    assert [layer.rank for layer in result.report.layers] == [2, 2]


def falling(m: int, n: int, rng: np.random.Generator) -> Array:
    """A matrix of full rank whose singular values fall."""
    u, s, v = np.linalg.svd(rng.standard_normal((m, n)), full_matrices=False)
    return np.asarray((u * s * 0.8 ** np.arange(len(s))) @ v, np.float32)


def own_pairs(rng: np.random.Generator, text: str = "", **more: Array) -> onnx.ModelProto:
    """Two pairs of rank 16 as a run leaves them."""
    text = text or "h = MatMul(x, W) r = Relu(h) y = Gemm<transB = 1>(r, V, c)"
    dense = parse(
        f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[batch, {D}] x) => (float[batch, 64] y) {{ {text} }}""",
        {"W": falling(D, 48, rng), "V": falling(64, 48, rng), "c": uniform((64,), rng), **more},
    )
    return as_proto(factored(dense, rank=16, min_gain=-1).model)


def product(model: onnx.ModelProto, number: int) -> Array:
    """``A·B`` of a pair, in × out."""
    found: list[Array] = []
    for node in model.graph.node:
        if node.op_type in ("MatMul", "Gemm"):
            held = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
            turned = any(a.name == "transB" and a.i for a in node.attribute)
            found.append(held[node.input[1]].T if turned else held[node.input[1]])
    made = found[2 * number].astype(np.float64) @ found[2 * number + 1].astype(np.float64)
    return np.asarray(made, np.float64)


@pytest.mark.parametrize("kept", [True, False], ids=["marked", "not marked"])
def test_a_pair_gets_the_best_lower_rank_of_its_product(
    kept: bool, rng: np.random.Generator
) -> None:
    given = own_pairs(rng) if kept else without_provenance(own_pairs(rng))
    result = factored(given, rank=5)
    after = as_proto(result.model)
    assert op_types(after) == op_types(given)
    assert [node.name for node in after.graph.node] == [node.name for node in given.graph.node]
    names = {tensor.name for tensor in given.graph.initializer}
    assert {tensor.name for tensor in after.graph.initializer} == names
    ranked = [layer for layer in result.report.layers if layer.rank is not None]
    assert [layer.rank for layer in ranked] == [5, 5]
    assert [layer.shape for layer in ranked] == [(D, 48), (48, 64)]
    assert [layer.parameters_before for layer in ranked] == [16 * (D + 48), 16 * (48 + 64)]
    assert [layer.parameters_after for layer in ranked] == [5 * (D + 48), 5 * (48 + 64)]
    for number, layer in enumerate(ranked):
        before, now = product(given, number), product(after, number)
        assert np.linalg.matrix_rank(now, tol=1e-4) == 5
        squares = np.linalg.svd(before, compute_uv=False) ** 2
        best = np.sqrt(squares[5:].sum() / squares.sum())
        error = np.linalg.norm(before - now) / np.linalg.norm(before)
        assert error == pytest.approx(best, rel=1e-4)
        assert layer.weight_error == pytest.approx(best, rel=1e-4)
        assert layer.energy is None or layer.energy == pytest.approx(1 - best**2, rel=1e-4)
    totals = result.report.totals
    assert totals.linear_parameters_before == 16 * (D + 48 + 48 + 64)
    assert totals.linear_parameters_after == 5 * (D + 48 + 48 + 64)
    sizes = [sum(np.prod(t.dims) for t in m.graph.initializer) for m in (given, after)]
    assert sizes[0] - sizes[1] == totals.parameters_before - totals.parameters_after


def test_its_rank_is_that_of_the_product_and_of_what_is_multiplied(
    rng: np.random.Generator,
) -> None:
    given = own_pairs(rng)
    plain = factored(given, energy=0.95, rank_multiple=1)
    squares = np.linalg.svd(product(given, 0), compute_uv=False) ** 2
    needed = int(np.argmax(np.cumsum(squares) >= 0.95 * squares.sum())) + 1
    assert plain.report.layers[1].rank == needed
    plane = rng.standard_normal((2, D))
    x = (rng.standard_normal((200, 2)) @ plane).astype(np.float32)
    fitted = compress(
        given,
        energy=0.9999,
        rank_multiple=1,
        data={"x": x},
        simplify=False,
        bench=False,
        effort="quick",
    )
    assert fitted.report.layers[1].rank == 2
    assert fitted.report.check is not None
    assert fitted.report.check.providers[0].outputs[0].relative_l2 < 0.05


@pytest.mark.parametrize("data", [False, True])
def test_a_second_run_within_a_budget(data: bool, rng: np.random.Generator, tmp_path: Path) -> None:
    given = own_pairs(rng)
    onnx.save(given, tmp_path / "1.onnx")
    samples: dict[str, Any] = {"data": {"x": uniform((80, D), rng)}} if data else {}
    result = compress(
        tmp_path / "1.onnx", keep=0.5, bench=False, simplify=False, rank_multiple=2, **samples
    )
    result.save(tmp_path / "2.onnx")
    totals = result.report.totals
    assert totals.linear_parameters_after <= 0.5 * totals.linear_parameters_before
    assert (tmp_path / "2.onnx").stat().st_size < (tmp_path / "1.onnx").stat().st_size
    assert op_types(onnx.load(tmp_path / "2.onnx")) == op_types(given)
    assert totals.macs_after is not None
    assert totals.macs_after * 2 <= totals.macs_before  # type: ignore[operator]
    again = compress(tmp_path / "1.onnx", recipe=result.recipe, bench=False, **samples)
    again.save(tmp_path / "3.onnx")
    assert (tmp_path / "3.onnx").read_bytes() == (tmp_path / "2.onnx").read_bytes()


def test_all_of_the_energy_changes_nothing(rng: np.random.Generator) -> None:
    given = own_pairs(rng)
    after = as_proto(factored(given, energy=1.0).model)
    assert after.graph == given.graph
    assert after.metadata_props == given.metadata_props


def test_the_share_of_pairs_that_stay_is_not_asked_for(rng: np.random.Generator) -> None:
    result = compress(shared(rng), keep=0.5, simplify=False, bench=False, samples=2)
    assert result.report.totals.linear_parameters_before == 0
    assert [layer.rank for layer in result.report.layers] == [None, None, None]


@pytest.mark.parametrize(
    "text",
    [
        "h = MatMul(x, W) r = Relu(h) y = Gemm<transB = 1>(r, V, c) z = Identity(h)",
        "h = Gemm<alpha = 0.5>(x, W) r = Relu(h) y = Gemm<transB = 1>(r, V, c)",
    ],
)
def test_scales_and_other_readers_do_not_spoil_it(text: str, rng: np.random.Generator) -> None:
    given = own_pairs(rng, text)
    after = as_proto(factored(given, rank=5).model)
    x = {"x": uniform((3, D), rng)}
    expected = factored(given, rank=16, min_gain=-1).model
    assert_same(given, expected, x)
    first, second = (run_ort(model, x)["y"] for model in (given, after))
    assert np.linalg.norm(first - second) < 0.9 * np.linalg.norm(first)


def test_three_maps_in_a_row_are_left(rng: np.random.Generator) -> None:
    model = parse(
        f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[3, {D}] x) => (float[3, {D}] y) {{
            a = MatMul(x, A)
            b = MatMul(a, B)
            y = MatMul(b, C)
        }}""",
        {"A": falling(D, 8, rng), "B": falling(8, 6, rng), "C": falling(6, D, rng)},
    )
    for node in model.graph.node[:2]:  # as a run of an early version over its own result
        node.metadata_props.add(key=PAIR, value="y")
    result = factored(model, rank=2)
    assert [layer.rank for layer in result.report.layers] == [None, None, None]
    assert_same(model, result.model, {"x": uniform((3, D), rng)})


def test_a_wide_product_is_never_made(rng: np.random.Generator) -> None:
    wide = 6000
    model = parse(
        f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[3, {wide}] x) => (float[3, {wide}] y) {{
            h = MatMul(x, A)
            y = MatMul(h, B)
        }}""",
        {"A": falling(wide, 12, rng), "B": falling(12, wide, rng)},
    )
    tracemalloc.start()
    result = factored(model, rank=4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert result.report.layers[1].rank == 4
    assert peak < 4 * wide * wide / 4  # of the product in float32


@pytest.mark.parametrize("options", [{"exclude": ["n0"]}, {"exclude": ["n1"]}])
def test_both_maps_can_be_left_out(options: dict[str, list[str]], rng: np.random.Generator) -> None:
    given = without_provenance(own_pairs(rng))
    result = factored(given, rank=5, **options)
    assert [layer.rank for layer in result.report.layers] == [None, None, None, 5]
    assert any("left out by" in layer.reason for layer in result.report.layers[:2])


def test_integers_take_the_place_of_both_factors(rng: np.random.Generator) -> None:
    given = own_pairs(rng)
    x = {"x": uniform((3, D), rng)}
    result = factored(given, energy=1.0, weights="8")
    assert_same(given, result.model, x, within=0.02)
    assert [layer.rank for layer in result.report.layers] == [None] * 4
    assert sum(node.op_type == "DequantizeLinear" for node in result.model.graph) == 4
    lower = factored(given, rank=5, weights="8")
    assert [layer.rank for layer in lower.report.layers if layer.rank] == [5, 5]
