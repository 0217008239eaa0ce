"""`--ops` and `ops=` choose the forms that are factored."""

from __future__ import annotations

import numpy as np

from tests.helpers.cases import RANK
from tests.helpers.models import (
    as_proto,
    assert_same,
    factored,
    known_rank,
    parse,
    uniform,
)


def test_ops_of_compress_choose_forms(rng: np.random.Generator) -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["": 17]>
        one (int64[5] i, float[5, 16] x) => (float[5, 12] a, float[5, 12] b, float[5, 12] c,
                                             float[5, 16] e) {
            e = Gather(T, i)
            a = MatMul(x, M)
            b = Gemm(x, G)
            c = Einsum <equation = "bd,df->bf"> (x, E)
        }""",
        {
            "T": known_rank(40, 16, RANK, rng),
            **{name: known_rank(16, 12, RANK, rng) for name in "MGE"},
        },
    )
    on = {
        None: {"M", "G", "E"},
        ("default",): {"M", "G", "E"},
        ("all",): {"T", "M", "G", "E"},
        ("gemm",): {"G"},
        ("matmul", "gather"): {"T", "M"},
        ("default", "gather"): {"T", "M", "G", "E"},
        ("conv",): set[str](),
    }
    for ops, weights in on.items():
        result = factored(model, rank=RANK, ops=ops)
        chosen = {layer.weight for layer in result.report.layers if layer.status == "factored"}
        assert chosen == weights, ops
        left = {tensor.name for tensor in as_proto(result.model).graph.initializer}
        assert {"T", "M", "G", "E"} - weights <= left, ops
        feeds = {"i": rng.integers(0, 40, 5), "x": uniform((5, 16), rng)}
        assert_same(model, result.model, feeds)
