"""A pair stays a pair: a second run makes no chain of four, and no larger file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_lowrank import compress
from tests.helpers.models import (
    all_node_protos,
    as_proto,
    assert_same,
    factored,
    known_rank,
    op_types,
    parse,
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


def without_provenance(proto: onnx.ModelProto) -> onnx.ModelProto:
    """As tools leave it that drop what they do not know."""
    stripped = onnx.ModelProto()
    stripped.CopyFrom(proto)
    for number, node in enumerate(all_node_protos(stripped)):
        del node.metadata_props[:]
        node.name = f"n{number}"
    return stripped


@pytest.mark.parametrize("kept", [True, False], ids=["marked", "not marked"])
@pytest.mark.parametrize("make", [two_layers, joint, tied])
def test_a_pair_stays(
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
