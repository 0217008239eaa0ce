"""The guard: layers and formats that make a model slower are put back."""

from __future__ import annotations

from typing import Any

import onnx
import onnx_ir as ir
import pytest

from onnx_lowrank.maps.choice import Choice
from onnx_lowrank.maps.formats import Format, Variant
from onnx_lowrank.ranks.budget_strategies import cost_of
from onnx_lowrank.ranks.costs import CostTable
from onnx_lowrank.ranks.guard import put_back, slower
from onnx_lowrank.ranks.strategy import Plan
from onnx_lowrank.schema.measures import Latency, Milliseconds, Speedup, speedup_text
from tests.helpers.budgets import budgeted, feeds, two_branches


@pytest.fixture
def model() -> onnx.ModelProto:
    return two_branches()


def latency(low: float, high: float) -> Latency:
    ms = Milliseconds(1.0, 1.0)
    return Latency("P", 1, 40, ms, ms, Speedup((low + high) / 2, 0.0, 9.0, (low, high)))


def test_slower_is_slower_by_more_than_the_noise() -> None:
    assert slower(latency(0.8, 0.95))
    assert not slower(latency(0.9, 1.01))


@pytest.mark.parametrize(
    ("low", "high", "verdict", "shown"),
    [
        (1.94, 2.88, "faster", "2.00× as fast, 95 % interval 1.94× to 2.88×"),
        (0.5, 0.9, "slower", "2.00× as fast, 95 % interval 0.50× to 0.90×"),
        (0.99, 1.02, "as fast", "2.00× as fast, 95 % interval 0.99× to 1.02×: no difference"),
        (0.4, 9.0, "too noisy to tell", "too noisy to tell (95 % interval 0.40× to 9.00×)"),
    ],
)
def test_a_speedup_is_told_only_as_far_as_its_interval(
    low: float, high: float, verdict: str, shown: str
) -> None:
    assert latency(low, high).speedup.verdict == verdict
    assert speedup_text(2.0, low, high) == shown


def test_a_model_that_meets_the_goal_is_left_with_that_reason(model: onnx.ModelProto) -> None:
    report = budgeted(model, keep=1.0, calibration=feeds(4)).report
    reasons = {layer.reason for layer in report.layers}
    assert reasons == {"dense: the input model meets the goal as it is"}


class Table(CostTable):
    """Times by rank: dense 100 ns, a pair 10 ns for each unit of rank."""

    def __init__(self) -> None: ...

    def dense(self, group: Any) -> float | None:
        return 100.0

    def pair(self, group: Any, rank: int, leads: bool = True) -> float | None:
        return (10.0 if leads else 4.0) * rank


def test_layers_that_do_not_pay_are_put_back(model: onnx.ModelProto) -> None:
    from onnx_lowrank.graph.constants import Constants
    from onnx_lowrank.maps.find import find
    from onnx_lowrank.maps.forms import all_forms

    parsed = ir.from_proto(model)
    groups = find(parsed, Constants(parsed), all_forms()).groups
    ranks = (5, 20, 9, 12)
    plan = Plan({g: Choice(r, "given") for g, r in zip(groups, ranks, strict=True)}, 0.1, 0.1)
    fewer, names = put_back(plan, Table(), last=False)
    assert [fewer.choices[g].rank for g in groups] == [5, None, 9, None]
    assert len(names) == 2
    assert "put back" in fewer.choices[groups[1]].reason
    assert fewer.damage is None
    half, names = put_back(fewer, Table(), last=False)  # each pays alone: the one that pays least
    assert [half.choices[g].rank for g in groups] == [5, None, None, None]
    none, _ = put_back(plan, Table(), last=True)
    assert not none.factored


def test_formats_that_do_not_pay_are_put_back(model: onnx.ModelProto) -> None:
    from onnx_lowrank.graph.constants import Constants
    from onnx_lowrank.maps.find import find
    from onnx_lowrank.maps.forms import all_forms

    class Slow(Table):
        """8 bits take 60 ns, 4 bits 130."""

        def time(self, group: Any, variant: Variant, leads: bool = True) -> float | None:
            if variant.format is None:
                return super().time(group, variant, leads)
            return 60.0 if variant.format.bits == 8 else 130.0

    parsed = ir.from_proto(model)
    groups = find(parsed, Constants(parsed), all_forms()).groups
    eight, four = Format(8, 32), Format(4, 32)
    chosen = [Choice(None, "", format=eight), Choice(None, "", format=four), Choice(5, ""), None]
    plan = Plan({g: c or Choice(None, "") for g, c in zip(groups, chosen, strict=True)}, 0.1, 0.1)
    assert not Plan({}).changed
    fewer, names = put_back(plan, Slow(), last=False)
    assert [fewer.choices[g].format for g in groups] == [eight, None, None, None]
    assert [fewer.choices[g].rank for g in groups] == [None, None, 5, None]
    assert len(names) == 1
    reason = fewer.choices[groups[1]].reason
    assert "weights in 4 bits, blocks of 32 here (alone 0.1 µs dense, 0.13 µs so)" in reason
    none, _ = put_back(plan, Slow(), last=True)
    assert not none.changed


def test_a_shared_first_factor_is_timed_once(model: onnx.ModelProto) -> None:
    cost = cost_of(None, "latency", Table())  # type: ignore[arg-type]
    group: Any = None
    assert cost(group, Variant()) == 100.0
    assert cost(group, Variant(5)) == 50.0
    assert cost(group, Variant(5), False) == 20.0
