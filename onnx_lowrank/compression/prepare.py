"""Prepare: everything that is known before a rank is chosen, and is the same for every goal.

simplify → find → calibrate → measure
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import onnx_ir as ir

from onnx_lowrank.compression.classes import logits_of
from onnx_lowrank.compression.context import Context
from onnx_lowrank.compression.effort import FISHER, untried
from onnx_lowrank.errors import DerivativeError, InputError, named
from onnx_lowrank.fitting import statistics_file
from onnx_lowrank.fitting.output_gradients import felt
from onnx_lowrank.fitting.sample_needs import wanted_samples
from onnx_lowrank.fitting.spectra import measure
from onnx_lowrank.fitting.statistics import (
    Gathered,
    MomentsKey,
    Statistics,
    gather,
    statistics_of,
)
from onnx_lowrank.fitting.statistics_file import SavedStatistics, fingerprint, weight_of
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.graph.opset import raise_opset
from onnx_lowrank.graph.simplify import SIZE_LIMIT, simplify
from onnx_lowrank.graph.spool import Spool
from onnx_lowrank.graph.walk import node_name, stored_bytes
from onnx_lowrank.maps.adapters import merge_adapters
from onnx_lowrank.maps.choice import Spectrum
from onnx_lowrank.maps.find import Finding, Group, Selection, find
from onnx_lowrank.maps.formats import OPSET
from onnx_lowrank.maps.forms import all_forms, chosen_forms
from onnx_lowrank.maps.tables import Tables, find_tables
from onnx_lowrank.numerics.arrays import Feed
from onnx_lowrank.numerics.fisher import Fisher
from onnx_lowrank.phrases import by_reason, counted, listed
from onnx_lowrank.ranks.choose import choose, worth_measuring
from onnx_lowrank.ranks.formats import Formats, formats_of
from onnx_lowrank.ranks.goals import Goal
from onnx_lowrank.ranks.macs import Macs, count_macs
from onnx_lowrank.ranks.prepared import Prepared
from onnx_lowrank.ranks.recipe import Recipe, RecipeLayer, formats_in, ranks_of, tables_in
from onnx_lowrank.report import Calibration

__all__ = ["find_maps", "prepare"]

# Random directions that are taken back: where factors are fitted to what the outputs feel because
# the user says so; where that is tried; where only the shape of a damage curve hangs on it.  Each
# direction gives a row for every position of its sample, so that few tell much.  Measured: on a
# vision transformer 512 fit as well as 2048; on a sentence encoder 128 choose ranks as 512 do.
_DRAWS, _DRAWS_TRIED, _DRAWS_OF_DAMAGE = 2048, 512, 128


def find_maps(context: Context, model: ir.Model) -> Finding:
    """The linear maps of a model; of a copy of it the same ones in the same order."""
    settings = context.settings
    constants = Constants(model, settings.constant_inputs)
    return find(model, constants, all_forms(), chosen_forms(settings.ops))


def prepare(context: Context) -> Prepared:
    """Go through the stages.

    Raises:
        InputError: the model or the data are not what they should be.
    """
    goal = context.settings.goal
    context.question()
    context.fixed_sizes()
    model, selection = _simplified(context)
    with context.stages("find"):
        _merge_adapters(context, model, selection)
        finding = find_maps(context, model)
        early = {group: worth_measuring(group, goal, selection) for group in finding.groups}
        layers = _of_recipe(context, finding)
        early |= {group: None for group, layer in layers.items() if layer.rank is not None}
    undecided = [group for group, choice in early.items() if choice is None]
    statistics, search, calibration, saved, methods = _calibrated(context, model, undecided)
    with context.stages("measure", sum(group.matrix.size for group in undecided)) as advance:
        measured, bases = measure(
            undecided,
            search,
            advance,
            spectra=goal.needs_spectrum,
            energy=goal.energy,
            wanted=None if context.settings.dry_run else partial(_wanted, goal),
            folder=context.folder,
        )
    search = replace(search, bases=bases)
    # Components that were found with the same moments, or by the weights alone.
    alike = {g: own for g, own in bases.items() if search.fit.get(g) is statistics.fit.get(g)}
    statistics = replace(statistics, bases=alike)
    formats, floats, tables = _formats(context, model, finding, measured, layers, selection)
    return Prepared(
        model=model,
        finding=finding,
        early={group: choice for group, choice in early.items() if choice is not None},
        measured=measured,
        statistics=statistics,
        search=search,
        calibration=calibration,
        macs=_macs(context, model, finding),
        saved=saved,
        quantized=context.settings.quantized,
        formats=formats,
        floats=floats,
        tables=tables,
        untried=methods,
    )


def _of_recipe(context: Context, finding: Finding) -> dict[Group, RecipeLayer]:
    """What a recipe says of the groups that it names; nothing without a recipe.

    Raises:
        InputError: the recipe does not fit the model.
    """
    settings = context.settings
    if not isinstance(settings.recipe, Recipe):
        return {}
    recipe = settings.recipe
    kind = context.digest.partition(":")[0]
    if recipe.input.partition(":")[0] == kind and recipe.input != context.digest:
        context.say(f"{recipe.label}: was made for another model, {recipe.input}")
    return ranks_of(recipe, finding, settings.min_gain)


def _formats(
    context: Context,
    model: ir.Model,
    finding: Finding,
    measured: Mapping[Group, Spectrum],
    layers: Mapping[Group, RecipeLayer],
    selection: Selection,
) -> tuple[dict[Group, Formats], dict[Group, str], Tables]:
    """The formats that layers and tables may have, why others have none, and the tables.

    Raises:
        InputError: formats are asked for, and the model cannot be raised to their opset.
    """
    wanted, recipe = context.settings.quantized, context.settings.recipe
    formats: dict[Group, Formats] = {}
    floats: dict[Group, str] = {}
    tables = Tables()
    if wanted.wanted:
        constants = Constants(model, context.settings.constant_inputs)
        tables = find_tables(finding, model, constants, selection)
        formats, floats = formats_of(finding, measured, tables, model, wanted, selection)
    if isinstance(recipe, Recipe):
        formats, floats = formats_in(recipe, layers, formats, floats)
        formats |= tables_in(recipe, finding, tables)
    if not wanted.wanted:
        return formats, floats, tables
    if "gather" in wanted.ops:
        for name, why in tables.left.items():
            context.say(f"table {name} stays floats: {why}")
    if not formats:
        context.say("no weight has a number format: see the reasons of the layers")
        return formats, floats, tables
    try:
        # Each result is raised at its end; what cannot be is known before the work.
        raise_opset(model.clone(), OPSET)
    except InputError as error:
        if wanted.forced or recipe is not None:
            raise
        context.say(f"all weights stay floats: {error}")
        return {}, {}, Tables()
    return formats, floats, tables


def _wanted(goal: Goal, group: Group, spectrum: Spectrum) -> int | None:
    """How many components of a group factors may be made of, if any."""
    return goal.largest(group) if goal.budget else choose(group, spectrum, goal).rank


def _simplified(context: Context) -> tuple[ir.Model, Selection]:
    """A model to work on, simplified or a copy of the original, and which of its nodes are chosen.

    Globs name nodes of the original, as ``inspect`` lists them, and those of the simplified model.

    Raises:
        InputError: a glob names neither.
    """
    source, settings = context.judged, context.settings
    selection = settings.selection
    nodes: list[ir.Node] = []
    if selection.include or selection.exclude:
        nodes = [entry.node for entry in find_maps(context, source.model).entries]
    if not settings.simplify:
        selection.check(nodes)
        return source.model.clone(), selection

    def compared(path: Path) -> str | None:
        if settings.check:
            return context.trial.differs(path)
        context.say(f"simplified, but not compared with the original ({named('check', False)})")
        return None

    with context.stages("simplify"):
        found = simplify(
            source,
            context.folder,
            compared,
            named=selection.named(nodes),
            constant_inputs=settings.constant_inputs,
        )
    for note in found.notes:
        context.say(note)
    if found.model is None:
        selection.check(nodes)
        return source.model.clone(), selection
    if nodes:
        nodes += [entry.node for entry in find_maps(context, found.model).entries]
    selection.check(nodes)
    return found.model, selection.carried(found.merged)


def _merge_adapters(context: Context, model: ir.Model, selection: Selection) -> None:
    """Add adapters to the weights that they stand beside, in place."""

    def stays(base: ir.Node, nodes: Sequence[ir.Node]) -> str | None:
        left_out = (selection.excluded(node) for node in nodes)
        return selection.reason(base) or next((why for why in left_out if why is not None), None)

    settings = context.settings
    constants = Constants(model, settings.constant_inputs)
    with Spool(context.folder) as spool:
        found = merge_adapters(model, constants, chosen_forms(settings.ops), spool, stays)
    for note in by_reason(found.left, "adapters that stay beside their weights"):
        context.say(note)
    if found.nodes:
        names = [node_name(node) for node in found.nodes]
        context.say(
            f"{counted(len(names), 'adapter')} merged into the weights beside them, W + s·A·B, "
            f"{sum(found.nodes.values()):,} parameters: {listed(names, 4)}; linear parameters and "
            "MACs before are those of the merged model"
        )


def _calibrated(
    context: Context, model: ir.Model, groups: Sequence[Group]
) -> tuple[
    Statistics, Statistics, Calibration | None, SavedStatistics | None, dict[str, str | None]
]:
    """Moments of what the groups' weights are multiplied with, where there are samples.

    Returns:
        What the final factors are fitted to; what others are fitted to before; both in short; what
        is saved; the methods that the effort asks for (see `onnx_lowrank.compression.effort`).
    """
    if not groups:
        return Statistics(), Statistics(), None, None, {}
    load = context.settings.load_stats is not None
    saved, searched = (_loaded(context), None) if load else _gathered(context, model, groups)
    if saved is None:
        if context.settings.fisher:
            context.say("errors are not weighted by Fisher information: there are no samples")
        return Statistics(), Statistics(), None, None, {}
    found = statistics_of(model, groups, saved.gathered)
    settings = context.settings
    own = found if searched is None else statistics_of(model, groups, searched[0])
    apart = 0 if searched is None else len(context.trial.split.searched)
    methods = untried(settings, own, saved.samples - apart, saved.samples)
    tries = any(why is None for why in methods.values())
    if searched is not None and not settings.searched:
        # Nothing is searched.  What judges the methods is left out of the fit, if any is tried.
        found, searched = own if tries else found, None
    damaged = settings.budget is not None and (settings.check or settings.bench)
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
        known = {group: roots[weight_of(group)] for group in fitted if weight_of(group) in roots}
        found = replace(found, felt=known, fisher=known if settings.fisher else {})
    search = replace(found, held={})
    if searched is not None:
        own, aside = (statistics_of(model, groups, part) for part in searched)
        search = replace(own, held=aside.fit, fisher=found.fisher, felt=found.felt)
    for note in found.notes:
        context.say(note)
    _say_needs(context, found, saved.samples)
    names = {node_name(g.members[0].site.node): why for g, why in found.missing.items()}
    for note in by_reason(names, "fitted to the weight alone"):
        context.say(note)
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
    samples = trial.split.fitted_to
    if samples is None:
        return None, None
    mask = trial.mask
    held = trial.samples.feeds
    aside = trial.split.searched if settings.keeps_aside else ()
    fit = [feed for number, feed in enumerate(samples.feeds) if number not in set(aside)]
    rest = [samples.feeds[number] for number in aside]
    with context.stages("calibrate", len(samples.feeds) + len(held)) as advance:

        def gathered(own: Sequence[Feed], judge: Sequence[Feed]) -> dict[MomentsKey, Gathered]:
            return gather(
                model,
                groups,
                trial.runner,
                own,
                judge,
                mask,
                advance,
                trial.memory,
                must_fit=settings.mask is not None,
            )

        first = gathered(fit, held)
        second = gathered(rest, ()) if rest else None
    whole = first
    if second is not None:
        whole = {key: part.joined(second[key]) for key, part in first.items()}
    saved = SavedStatistics(
        model=fingerprint(context.source.model),
        name=context.source.name,
        data=samples.source,
        samples=len(samples.feeds),
        held_out=len(held),
        mask=mask,
        gathered=whole,
        judged_at=context.at,
        damage_of=settings.damage_of,
    )
    return saved, None if second is None else (first, second)


def _say_needs(context: Context, found: Statistics, samples: int) -> None:
    """Note the methods that want more samples than there are."""
    settings = context.settings
    used = {
        "Fisher information": settings.fisher,
        "refit": settings.refit,
        "healing": bool(settings.heal),
    }
    wanted = wanted_samples(found, samples, [method for method, own in used.items() if own])
    few = [f"{method} about {count}" for method, count in wanted.items() if count > samples]
    if few:
        context.say(
            f"{samples} samples to fit to are few for these layers, {', '.join(few)} would be "
            "enough; expect little gain from these methods, or none"
        )


def _felt(
    context: Context, model: ir.Model, groups: Sequence[Group], draws: int
) -> Mapping[Group, Fisher] | None:
    """How each layer's errors change the model's outputs; None where there are no derivatives.

    Samples that a search judges with have no part in it.
    """
    settings, samples = context.settings, context.trial.split.fitted_to
    assert samples is not None  # moments were gathered of them
    aside = set(context.trial.split.searched if settings.keeps_aside else ())
    feeds = [feed for number, feed in enumerate(samples.feeds) if number not in aside]
    mask = context.trial.mask
    constants = Constants(model, settings.constant_inputs)
    with context.stages("fisher", len(feeds)) as advance:
        try:
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
                logits_of(context, model),
            )
        except DerivativeError as error:
            what = (
                "errors are"
                if settings.fisher or draws > _DRAWS_OF_DAMAGE
                else "the damage of other ranks is"
            )
            context.say(f"{what} not weighted by Fisher information: {error}")
            return None
    if not settings.fisher:
        return found.found
    for note in found.notes:
        context.say(note)
    for note in by_reason(found.left, "not weighted by Fisher information"):
        context.say(note)
    return found.found


def _macs(context: Context, model: ir.Model, finding: Finding) -> Macs | None:
    """Multiply-accumulates, where the model is run at all."""
    if not context.runs():
        return None
    if stored_bytes(model) > SIZE_LIMIT:
        context.say(f"MACs not counted: the model is above {SIZE_LIMIT / 1e9:.0f} GB")
        return None
    with context.stages("count"):
        try:
            macs = count_macs(model, finding, context.trial.outputs)
        except InputError as error:
            context.say(f"MACs not counted: {error}")
            return None
    if macs.total is None:
        context.say("MACs not counted: part of the work is inside a subgraph or a function")
    return macs
