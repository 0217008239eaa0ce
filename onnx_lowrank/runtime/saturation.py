"""Whether integer products are exact here: kernels that add up in 16 bits saturate."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx_ir as ir

from onnx_lowrank.graph.elements import constant_value
from onnx_lowrank.runtime.session import open_session

__all__ = ["saturates"]

# Terms of a sum, columns, and numbers of rows: one row has kernels of its own.
_TERMS, _COLUMNS, _ROWS = 256, 32, (1, 2, 16)


@cache
def saturates() -> bool:
    """Whether products of unsigned inputs and signed weights of 8 bits come out too small.

    Where two products of a pair are added in 16 bits, as on x86 processors with AVX2 or AVX512
    and without VNNI, ``255·127 + 255·127`` is cut to 32767.  The largest numbers are multiplied in
    ONNX Runtime on the CPU: a machine always answers the same.  Weights without a sign do not
    saturate anywhere.
    """
    weights = np.full((_TERMS, _COLUMNS), 127, np.int8)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.UINT8), shape=ir.Shape(["rows", _TERMS]))
    w = constant_value(ir.Tensor(weights, name="w"))
    node = ir.Node("", "MatMulInteger", [x, w], name="product")
    y = node.outputs[0]
    y.name, y.dtype, y.shape = "y", ir.DataType.INT32, ir.Shape(["rows", _COLUMNS])
    graph = ir.Graph([x], [y], nodes=[node], initializers=[w], opset_imports={"": 11}, name="probe")
    session = open_session(
        ir.to_proto(ir.Model(graph, ir_version=6)).SerializeToString(), threads=1
    )
    exact = 255 * 127 * _TERMS
    for rows in _ROWS:
        (found,) = session.run(None, {"x": np.full((rows, _TERMS), 255, np.uint8)})
        if not np.all(np.asarray(found) == exact):
            return True
    return False
