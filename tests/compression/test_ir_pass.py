from __future__ import annotations

import onnx_ir as ir
import pytest
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass

from onnx_lowrank import LowRankPass
from onnx_lowrank.errors import InputError, UsageError
from tests.helpers.targets import two_layers

FAST = {"simplify": False, "check": False, "bench": False}


def test_it_stands_among_other_passes() -> None:
    model = ir.from_proto(two_layers())
    own = LowRankPass(rank=8, **FAST)
    manager = ir.passes.PassManager(
        [CommonSubexpressionEliminationPass(), own, RemoveUnusedNodesPass()]
    )
    found = manager(model)
    assert found.modified
    assert len(found.model.graph) == 6
    assert len(model.graph) == 4
    assert own.report is not None
    assert [layer.rank for layer in own.report.layers] == [8, 8]


def test_options_are_checked_when_it_is_made() -> None:
    with pytest.raises(UsageError, match=r"keep=…: expected a number above 0"):
        LowRankPass(keep=2)
    with pytest.raises(TypeError, match="did you mean 'keep'"):
        LowRankPass(kep=0.5)


def test_a_failure_is_not_swallowed() -> None:
    model = ir.from_proto(two_layers())
    with pytest.raises((InputError, ir.passes.PassError)):
        LowRankPass(keep=0.5, data="no.npz")(model)
