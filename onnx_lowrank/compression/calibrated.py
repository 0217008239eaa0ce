"""Calibrate: what is gathered on samples before anything is measured, or loaded from a file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnx_lowrank.compression.classes import logits_of
from onnx_lowrank.compression.context import Context
from onnx_lowrank.compression.effort import FISHER, untried
from onnx_lowrank.compression.settings import Settings
from onnx_lowrank.errors import DerivativeError, InputError, named
from onnx_lowrank.fitting import statistics_file
from onnx_lowrank.fitting.gather import Away, gather
from onnx_lowrank.fitting.output_gradients import felt
from onnx_lowrank.fitting.sample_needs import wanted_samples
from onnx_lowrank.fitting.statistics import Gathered, Statistics, statistics_of
from onnx_lowrank.fitting.statistics_file import SavedFisher, SavedStatistics, weight_of
from onnx_lowrank.fitting.streams import MomentsKey
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.graph.fingerprint import fingerprint
from onnx_lowrank.graph.walk import node_name
from onnx_lowrank.maps.find import Group
from onnx_lowrank.numerics.fisher import Fisher
from onnx_lowrank.phrases import by_reason
from onnx_lowrank.ranks.recipe import Recipe
from onnx_lowrank.runtime.pieces import remembered
from onnx_lowrank.schema.report import Calibration

__all__ = ["calibrated"]

# Random directions that are taken back: where factors are fitted to what the outputs feel because
# the user says so; where that is tried; where only the shape of a damage curve hangs on it.  Each
# direction gives a row for every position of its sample, so that few tell much.  Measured: on a
# vision transformer 512 fit as well as 2048; on a sentence encoder 128 choose ranks as 512 do.
_DRAWS, _DRAWS_TRIED, _DRAWS_OF_DAMAGE = 2048, 512, 128


def calibrated(
    context: Context, model: ir.Model, groups: Sequence[Group]
) -> tuple[
    Statistics, Statistics, Calibration | None, SavedStatistics | None, dict[str, str | None]
]:
    """Moments of what the groups' weights are multiplied with, where there are samples.

    Args:
        context: the run.
        model: the model, simplified.
        groups: whose inputs are gathered.

    Returns:
        What the final factors are fitted to; what others are fitted to before; both in short; what
        is saved; the methods that the effort asks for (see `onnx_lowrank.compression.effort`).

    Raises:
        InputError: the samples or the statistics of a file do not fit the model.
    """
    if not groups:
        return Statistics(), Statistics(), None, None, {}
    load = context.settings.load_stats is not None
    # Maps around a width are rounded each by itself, on what it reads.
    rounds = context.settings.quantized.wanted
    maps = [own for group in groups for own in group.maps if rounds]
    saved, searched = (
        (_loaded(context), None) if load else _gathered(context, model, [*groups, *maps])
    )
    if saved is None:
        if context.settings.fisher:
            context.say("errors are not weighted by Fisher information: there are no samples")
        return Statistics(), Statistics(), None, None, {}
    found = statistics_of(model, groups, saved.gathered)
    settings = context.settings
    own = found if searched is None else statistics_of(model, groups, searched[0])
    apart = 0 if searched is None else len(context.trial.split.searched)
    rows = 1 if load else context.trial.split.rows  # what a file was made of is not known
    methods = untried(settings, own, saved.samples - apart, saved.samples, rows)
    if not apart and not isinstance(settings.recipe, Recipe):
        methods = {m: w or "no sample is kept aside" for m, w in methods.items()}
    tries = any(why is None for why in methods.values())
    if searched is not None and not settings.searched:
        # Nothing is searched.  What judges the methods is left out of the fit, if any is tried.
        found, searched = own if tries else found, None
    # Corrections take what the outputs feel most of, in a recipe's run as in the search of it.
    searches = settings.budget is not None and (settings.check or settings.bench)
    damaged = searches or _corrects(settings)
    if (settings.fisher or damaged or methods.get(FISHER, "") is None) and not load:
        tried = methods.get(FISHER, "") is None
        draws = _DRAWS if settings.fisher else _DRAWS_TRIED if tried else _DRAWS_OF_DAMAGE
        felt_by = _felt(context, model, list(found.fit), draws)
        by_weight = None if felt_by is None else {weight_of(g): own for g, own in felt_by.items()}
        if not felt_by and methods.get(FISHER, "") is None:
            methods[FISHER] = "what the outputs feel of the layers is not known"
        saved = replace(saved, fisher=by_weight)
    if context.settings.save_stats is not None:
        statistics_file.save(Path(context.settings.save_stats), saved)
    if saved.fisher is not None:
        roots, fitted = saved.fisher, found.fit
        # What an earlier run decided holds for the damage that it measured.
        decided = load and bool(saved.curves) and saved.curves_fisher
        if decided and settings.budget is not None and not settings.fisher:
            context.say("as in the run that saved them, factors are fitted by Fisher information")
        fitted_to_felt = settings.fisher or (decided and settings.budget is not None)
        known = {group: roots[weight_of(group)] for group in fitted if weight_of(group) in roots}
        found = replace(found, felt=known, fisher=known if fitted_to_felt else {})
    search = replace(found, held={})
    if searched is not None:
        own, aside = (statistics_of(model, groups, part) for part in searched)
        search = replace(own, held=aside.fit, fisher=found.fisher, felt=found.felt)
    for note in found.notes:
        context.say(note)
    _say_needs(context, found, saved.samples, rows)
    names = {node_name(g.members[0].site.node): why for g, why in found.missing.items()}
    for note in by_reason(names, "fitted to the weight alone"):
        context.say(note)
    if maps:
        of_maps = statistics_of(model, maps, saved.gathered)
        found = _with_maps(found, of_maps, groups)
        if searched is not None:
            own, aside = (statistics_of(model, maps, part) for part in searched)
            of_maps = replace(own, held=aside.fit)
        search = _with_maps(search, of_maps if searched else replace(of_maps, held={}), groups)
    return (
        found,
        search,
        Calibration(
            data=saved.data,
            samples=saved.samples,
            held_out=saved.held_out,
            mask=saved.mask,
            layers=len(found.fit),
            missing=names,
        ),
        saved,
        methods,
    )


def _with_maps(found: Statistics, own: Statistics, groups: Sequence[Group]) -> Statistics:
    """What is known of groups, and of their maps; what is felt of a group is so of its last map."""
    felt_of = {
        group.maps[-1]: found.felt[group] for group in groups if group.maps and group in found.felt
    }
    fit, held = {**found.fit, **own.fit}, {**found.held, **own.held}
    return replace(found, fit=fit, held=held, felt={**found.felt, **felt_of})


def _corrects(settings: Settings) -> bool:
    """Whether a recipe has layers whose rounding a pair corrects, of a search that knew more."""
    recipe = settings.recipe
    return (
        isinstance(recipe, Recipe)
        and settings.searched
        and any(own.format is not None and own.format.correction for own in recipe.layers)
    )


def _loaded(context: Context) -> SavedStatistics:
    """Moments of an earlier run."""
    path = Path(os.fspath(context.settings.load_stats or ""))
    with context.stages("calibrate"):
        saved = statistics_file.load(path, context.source.model, context.source.name)
    wanted = context.at, context.settings.damage_of
    if (saved.judged_at, saved.damage_of) != wanted:
        option = named("judge_at") if saved.judged_at != context.at else named("metric")
        if context.settings.fisher:
            raise InputError(
                f"{named('load_stats', path)}: its Fisher information is for other outputs: "
                f"expected {option} as when it was written"
            )
        context.say(f"{path}: damage in it is of something else than {option} says")
        saved = replace(saved, fisher=None, curves={}, judged_at=context.at, damage_of=wanted[1])
    if context.settings.fisher and saved.fisher is None:
        raise InputError(
            f"{named('load_stats', path)}: holds no Fisher information; expected what "
            f"{named('save_stats')} writes with {named('fisher', True)}"
        )
    context.say(f"{path}: moments of {saved.samples} samples of {saved.data} are used")
    return saved


def _gathered(
    context: Context, model: ir.Model, groups: Sequence[Group]
) -> tuple[SavedStatistics | None, tuple[Mapping[MomentsKey, Gathered], ...] | None]:
    """Moments of all samples; those without the ones a search judges with, and those of these."""
    settings, trial = context.settings, context.trial
    source = settings.calibration if settings.calibration is not None else settings.data
    if source is None or not settings.calibrate:
        return None, None
    with context.stages("prepare"):
        unavailable = trial.unavailable
    if unavailable is not None:
        if settings.calibration is not None:
            raise InputError(f"{named('calibration')}: {unavailable}")
        return None, None
    samples = trial.split.calibration
    if samples is None:
        return None, None
    mask = trial.mask
    held = trial.samples.feeds
    with context.stages("calibrate", len(samples.feeds) + len(held)) as advance:
        found = gather(
            model,
            groups,
            trial.runner,
            samples.feeds,
            held,
            mask,
            advance,
            trial.memory,
            aside=trial.split.searched if settings.keeps_aside else (),
            must_fit=settings.mask is not None,
            away=_away(context),
            pieces=context.pieces,
            joining=trial.joining,
        )
    saved = SavedStatistics(
        model=fingerprint(context.source.model),
        name=context.source.name,
        data=samples.source,
        samples=len(samples.feeds),
        held_out=len(held),
        mask=mask,
        gathered=found.whole,
        judged_at=context.at,
        damage_of=settings.damage_of,
    )
    return saved, found.apart


def _away(context: Context) -> Away | None:
    """How moments are gathered by the workers of an executor; None without one."""
    settings, trial = context.settings, context.trial
    if context.crew.executor is None:
        return None
    option = named("executor")
    if settings.custom_ops:
        context.say(
            f"{option}: moments are gathered in this process: the workers do not have the libraries"
            f" of {named('custom_ops')}"
        )
        return None

    def packed(model: ir.Model) -> bytes | None:
        found = trial.packed(model)
        if found is None:
            context.say(
                f"{option}: moments are gathered in this process: the model is too large to be sent"
            )
        return found

    crew = replace(context.crew, keeper=None)
    return Away(crew, packed, trial.threads, settings.ops, settings.constant_inputs)


def _say_needs(context: Context, found: Statistics, samples: int, rows: int) -> None:
    """Note the methods that want more samples than there are."""
    settings = context.settings
    used = {
        "Fisher information": settings.fisher,
        "refit": settings.refit,
        "healing": bool(settings.heal),
    }
    methods = [method for method, own in used.items() if own]
    wanted = wanted_samples(found, samples, methods, rows)
    few = [f"{method} about {count}" for method, count in wanted.items() if count > samples]
    if few:
        context.say(
            f"{samples} samples to fit to are few for these layers: enough would be for "
            f"{', '.join(few)}; expect little gain from these methods, or none"
        )


def _felt(
    context: Context, model: ir.Model, groups: Sequence[Group], draws: int
) -> Mapping[Group, Fisher] | None:
    """How each layer's errors change the model's outputs; None where there are no derivatives.

    Samples that a search judges with have no part in it.
    """
    settings, samples = context.settings, context.trial.split.calibration
    assert samples is not None  # moments were gathered of them
    aside = set(context.trial.split.searched if settings.keeps_aside else ())
    feeds = samples.part([n for n in range(len(samples.feeds)) if n not in aside]).feeds
    mask = context.trial.mask
    constants = Constants(model, settings.constant_inputs)
    logits, joining = logits_of(context, model), context.trial.joining
    weights = {weight_of(group): group for group in groups}
    context.trial.rest()
    with context.stages("fisher", len(feeds)) as advance:

        def measured() -> SavedFisher:
            found = felt(
                model,
                constants,
                groups,
                feeds,
                mask,
                context.trial.runner,
                advance,
                settings.seed,
                draws,
                context.trial.memory,
                logits,
                joining,
            )
            roots = {weight_of(group): own for group, own in found.found.items()}
            return SavedFisher(roots, dict(found.left), found.notes)

        def parts() -> Sequence[Any]:
            options = mask, settings.seed, draws, tuple(logits), joining.cuts
            return fingerprint(model, whole=True), list(weights), feeds, *options

        try:
            found = remembered(context.pieces, "fisher", parts, measured)
        except DerivativeError as error:
            what = (
                "errors are"
                if settings.fisher or draws > _DRAWS_OF_DAMAGE
                else "the damage of other ranks is"
            )
            context.say(f"{what} not weighted by Fisher information: {error}")
            return None
    own = {weights[weight]: root for weight, root in found.roots.items()}
    if not settings.fisher:
        return own
    for note in found.notes:
        context.say(note)
    for note in by_reason(found.left, "not weighted by Fisher information"):
        context.say(note)
    return own
