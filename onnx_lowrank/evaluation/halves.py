"""float16 models: where their error was judged in float16, and where it was not."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from onnx_lowrank.graph.constant import Constant
from onnx_lowrank.graph.constants import Constants, in_chain
from onnx_lowrank.graph.walk import all_nodes

__all__ = ["computes_half", "half_note"]


def computes_half(model: ir.Model) -> bool:
    """Whether a node computes with a constant in float16.

    Scales that are stored so, perhaps looked up by a Gather, and then cast are no such constants.
    """
    constants = Constants(model)
    return any(
        isinstance(found := constants.resolve(value), Constant)
        and found.dtype == ir.DataType.FLOAT16
        for node in all_nodes(model)
        for index, value in enumerate(node.inputs)
        if not in_chain(node, index) and node.op_type != "Gather"
    )


def half_note(judges: Sequence[str]) -> str:
    """The note on a float16 model that was judged only where float16 is not computed."""
    return (
        f"float16 weights judged on {', '.join(judges)} only, which computes them in float32: the "
        "larger error of ARM's float16 arithmetic was not judged"
    )
