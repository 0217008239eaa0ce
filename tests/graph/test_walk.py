"""What is counted in a model."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnx_lowrank.graph.walk import elements
from onnx_lowrank.numerics.arrays import Array
from tests.helpers.models import parse

PACKED = """<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>
g (int64[n] i, float[n, 32] x) => (float[n, 32] rows, float[n, 5] y, float[n, 3] z) {
    rows = com.microsoft.GatherBlockQuantized <bits = 4, block_size = 32> (q, i, s)
    shape = Constant <value = int64[3] {5, 1, 16}> ()
    tied = Reshape (q, shape)
    y = com.microsoft.MatMulNBits <K = 32, N = 5, bits = 4, block_size = 32> (x, tied, s)
    z = com.microsoft.MatMulNBits <K = 32, N = 3, bits = 8, block_size = 32> (x, whole, t)
}"""


def test_every_number_of_a_byte_counts_once() -> None:
    constants: dict[str, Array] = {
        "q": np.zeros((5, 16), np.uint8),
        "s": np.zeros((5, 1), np.float32),
        "whole": np.zeros((3, 1, 32), np.uint8),
        "t": np.zeros(3, np.float32),
    }
    model = ir.from_proto(parse(PACKED, constants))
    assert elements(model) == 5 * 32 + 5 + 3 * 32 + 3 + 3
