"""Timings: the cost table of a run, measured here or loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from onnx_lowrank import cost_file
from onnx_lowrank.context import Context
from onnx_lowrank.costs import CostTable, Place, measure_costs, plan_costs
from onnx_lowrank.errors import InputError
from onnx_lowrank.find import Group
from onnx_lowrank.microbench import clock_for, session_timer
from onnx_lowrank.prepare import Prepared

__all__ = ["cost_table"]


def cost_table(
    context: Context, prepared: Prepared, groups: Sequence[Group], *, multiples: bool = False
) -> CostTable:
    """How long each group takes on the provider and threads of the run, by rank.

    With ``multiples`` also which multiple the ranks should be on.  What a loaded table
    (``--load-costs``) holds is not measured again.

    Raises:
        InputError: a table cannot be read or written.
    """
    settings, trial = context.settings, context.trial
    if trial.provider.emulated:
        raise InputError(
            f"--ep {trial.provider.name}: {trial.provider.title} is emulated here, its times mean "
            "nothing; a goal that is a latency cannot be met"
        )
    place = Place.here(trial.provider.full, trial.threads)
    known = None if settings.load_costs is None else cost_file.load(Path(settings.load_costs))
    plan = plan_costs(groups, prepared.model, trial.outputs)
    with context.stages("time layers", len(plan.missing(known, place))) as advance:
        timer = session_timer(trial.open, clock_for(place.provider, place.threads))
        table = measure_costs(plan, timer, place, advance, known, multiples=multiples)
    if settings.save_costs is not None:
        cost_file.save(Path(settings.save_costs), table)
    return table
