"""A loss and a size, both limited: what is between them, and what cannot be."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from onnx_lowrank import GateError, Result, UsageError, compress
from onnx_lowrank.numerics.arrays import Array, Feed
from onnx_lowrank.ranks.goals import Budget
from tests.helpers.models import parse

SIZE, ROWS = 64, 300


def weight(rng: np.random.Generator) -> Array:
    """A matrix whose singular values fall."""
    u, s, v = np.linalg.svd(rng.standard_normal((SIZE, SIZE)))
    return np.asarray((u * s * 0.93 ** np.arange(SIZE)) @ v / 8, np.float32)


@pytest.fixture
def model() -> onnx.ModelProto:
    """Rows of a table, and three layers behind."""
    rng = np.random.default_rng(3)
    return parse(
        f"""<ir_version: 8, opset_import: ["" : 17]>
        g (int64[N] i) => (float[N,{SIZE}] y) {{
            [rows] x = Gather (E, i)
            [a] h = MatMul (x, A)
            t = Tanh (h)
            [b] k = MatMul (t, B)
            s = Tanh (k)
            [c] y = MatMul (s, C)
        }}""",
        {"E": rng.standard_normal((ROWS, SIZE)).astype("f4"), **{n: weight(rng) for n in "ABC"}},
    )


def feeds(count: int = 60) -> list[Feed]:
    rng = np.random.default_rng(5)
    return [{"i": rng.integers(0, ROWS, 24)} for _ in range(count)]


def made(model: onnx.ModelProto, **options: Any) -> Result:
    plain: dict[str, Any] = {"simplify": False, "bench": False, "calibration": feeds()}
    plain["effort"] = "quick"  # what it would gain has no part in the two limits
    return compress(model, **{**plain, "objective": "macs", "weights": "auto", **options})


def test_the_size_is_kept_within_the_loss(model: onnx.ModelProto) -> None:
    """Multiplications do not say in which numbers weights are stored: bytes do."""
    free = made(model, tolerance=0.1)
    assert free.report.output.bytes > 60_000  # the table is as it was
    sizes, macs = [], []
    for limit in (40_000, 28_000):
        result = made(model, tolerance=0.1, max_size=limit)
        goal, totals = result.report.goal, result.report.totals
        assert result.report.output.bytes <= limit
        assert goal is not None
        assert goal.option == f"--tolerance 0.1 --max-size {limit}"
        assert goal.loss is not None
        assert goal.loss <= 0.1
        sizes.append(result.report.output.bytes)
        macs.append(totals.macs_after)
        again = compress(model, calibration=feeds(), bench=False, recipe=result.recipe)
        assert again.report.output.bytes == result.report.output.bytes
    assert sizes[1] < sizes[0] < free.report.output.bytes
    before = free.report.totals.macs_after
    assert before is not None
    assert all(own is not None and own >= before for own in macs)


def test_a_limit_that_does_not_bind_changes_nothing(model: onnx.ModelProto) -> None:
    free, wide = made(model, tolerance=0.1), made(model, tolerance=0.1, max_size="1MB")
    ranks = [[(own.rank, own.format) for own in found.report.layers] for found in (free, wide)]
    assert ranks[0] == ranks[1]


def test_both_cannot_be_had(model: onnx.ModelProto) -> None:
    with pytest.raises(GateError, match=r"tolerance=0.001: .* bytes; expected at most 12000 \(max"):
        made(model, tolerance=0.001, max_size=12_000)
    with pytest.raises(GateError, match=r"tolerance=0.1: what keeps within it takes about"):
        made(model, tolerance=0.1, max_size=12_000, weights="fp32")


def test_it_is_a_limit_beside_a_tolerance_alone() -> None:
    with pytest.raises(UsageError, match="got keep=… and max_size=…: they exclude each other"):
        compress("none.onnx", keep=0.5, max_size="1MB")
    with pytest.raises(UsageError, match="objective=… needs tolerance=…"):
        compress("none.onnx", max_size="1MB", objective="latency")
    both = Budget("tolerance", 0.05, "size", most_bytes=20_000_000)
    assert both.option == "--tolerance 0.05 --max-size 20000000"
    assert both.size_limit == 20_000_000
    assert Budget("max-size", 7e3).size_limit == 7000
    assert Budget("keep", 0.5).size_limit is None
