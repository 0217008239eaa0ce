from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnx_lowrank.evaluation.unchanged import change, same_bits
from onnx_lowrank.schema.measures import OutputCheck


def figures(relative: float, largest: float = 1.0) -> OutputCheck:
    return OutputCheck("y", largest, relative, None, None)


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (ir.DataType.FLOAT, 9e-5, 2e-4),
        (ir.DataType.FLOAT16, 9e-3, 2e-2),
        (ir.DataType.BFLOAT16, 4e-2, 6e-2),
    ],
)
def test_rounding_is_no_change(kind: ir.DataType, good: float, bad: float) -> None:
    types = [ir.DataType.FLOAT, None, kind]
    assert change([figures(good), figures(good)], types) is None
    text = change([figures(good), figures(bad)], types)
    assert text is not None
    assert text.startswith(f"changed output 'y' by {bad:.1e}")


def test_what_is_almost_nothing_is_no_change() -> None:
    assert change([figures(0.5, 1e-7)], []) is None
    assert change([figures(float("nan"))], []) is not None


def test_the_same_bits() -> None:
    one = {"y": np.array([0.0, np.nan]), "t": np.array(["a", "b"], object)}
    assert same_bits(one, {name: array.copy() for name, array in one.items()})
    assert not same_bits(one, {**one, "y": np.array([-0.0, np.nan])})
    assert not same_bits(one, {**one, "t": np.array(["a", "c"], object)})
