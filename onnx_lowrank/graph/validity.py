"""Whether a model is valid ONNX, by onnx's own checker."""

from __future__ import annotations

import onnx
import onnx.checker
import onnx_ir as ir

from onnx_lowrank.graph.serialize import hollow

__all__ = ["invalid"]


def invalid(model: ir.Model) -> str | None:
    """What onnx.checker, with full shape inference, has against a model.

    Large initializers take part as inputs of the same type and shape, so that a model of several
    GB is checked in little memory.

    Returns:
        Its complaint in one line; None if it has none.
    """
    with hollow(model) as (proto, large):
        pass
    inputs = {value.name for value in proto.graph.input}
    kept = []
    for tensor in proto.graph.initializer:
        if tensor.name not in large:
            kept.append(tensor)
        elif tensor.name not in inputs:
            proto.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    try:
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:  # its exceptions have no common base
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return lines[0] if lines else type(error).__name__
    return None
