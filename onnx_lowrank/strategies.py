"""Which strategy meets which goal."""

from __future__ import annotations

from dataclasses import dataclass

from onnx_lowrank.budgets import Keep, MaxSize, Speed, Tolerance, cost_of
from onnx_lowrank.choose import Goal
from onnx_lowrank.context import Context
from onnx_lowrank.costs import CostTable
from onnx_lowrank.errors import InputError
from onnx_lowrank.metrics import Metric
from onnx_lowrank.prepare import Prepared
from onnx_lowrank.searching import Searching
from onnx_lowrank.strategy import PerLayer, Strategy
from onnx_lowrank.timings import cost_table

__all__ = ["Chosen", "strategy_for"]


@dataclass(frozen=True, eq=False)
class Chosen:
    """A strategy, and what it works with.

    Attributes:
        strategy: the strategy.
        metric: what its result is judged by on unseen samples; None if by none.
        table: latencies by layer, where the goal needs them.
        searching: its searches; None where layers are chosen one by one.
    """

    strategy: Strategy
    metric: Metric | None = None
    table: CostTable | None = None
    searching: Searching | None = None

    @property
    def evaluations(self) -> int:
        """How often several layers were tried together."""
        return 0 if self.searching is None else self.searching.evaluations

    @property
    def samples(self) -> int:
        """Samples of the search."""
        return 0 if self.searching is None else len(self.searching.probe.feeds)


def strategy_for(context: Context, prepared: Prepared) -> Chosen:
    """The strategy of a run's goal.

    Raises:
        InputError: the goal needs a model that runs, and this one does not.
    """
    settings = context.settings
    budget = settings.budget
    if budget is None:
        return Chosen(PerLayer(settings.goal, prepared))
    if not context.runs():
        if budget.kind != "keep":
            why = context.trial.unavailable or "neither check nor timing may run it"
            raise InputError(f"{budget.option} needs a model that runs: {why}")
        context.say(
            f"{budget.option} is the same share of every layer: the model is not run, so the "
            "layers' damage is not known"
        )
        goal = Goal(
            keep=budget.value, min_gain=settings.min_gain, rank_multiple=settings.goal.rank_multiple
        )
        return Chosen(PerLayer(goal, prepared))
    table, multiple = None, None
    auto = settings.rank_multiple == "auto"
    if budget.timed or auto:
        groups = [group for group, found in prepared.measured.items() if found.finite]
        table = cost_table(context, prepared, groups, multiples=auto)
        multiple = table.multiple if auto else None
    searching = Searching(context, prepared, multiple)
    match budget.kind:
        case "keep":
            return Chosen(Keep(searching, budget), None, table, searching)
        case "max-size":
            return Chosen(MaxSize(searching, budget, context), None, table, searching)
        case "tolerance":
            cost = cost_of(prepared, budget.objective, table)
            strategy = Tolerance(searching, budget, cost, context)
            return Chosen(strategy, budget.metric, table, searching)
    assert table is not None
    return Chosen(Speed(searching, budget, table), None, table, searching)
