"""Reporting: all that is known of a run, as its report."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass

from onnx_lowrank.compression.assemble import Assembled
from onnx_lowrank.compression.candidates import Candidate
from onnx_lowrank.compression.context import Context
from onnx_lowrank.compression.effort import FISHER, REFIT
from onnx_lowrank.compression.figures import figures_of
from onnx_lowrank.compression.headline import headline
from onnx_lowrank.compression.origin import origin_of
from onnx_lowrank.compression.plan import Chosen
from onnx_lowrank.compression.result import Destination
from onnx_lowrank.compression.settings import Settings
from onnx_lowrank.compression.summary import by_chance, layers, output_verdict, seen_damage, totals
from onnx_lowrank.compression.verbs import COMPRESS
from onnx_lowrank.errors import named
from onnx_lowrank.maps.choice import Decision
from onnx_lowrank.ranks.costs import CostTable
from onnx_lowrank.ranks.goals import Budget
from onnx_lowrank.ranks.prepared import Prepared
from onnx_lowrank.ranks.strategy import Plan
from onnx_lowrank.schema.json_report import File, Origin, tool_name
from onnx_lowrank.schema.measures import Check, Judged
from onnx_lowrank.schema.report import (
    REPORT_VERSION,
    BudgetReport,
    EffortStep,
    OutputVerdict,
    Report,
)

__all__ = ["Facts", "report_of"]


@dataclass(frozen=True, eq=False)
class Facts:
    """What a run found.

    Attributes:
        prepared: the model before any rank was chosen.
        chosen: the strategy; None where it cannot meet the goal.
        plan: what becomes of the layers.
        after: the result's file.
        decisions: one for every linear map.
        target: where the result goes; None where it stays in memory.
        found: the candidate that was taken; None where nothing is carried out.
        check: its outputs against the original's; None without.
        table: latencies of layers; None where none was timed.
        put_back: layers that are as they were because the model was slower.
        assembled: how many models were assembled.
    """

    prepared: Prepared
    chosen: Chosen | None
    plan: Plan
    after: File
    decisions: Sequence[Decision]
    target: Destination | None
    found: Candidate | None
    check: Check | None
    table: CostTable | None
    put_back: tuple[str, ...]
    assembled: int


def report_of(context: Context, facts: Facts) -> Report:
    """The report of a run."""
    prepared, plan, found, check = facts.prepared, facts.plan, facts.found, facts.check
    decisions, after, macs = facts.decisions, facts.after, prepared.macs
    before, table = context.source.described, facts.table
    parameters = before.parameters or 0, after.parameters or 0
    made = None if found is None else found.assembled
    errors = {} if made is None else made.errors
    rounded = {} if made is None else made.rounded
    rows = layers(decisions, errors, macs, rounded, figures_of(prepared, table))
    latency = None if found is None else found.measured.latency
    notes = [*context.notes, *context.trial.notes]
    if table is not None:
        notes += table.notes()
    notes += _unused(context.settings, table)
    notes += _timed(context.settings, facts.put_back)
    if context.pieces is not None:
        notes += context.pieces.summary()
    summary = context.log.summary()
    if summary is not None:
        notes.append(summary)
    budget = context.settings.budget
    goal = None
    judged = None if found is None else found.measured.judged
    limited = judged if budget is not None and budget.kind == "tolerance" else None
    if budget is not None and facts.chosen is not None:
        goal = BudgetReport(
            option=budget.option,
            predicted_damage=_predicted(plan, made),
            summed_damage=plan.summed,
            achieved_damage=None if check is None else seen_damage(check.damage, decisions),
            metric=budget.metric.text if budget.kind == "tolerance" else None,
            loss=None if limited is None else limited.loss,
            evaluations=facts.chosen.evaluations,
            assembled=facts.assembled,
            samples=facts.chosen.samples,
            put_back=facts.put_back,
            loss_error=None if limited is None else limited.standard_error,
            damage_of=context.settings.damage_of,
            predicted_error=plan.error,
            achieved_error=None if check is None else check.damage_error,
        )
        notes += _uncertain(goal, budget)
        chance = by_chance(
            (goal.predicted_damage, goal.predicted_error),
            (goal.achieved_damage, goal.achieved_error),
        )
        if chance is not None:
            notes.append(chance)
    report = Report(
        version=REPORT_VERSION,
        tool=tool_name(),
        input=before,
        output=after,
        layers=rows,
        totals=totals(decisions, rows, macs, *parameters),
        calibration=prepared.calibration,
        healing=None if found is None else found.assembled.healing,
        goal=goal,
        check=check,
        latency=() if latency is None else (latency,),
        settings=context.settings.to_dict(),
        seconds=dict(context.stages.seconds),
        notes=tuple(notes),
        verdict=_verdict(context.settings, check, decisions, judged),
        origin=_origin(context, facts.target),
        judged=judged,
        steps=_steps(prepared, made),
    )
    return dataclasses.replace(report, summary=headline(report))


def _origin(context: Context, target: Destination | None) -> Origin:
    """What it takes to run this again; a result in memory is called OUT."""
    settings = context.settings.typed()
    out = "OUT" if target is None else target.path
    external = {} if target is None else {"external_data": target.external_data}
    return origin_of(COMPRESS, {**settings, **external}, (context.source.path, out))


def _verdict(
    settings: Settings,
    check: Check | None,
    decisions: Sequence[Decision],
    judged: Judged | None,
) -> OutputVerdict | None:
    if settings.tolerance is not None or settings.max_error is not None:
        return None  # the user has set what is usable
    random = settings.data is None and settings.calibration is None
    return output_verdict(check, decisions, random=random, judged=judged)


def _predicted(plan: Plan, made: Assembled | None) -> float | None:
    """Damage on the samples of the search, with the methods that were taken; not with healing.

    Their errors are those of the pairs alone: what the rounding of weights loses stays as it was.
    """
    steps = () if made is None else made.steps
    taken = [step for step in steps if step.taken and step.method in (FISHER, REFIT)]
    before = _damage(taken[0], taken[0].error_before) if taken else None
    after = _damage(taken[-1], taken[-1].error_after) if taken else None
    if plan.damage is None or before is None or after is None:
        return plan.damage
    if any(choice.format is not None for choice in plan.choices.values()):
        return max(plan.damage - before + after, after)
    return after


def _damage(step: EffortStep, error: float | None) -> float | None:
    """An error as a damage."""
    if error is None:
        return None
    return error if step.error_of == "classes" else error**2


def _steps(prepared: Prepared, made: Assembled | None) -> tuple[EffortStep, ...]:
    """What was tried for more accuracy, and what was known not to be worth a try."""
    steps = prepared.steps + (() if made is None else made.steps)
    done = {step.method for step in steps}
    untried = (
        EffortStep(method, False, None, None, 0.0, why)
        for method, why in prepared.untried.items()
        if why is not None and method not in done
    )
    return (*steps, *untried)


def _uncertain(goal: BudgetReport, budget: Budget) -> list[str]:
    """What to say of a loss whose samples are too few to tell whether it is within the limit."""
    error = goal.loss_error
    if budget.kind != "tolerance" or goal.loss is None or error is None:
        return []
    if goal.loss + 2.0 * error <= budget.value:
        return []
    return [
        f"{budget.named}: the loss is {goal.loss:.3g} with a standard error of {error:.2g}; more "
        f"samples ({named('data')}, {named('samples')}) would tell whether the limit holds"
    ]


def _timed(settings: Settings, put_back: Sequence[str]) -> list[str]:
    """What to say where a timing had a part in the ranks, and how to have the same ones again."""
    budget = settings.budget
    decided = []
    if budget is not None and budget.timed:
        decided.append(budget.named)
    if settings.rank_multiple == "auto":
        decided.append(named("rank_multiple", "auto"))
    if settings.time_limit is not None:
        decided.append(named("time_limit", settings.time_limit))
    if put_back:
        decided.append("what is dense again because the model was slower")
    if not decided:
        return []
    path, option = settings.save_recipe, named("recipe")
    again = f"{named('save_recipe')} writes these ranks for {option}"
    if path is not None:
        again = f"{named('recipe', os.fspath(path))} makes this result again"
    return [f"timing decided ({', '.join(decided)}): another run may find other ranks; {again}"]


def _unused(settings: Settings, table: CostTable | None) -> list[str]:
    """What to say of a cost file that the goal did not need."""
    if table is not None:
        return []
    given = {"save_costs": settings.save_costs, "load_costs": settings.load_costs}
    done = {"save_costs": "not written", "load_costs": "not used"}
    return [
        f"{named(name, os.fspath(path))}: {done[name]}, this goal timed no single layer"
        for name, path in given.items()
        if path is not None
    ]
