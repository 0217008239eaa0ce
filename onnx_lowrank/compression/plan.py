"""Which strategy meets which goal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from onnx_lowrank.compression.context import Context
from onnx_lowrank.errors import InputError, named
from onnx_lowrank.evaluation.metrics import Metric
from onnx_lowrank.fitting import statistics_file
from onnx_lowrank.fitting.statistics_file import SavedCurve, weight_of
from onnx_lowrank.graph.walk import node_name
from onnx_lowrank.maps.choice import Choice
from onnx_lowrank.maps.find import Group
from onnx_lowrank.ranks import cost_file
from onnx_lowrank.ranks.both_limits import SizedTolerance
from onnx_lowrank.ranks.budget_strategies import (
    Keep,
    MaxSize,
    Speed,
    Tolerance,
    cost_of,
)
from onnx_lowrank.ranks.costs import CostTable, measure_costs, plan_costs
from onnx_lowrank.ranks.from_recipe import FromRecipe
from onnx_lowrank.ranks.goals import Goal
from onnx_lowrank.ranks.last import ByOutputs
from onnx_lowrank.ranks.microbench import clock_for, session_timer
from onnx_lowrank.ranks.prepared import Prepared
from onnx_lowrank.ranks.recipe import Recipe
from onnx_lowrank.ranks.search import Searching
from onnx_lowrank.ranks.strategy import PerLayer, Strategy
from onnx_lowrank.ranks.times import Place

__all__ = ["Chosen", "cost_table", "searching_for", "strategy_for"]


@dataclass(frozen=True, eq=False)
class Chosen:
    """A strategy, and what it works with.

    Attributes:
        strategy: the strategy.
        metric: what its result is judged by on unseen samples beside the check; None if by none.
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
        return 0 if self.searching is None else self.searching.samples


def strategy_for(context: Context, prepared: Prepared) -> Chosen:
    """The strategy of a run's goal.

    Raises:
        InputError: the goal needs a model that runs, and this one does not.
    """
    settings = context.settings
    if isinstance(settings.recipe, Recipe):
        metric = settings.metric_given if context.runs() else None
        return Chosen(FromRecipe(settings.recipe, prepared, settings.min_gain), metric)
    budget = settings.budget
    if settings.metric_given is not None and not context.runs():
        why = context.trial.unavailable or "neither check nor timing may run it"
        raise InputError(f"{named('metric')} needs a model that runs: {why}")
    if budget is None:
        return Chosen(_per_layer(context, prepared), settings.metric_given)
    if not context.runs():
        if budget.kind != "keep" or not prepared.quantized.single:
            why = context.trial.unavailable or "neither check nor timing may run it"
            raise InputError(f"{budget.named} needs a model that runs: {why}")
        context.say(
            f"{budget.named} is the same share of every layer: the model is not run, so the "
            "layers' damage is not known"
        )
        goal = Goal(
            keep=budget.value, min_gain=settings.min_gain, rank_multiple=settings.goal.rank_multiple
        )
        return Chosen(PerLayer(goal, prepared))
    searching, table = searching_for(context, prepared, timed=budget.timed)
    metric = settings.metric_given
    match budget.kind:
        case "keep":
            return Chosen(Keep(searching, budget), metric, table, searching)
        case "max-size":
            frame = context.source.frame_bytes
            return Chosen(MaxSize(searching, budget, frame), metric, table, searching)
        case "tolerance":
            cost = cost_of(prepared, budget.objective, table)
            strategy: Strategy = Tolerance(searching, budget, cost)
            if budget.most_bytes is not None:
                frame = context.source.frame_bytes
                strategy = SizedTolerance(searching, budget, cost, frame)
            return Chosen(strategy, budget.metric, table, searching)
    assert table is not None
    return Chosen(Speed(searching, budget, table), metric, table, searching)


