"""What the loss changes by with a node's inputs, for each operator: one entry in one table.

An operator that is not in the table is named in an error, never guessed.
"""

from onnx_lowrank.autodiff.derivatives import (
    elementwise,
    linear,
    movement,
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
    "recurrent",
    "reduction",
    "spatial",
]
