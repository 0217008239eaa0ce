"""What computes in float16."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnx_lowrank.evaluation.halves import computes_half
from tests.helpers.models import parse


@pytest.mark.parametrize(
    ("kind", "body", "half"),
    [
        ("float16", "y = MatMul(x, w)", True),
        ("float", "v = Cast<to=1>(w) y = MatMul(x, v)", False),
        ("float", "r = Gather(w, i) s = Cast<to=1>(r) y = Mul(x, s)", False),
        ("float", "h = Cast<to=10>(x) p = MatMul(h, w) y = Cast<to=1>(p)", True),
    ],
)
def test_a_constant_that_is_cast_or_looked_up_is_no_arithmetic(
    kind: str, body: str, half: bool
) -> None:
    proto = parse(
        f"""<ir_version: 8, opset_import: ["": 17]>
        agraph ({kind}[4, 4] x) => ({kind}[4, 4] y) <float16[4, 4] w, int64[1] i> {{ {body} }}""",
        {"w": np.ones((4, 4), np.float16), "i": np.array([2])},
    )
    assert computes_half(ir.from_proto(proto)) == half
