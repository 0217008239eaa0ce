"""The derivatives of the operators: one table with one entry for each operator.

An operator that is not in the table is an error that names it.
"""

from onnx_lowrank.autodiff.derivatives import (
    elementwise,
    linear,
    movement,
    quantized,
    recurrent,
    reduction,
    spatial,
)
from onnx_lowrank.autodiff.derivatives.base import Tape, find_derivative

__all__ = [
    "Tape",
    "elementwise",
    "find_derivative",
    "linear",
    "movement",
    "quantized",
    "recurrent",
    "reduction",
    "spatial",
]
