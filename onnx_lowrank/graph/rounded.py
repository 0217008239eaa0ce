"""Rounded: values between maps that a quantized model rounds are cut off only, in place.

``DequantizeLinear(QuantizeLinear(x))``              ->  ``Clip(x)``

Beyond its range such a pair cuts off, which takes the place of a Relu that a quantizer left out;
only its rounding goes.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnx_lowrank.graph.constant import Constant
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.graph.edits import Edits, producer_of
from onnx_lowrank.graph.walk import attribute, node_name

__all__ = ["RoundedValues"]

# Types of the codes of a QuantizeLinear without a zero point, by its output_dtype.
_UNSAID: dict[int, type[np.uint8 | np.int8]] = {
    0: np.uint8,
    int(ir.DataType.UINT8): np.uint8,
    int(ir.DataType.INT8): np.int8,
}


class RoundedValues:
    """The pairs of QuantizeLinear and DequantizeLinear of one model."""

    def __init__(self, constants: Constants, edits: Edits) -> None:
        """Of a model whose maps are of floats already, where they can be."""
        self._constants, self._edits = constants, edits

    def clip(self, node: ir.Node) -> None:
        """Let a value that is rounded and made a float again be cut off only."""
        if node.op_type != "DequantizeLinear" or node.inputs[0] is None:
            return
        before = node.inputs[0].producer()
        if before is None or before.op_type != "QuantizeLinear":
            return
        unsaid = _UNSAID.get(attribute(before, "output_dtype", 0))
        if unsaid is None:
            return
        scale, zero = self._step(node, unsaid)
        if scale is None or self._step(before, unsaid) != (scale, zero):
            return
        source = before.inputs[0]
        if self._constants.resolve(source) is not None:
            return  # a weight, as quantization-aware training leaves it
        if zero is None or any(self._stays(other) for other in self._around(before, node)):
            return
        limits = np.iinfo(zero.dtype)
        low, high = (
            self._edits.constant(
                np.array(float(scale) * (limit - float(zero)), np.float32),
                f"{node_name(node)}.{name}",
            )
            for limit, name in ((limits.min, "min"), (limits.max, "max"))
        )
        self._edits.become(node, "Clip", [source, low, high])

    def _step(
        self, node: ir.Node, unsaid: type[np.uint8 | np.int8]
    ) -> tuple[np.float32 | None, np.uint8 | np.int8 | None]:
        """Scale and zero point of a node, where it has one of each; None otherwise.

        Without a zero point it is the 0 of the type ``unsaid``.
        """
        scale = self._constants.literal(node.inputs[1])
        given = node.inputs[2] if len(node.inputs) > 2 else None
        zero = np.zeros(1, unsaid) if given is None else self._constants.literal(given)
        if scale is None or scale.size != 1 or scale.dtype != np.float32:
            return None, None
        if zero is None or zero.size != 1 or zero.dtype not in (np.uint8, np.int8):
            return None, None
        return scale.reshape(-1)[0], zero.reshape(-1)[0]

    def _around(self, first: ir.Node, second: ir.Node) -> list[ir.Node]:
        """What gives the value that a pair rounds, and what reads it behind."""
        source = producer_of(first.inputs[0])
        return [*([] if source is None else [source]), *(u.node for u in second.outputs[0].uses())]

    def _stays(self, node: ir.Node) -> bool:
        """Whether a node multiplies with a weight that is still quantized."""
        for value in node.inputs[1:]:
            source = producer_of(value)
            if source is not None and source.op_type == "DequantizeLinear":
                found = self._constants.resolve(source.inputs[0])
                if isinstance(found, Constant) and len(found.shape) > 1:
                    return True
        return False
