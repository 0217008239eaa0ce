"""Weights and pairs as integers: on arrays, and as ONNX Runtime and the reference compute them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_lowrank import compress
from onnx_lowrank.fitting.rounded_weights import (
    centre_of,
    moments_of,
    round_factors,
    round_weight,
    shift_by,
)
from onnx_lowrank.fitting.statistics import Statistics
from onnx_lowrank.graph.opset import raise_opset
from onnx_lowrank.graph.spool import Spool
from onnx_lowrank.maps.format_writer import FormatWriter
from onnx_lowrank.maps.formats import OPSET, Format
from onnx_lowrank.maps.pair import Errors, Factors
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.correction import felt_error
from onnx_lowrank.numerics.moments import Moments
from tests.helpers.models import parse, run_ort, run_reference
from tests.helpers.timed import groups_of

HEAD = '<ir_version: 8, opset_import: ["" : 17]>'


def case(rng: np.random.Generator, m: int = 96, n: int = 64) -> tuple[Array, Moments]:
    x = rng.standard_normal((600, m)) @ (
        rng.standard_normal((m, m)) * np.exp(-np.arange(m) / 12)[:, None]
    )
    matrix = rng.standard_normal((m, n)).astype(np.float32)
    return matrix, Moments(x.T @ x / len(x), x.mean(0), len(x))


def test_the_larger_the_correction_the_smaller_the_error(rng: np.random.Generator) -> None:
    matrix, moments = case(rng)
    errors = [
        felt_error(matrix - round_weight(matrix, Format(4, 32, rank), moments).values(), moments)
        for rank in (0, 4, 16)
    ]
    assert errors[1] < 0.9 * errors[0]
    assert errors[2] < 0.7 * errors[1]


@pytest.mark.parametrize(
    "form",
    [
        *(Format(8, 64), Format(4, 16), Format(4, 32, 4), Format(4, 32, 16)),
        *(Format(8, 64, fused=True), Format(4, 64, 4, fused=True)),
        *(Format(4, 16, zeros=True), Format(4, 32, 4, fused=True, zeros=True)),
    ],
)
@pytest.mark.parametrize("samples", [True, False])
def test_bytes_are_those_that_were_promised(
    form: Format, samples: bool, rng: np.random.Generator
) -> None:
    matrix, moments = case(rng)
    found = round_weight(matrix, form, moments if samples else None)
    assert found.bytes(form) == form.bytes(*matrix.shape)


@pytest.mark.parametrize("rank", [8, 24])
def test_a_pair_is_refitted_to_its_first_factor(rank: int, rng: np.random.Generator) -> None:
    _, moments = case(rng)
    first = rng.standard_normal((96, rank)).astype(np.float32)
    second = rng.standard_normal((rank, 64)).astype(np.float32)
    pair = Factors(first[None], second[None], Errors(0.0))
    found = round_factors(pair, Format(4, 32), moments)
    product = first @ second
    lost = felt_error(product - found.product()[0], moments)
    assert lost < 0.02 * felt_error(product, moments)
    assert found.rank == rank
    assert not np.array_equal(found.first, pair.first)


CORRECTED = {
    "matmul": "y = MatMul (x, W)",
    "gemm": "y = Gemm (x, W, c)",
    "transposed": "y = Gemm <transB=1> (x, V, c)",
}


@pytest.mark.parametrize("kind", CORRECTED)
@pytest.mark.parametrize("rank", [4, 16])
def test_a_correction_in_the_graph(kind: str, rank: int, rng: np.random.Generator) -> None:
    matrix, moments = case(rng)
    bias = rng.standard_normal(64).astype(np.float32)
    constants = {"W": matrix, "V": matrix.T.copy(), "c": bias}
    read = {name: constants[name] for name in constants if name in CORRECTED[kind]}
    model = ir.from_proto(
        parse(f"{HEAD} g (float[N,96] x) => (float[N,64] y) {{ [it] {CORRECTED[kind]} }}", read)
    )
    found = round_weight(matrix, Format(4, 32, rank), moments)
    assert found.correction is not None
    node = model.graph[0]
    raise_opset(model, OPSET)
    with Spool() as spool:
        writer = FormatWriter(model, spool)
        writer.put([node], found.codes)
        writer.correct([node], *found.correction)
        onnx.checker.check_model(ir.to_proto(model), full_check=True)
        x = rng.standard_normal((5, 96)).astype(np.float32)
        wanted = x @ found.values() + (bias if "c" in read else 0.0)
        exact = run_reference(model, {"x": x})["y"]
        # ONNX Runtime's kernel rounds the activations to 8 bits.
        for got, limit in ((exact, 1e-5), (run_ort(model, {"x": x})["y"], 0.02)):
            assert np.linalg.norm(got - wanted) < limit * np.linalg.norm(wanted)
    assert (node.name, node.op_type, node.outputs[0].name) == ("it", "Add", "y")


def test_a_bias_makes_up_for_the_mean(rng: np.random.Generator) -> None:
    """Outputs are exact at the mean of the inputs, and the mean takes no part in the rounding."""
    matrix, _ = case(rng)
    x = rng.standard_normal((2000, 96)) + 3.0 * rng.standard_normal(96)
    given = Moments(x.T @ x / len(x), x.mean(0), len(x))
    (group,) = groups_of(
        ir.from_proto(
            parse(
                f"{HEAD} g (float[N,96] x) => (float[N,64] y) {{ y = MatMul (x, W) }}",
                {"W": matrix},
            )
        )
    )
    off = []
    for centre in (None, given.mean):
        statistics = Statistics({group: (replace(given, centre=centre),)})
        values = round_weight(matrix, Format(4, 32), moments_of(statistics, group)).values()
        shift = shift_by(centre_of(statistics, group), matrix, values)
        error = x @ (matrix - values) - (0.0 if shift is None else shift)
        off.append(float(np.square(error).mean()))
    assert off[1] < 0.9 * off[0]
    assert moments_of(Statistics(), group) is None
    assert centre_of(Statistics(), group) is None
    assert shift_by(None, matrix, matrix) is None


def test_the_bias_in_the_graph_is_changed(rng: np.random.Generator) -> None:
    model = parse(
        f"{HEAD} g (float[N,64] x) => (float[N,32] y) {{ y = Gemm (x, W, b) }}",
        {
            "W": rng.standard_normal((64, 32)).astype(np.float32),
            "b": np.zeros(32, np.float32),
        },
    )
    mean = 5.0 * rng.standard_normal(64)
    samples = [{"x": (rng.standard_normal((8, 64)) + mean).astype("f4")} for _ in range(50)]
    goals: tuple[dict[str, Any], ...] = ({"energy": 1.0}, {"rank": 16})
    for options in goals:
        result = compress(
            model, weights="4", calibration=samples, bench=False, simplify=False, **options
        )
        bias = result.model.graph.initializers["b"].const_value
        assert bias is not None
        assert np.abs(bias.numpy()).max() > 0.01
        at_mean = {"x": mean[None].astype("f4")}
        exact, got = run_ort(model, at_mean)["y"], run_reference(result.model, at_mean)["y"]
        assert np.linalg.norm(got - exact) < 0.01 * np.linalg.norm(exact)
