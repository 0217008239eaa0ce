"""Healing in a run: which constants are trained, on which samples, and what is said of it."""

from __future__ import annotations

import time

import onnx_ir as ir

from onnx_lowrank.calibrate import find_mask
from onnx_lowrank.context import Context
from onnx_lowrank.errors import InputError
from onnx_lowrank.heal import HealPlan, heal
from onnx_lowrank.report import Healing
from onnx_lowrank.spool import Spool
from onnx_lowrank.trained import install, trainable

__all__ = ["heal_factors"]


def heal_factors(
    context: Context, model: ir.Model, known: frozenset[str], spool: Spool
) -> Healing | None:
    """Gradient descent on the factors, in place; None where it is not wanted or none is reached.

    Args:
        context: the run.
        model: rewritten.
        known: names of its constants before.
        spool: where trained constants wait until they are saved.

    Raises:
        InputError: there are no samples, or an operator has no derivative.
    """
    settings, trial = context.settings, context.trial
    if not settings.heal:
        return None
    trained = trainable(model, known)
    if not trained:
        context.say("nothing to heal: no layer of the main graph was factored")
        return None
    with context.stages("prepare"):
        unavailable = trial.unavailable
    if unavailable is not None:
        raise InputError(f"--heal: {unavailable}")
    samples, every = trial.fitted_to, trial.calibration
    if samples is None or every is None or not trial.healed_by:
        raise InputError("--heal: expected two samples or more, one of them to judge with")
    start = time.perf_counter()
    with context.stages("heal", settings.heal) as advance:
        found = heal(
            model,
            context.source.model,
            trained,
            samples.feeds,
            every.part(trial.healed_by).feeds,
            settings.mask or find_mask(samples.feeds[0]),
            trial.runner,
            HealPlan(settings.heal, settings.heal_at, seed=settings.seed),
            advance,
            lambda _, error: context.stages.detail(f"held-out error {error:.4g}"),
        )
        install(model, found.arrays, spool)
    for note in found.notes:
        context.say(note)
    if found.arrays:
        context.say("the errors of single layers are those before healing")
    return Healing(
        steps=found.steps,
        best_step=found.best_step,
        error_before=found.error_before,
        error_after=found.error_after,
        batches=found.samples,
        held_out=found.held_out,
        values=found.values,
        trained=len(found.arrays),
        seconds=time.perf_counter() - start,
    )