def _per_layer(context: Context, prepared: Prepared) -> PerLayer:
    """Every layer for itself; where there are samples the outputs decide of the last ones."""
    settings, trial = context.settings, context.trial
    if settings.goal.energy is None or prepared.calibration is None or not context.runs():
        return PerLayer(settings.goal, prepared)
    last = ByOutputs(settings.goal, prepared, trial.split.search, trial.runner, trial.reading)

    def revised(group: Group, choice: Choice) -> Choice:
        try:
            return last.choose(group, choice)
        except InputError as error:
            name = node_name(group.members[0].site.node)
            context.say(f"the outputs have no say in the rank of {name}, the last layer: {error}")
            return choice

    return PerLayer(settings.goal, prepared, revised)


def searching_for(
    context: Context, prepared: Prepared, *, timed: bool
) -> tuple[Searching, CostTable | None]:
    """What budgets search with, after the damage of every layer was measured.

    Args:
        context: the run.
        prepared: the model.
        timed: whether the goal is a latency, and layers are timed whatever their multiples are.

    Returns:
        The searches, and the latencies by layer where they were measured.

    Raises:
        InputError: the model does not run with its weights as inputs.
    """
    settings, trial = context.settings, context.trial
    auto = settings.rank_multiple == "auto"
    table = None
    if timed or auto:
        groups = [group for group, found in prepared.measured.items() if found.finite]
        apart = {*prepared.tables.groups.values(), *prepared.finding.off}
        more = (group for group in prepared.formats if group not in apart)
        groups = list(dict.fromkeys([*groups, *more]))
        table = cost_table(context, prepared, groups, multiples=auto)
    samples = trial.split.search
    if settings.data is None and settings.calibration is None:
        data = named("data")
        context.say(f"damage measured on random input, not real data: {data} would tell more")
    multiple = table.multiple if table is not None and auto else None
    budget = settings.budget
    searching = Searching(
        prepared,
        samples,
        trial.runner,
        settings.goal,
        context.stages,
        context.say,
        multiple,
        reading=trial.reading,
        memory=trial.memory,
        only_seen=budget is not None and budget.kind == "tolerance",
        by_classes=settings.metric_used.of_classes,
        spare=trial.split.spare,
        further=trial.split.further,
        joining=trial.joining,
        known=context.probe,
    )
    context.keep(searching.probe)
    if settings.save_stats is not None and prepared.saved is not None:
        curves = {
            weight_of(group): SavedCurve(curve.points, curve.tails, curve.known_from)
            for group, curve in searching.curves.items()
        }
        fisher = bool(prepared.search.fisher)
        saved = replace(prepared.saved, curves=curves, curves_fisher=fisher)
        statistics_file.save(Path(settings.save_stats), saved)
    return searching, table


def cost_table(
    context: Context, prepared: Prepared, groups: Sequence[Group], *, multiples: bool = False
) -> CostTable:
    """How long each group takes on the provider and threads of the run, by rank.

    With ``multiples`` also which multiple the ranks should be on.  What a loaded table
    holds is not measured again.

    Raises:
        InputError: a table cannot be read or written.
    """
    settings, trial = context.settings, context.trial
    if trial.provider.emulated:
        raise InputError(
            f"{named('ep', trial.provider.name)}: {trial.provider.title} is emulated here, its "
            "times mean "
            "nothing; a goal that is a latency cannot be met"
        )
    place = Place.here(trial.provider.full, trial.threads)
    known = None if settings.load_costs is None else cost_file.load(Path(settings.load_costs))
    plan = plan_costs(groups, prepared.model, trial.outputs, prepared.formats)
    with context.stages("time layers", len(plan.missing(known, place))) as advance:
        timer = session_timer(trial.alone, clock_for(place.provider, place.threads))
        table = measure_costs(plan, timer, place, advance, known, multiples=multiples)
    if settings.save_costs is not None:
        cost_file.save(Path(settings.save_costs), table)
    return table
