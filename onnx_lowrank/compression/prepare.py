"""Prepare: everything that is known before a rank is chosen, and is the same for every goal.

simplify → find → calibrate → measure
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import onnx_ir as ir

from onnx_lowrank.compression.calibrated import calibrated
from onnx_lowrank.compression.context import Context
from onnx_lowrank.compression.coordinates import Coordinates, decided
from onnx_lowrank.compression.static import static_steps
from onnx_lowrank.errors import InputError, named
from onnx_lowrank.fitting.spectra import group_memory, largest_first, measure
from onnx_lowrank.fitting.statistics import Statistics
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.graph.dequantize import (
    Dequantized,
    dequantize,
    holds_integers,
    quantized_inside,
)
from onnx_lowrank.graph.fixed import opset_of
from onnx_lowrank.graph.opset import raise_opset
from onnx_lowrank.graph.simplify import SIZE_LIMIT, simplify
from onnx_lowrank.graph.spool import Spool
from onnx_lowrank.graph.walk import node_name, stored_bytes
from onnx_lowrank.maps.adapters import merge_adapters
from onnx_lowrank.maps.choice import Choice, Spectrum
from onnx_lowrank.maps.find import Finding, Group, find
from onnx_lowrank.maps.forms import all_forms, chosen_forms
from onnx_lowrank.maps.selection import Selection
from onnx_lowrank.maps.tables import Tables, find_tables
from onnx_lowrank.phrases import by_reason, counted, listed
from onnx_lowrank.ranks.choose import wanted, worth_measuring
from onnx_lowrank.ranks.format_wishes import KINDS, FormatWishes
from onnx_lowrank.ranks.formats import Formats, formats_of, needed_opset, without_opset
from onnx_lowrank.ranks.from_recipe import formats_in, formats_off_in, ranks_of
from onnx_lowrank.ranks.macs import Macs, count_macs
from onnx_lowrank.ranks.prepared import Prepared
from onnx_lowrank.ranks.recipe import Recipe, RecipeLayer
from onnx_lowrank.runtime.memory import UNKNOWN, held
from onnx_lowrank.runtime.saturation import saturates

__all__ = ["find_maps", "prepare"]

# The opset from which on Clip has its limits as inputs in every type.
_CLIP = 13


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
    model, selection, integers = _simplified(context)
    with context.stages("find"):
        _merge_adapters(context, model, selection)
        finding = find_maps(context, model)
        for note in by_reason(finding.wide, "widths that stay as they are"):
            context.say(note)
        early = {group: worth_measuring(group, goal, selection) for group in finding.groups}
        layers = _of_recipe(context, finding)
        early |= {group: None for group, layer in layers.items() if layer.rank is not None}
    undecided = [group for group, choice in early.items() if choice is None]
    _say_room(context, undecided)
    statistics, search, calibration, saved, methods = calibrated(context, model, undecided)
    unknown = [g for g in undecided if g.inner is not None and g not in statistics.fit]
    early |= dict.fromkeys(unknown, Choice(None, "a width is narrowed by samples, and has none"))
    undecided = [group for group in undecided if early[group] is None]
    plain = _measured(context, undecided, search)
    measured, step = decided(context, model, methods, plain, partial(_measured, context, undecided))
    search = measured.statistics
    statistics = replace(statistics, fisher=search.fisher)
    if step is not None:
        methods = {method: why for method, why in methods.items() if method != step.method}
    # Components that were found with the same moments, or by the weights alone.
    alike = {
        g: own for g, own in search.bases.items() if search.fit.get(g) is statistics.fit.get(g)
    }
    # With Fisher information a recipe finds them again, and so does the run that it is of.
    taken = step is not None and step.taken
    statistics = replace(statistics, bases={} if taken else alike)
    wishes = _wanted_formats(context, integers)
    formats, floats, tables = _formats(
        context, model, finding, measured.spectra, layers, selection, wishes
    )
    static = static_steps(context, model, formats)
    return Prepared(
        model=model,
        finding=finding,
        early={group: choice for group, choice in early.items() if choice is not None},
        measured=measured.spectra,
        statistics=statistics,
        search=search,
        calibration=calibration,
        macs=_macs(context, model, finding),
        saved=saved,
        quantized=wishes,
        formats=formats,
        floats=floats,
        tables=tables,
        untried=methods,
        crew=context.crew,
        stored=integers.bytes,
        steps=() if step is None else (step,),
        pieces=context.pieces,
        static=static,
    )


def _say_room(context: Context, groups: Sequence[Group]) -> None:
    """Note where the user's limit is below what the largest weight takes when it is factored."""
    memory = context.trial.memory
    if not (memory.given and groups):
        return
    largest = largest_first(groups)[0]
    needed, own, room = group_memory(largest), held(), memory.room()
    option = named("memory", context.settings.memory)
    if own is None or room is None:
        context.trial.notes[f"{option}: {UNKNOWN}"] = None
    elif needed > room:
        what = f"factoring the weight of {node_name(largest.members[0].site.node)!r}"
        context.say(
            f"{option}: is not kept, layers are worked on one by one: "
            f"{memory.short(what, needed, own)}"
        )


def _measured(context: Context, groups: Sequence[Group], statistics: Statistics) -> Coordinates:
    """Spectra of groups and leading components, in the coordinates of the statistics."""
    goal = context.settings.goal
    with context.stages("measure", sum(group.matrix.size for group in groups)) as advance:
        spectra, bases = measure(
            groups,
            statistics,
            advance,
            spectra=goal.needs_spectrum,
            energy=goal.energy,
            wanted=None if context.settings.dry_run else lambda group: wanted(group, goal),
            folder=context.folder,
            crew=context.crew,
        )
    return Coordinates(replace(statistics, bases=bases), spectra)


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
    wanted: FormatWishes,
) -> tuple[dict[Group, Formats], dict[Group, str], Tables]:
    """The formats that layers and tables may have, why others have none, and the tables.

    Raises:
        InputError: formats are asked for, and the model cannot be raised to their opset.
    """
    recipe = context.settings.recipe
    formats: dict[Group, Formats] = {}
    floats: dict[Group, str] = {}
    tables = Tables()
    if wanted.integers is not None and wanted.integers.dynamic:
        # Integers without a sign are exact on every machine; elsewhere than here that is safe.
        here = context.settings.shape_for in (None, "cpu")
        wanted = replace(wanted, integers=replace(wanted.integers, signed=here and not saturates()))
    if wanted.wanted:
        constants = Constants(model, context.settings.constant_inputs)
        tables = find_tables(finding, model, constants, selection)
        formats, floats = formats_of(finding, measured, tables, model, wanted, selection)
    if isinstance(recipe, Recipe):
        off = formats_off_in(recipe, finding, tables, formats, floats)
        formats, floats = formats_in(recipe, layers, formats, floats)
        formats |= off
    if not wanted.wanted:
        return formats, floats, tables
    if "gather" in wanted.ops:
        for name, why in tables.left.items():
            context.say(f"table {name} stays floats: {why}")
        if tables.groups and not wanted.blocks and recipe is None:
            context.say(
                f"tables stay floats, since the target takes none of integers: "
                f"{listed(list(tables.groups), 4)}"
            )
    if not formats:
        context.say("no weight has a number format: see the reasons of the layers")
        return formats, floats, tables
    opset = needed_opset(formats)
    try:
        # Each result is raised at its end; what cannot be is known before the work.
        raise_opset(model.clone(), opset)
    except InputError as error:
        rest = without_opset(formats, opset_of(model))
        if len(rest) < len(formats) and (wanted.forced or recipe is not None):
            raise
        if not rest:
            context.say(f"all weights stay floats: {error}")
            return {}, {}, Tables()
        if rest != formats:
            context.say(f"formats that need opset {opset} are left out: {error}")
        floats |= dict.fromkeys(formats.keys() - rest.keys(), "its formats need a newer opset")
        formats = rest
    return formats, floats, tables


def _wanted_formats(context: Context, integers: Dequantized) -> FormatWishes:
    """The formats that are asked for; as many bits as a weight had where none are named."""
    wanted = context.settings.quantized
    if wanted.own is None:
        return wanted
    own = {name: str(bits) for name, bits in integers.bits.items() if str(bits) in KINDS}
    return replace(wanted, own=own) if own else FormatWishes()


def _simplified(context: Context) -> tuple[ir.Model, Selection, Dequantized]:
    """A model to work on, simplified or a copy of the original, and which of its nodes are chosen.

    With them goes what was made floats of integers.

    Globs name nodes of the original, as ``inspect`` lists them, and those of the simplified model.

    Raises:
        InputError: a glob names neither.
    """
    source, settings = context.judged, context.settings
    selection = settings.selection
    nodes: list[ir.Node] = []
    if selection.include or selection.exclude:
        nodes = [entry.node for entry in find_maps(context, source.model).entries]

    def made(model: ir.Model) -> tuple[ir.Model, Dequantized]:
        integers = _dequantized(context, model)
        if nodes:
            nodes.extend(entry.node for entry in find_maps(context, model).entries)
        selection.check(nodes)
        return model, integers

    if not settings.simplify:
        model, integers = made(source.model.clone())
        return model, selection, integers

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
            memory=settings.memory_limit,
        )
    for note in found.notes:
        context.say(note)
    if found.model is None:
        model, integers = made(source.model.clone())
        return model, selection, integers
    model, integers = made(found.model)
    return model, selection.carried(found.merged), integers


def _dequantized(context: Context, model: ir.Model) -> Dequantized:
    """Make floats of the weights that are integers, in place, where that is asked for."""
    settings = context.settings
    if not settings.requantize:
        return Dequantized()
    option = named("requantize", True)
    nothing = f"{option}: no weight is quantized in a way that can be made floats"
    stay = f"{option}: weights that stay as they are"
    if not holds_integers(model):
        for note in by_reason(quantized_inside(model), stay):
            context.say(note)
        context.say(nothing)
        return Dequantized()
    try:
        raised = raise_opset(model, _CLIP)
    except InputError as error:
        context.say(f"{option}: weights stay as they are: {error}")
        return Dequantized()
    with Spool(context.folder) as spool:
        found = dequantize(model, spool)
    for note in by_reason(found.left, stay):
        context.say(note)
    context.say(raised)
    if not found.bits:
        context.say(nothing)
        return found
    size = sum(found.bytes.values()) / 1e6
    context.say(
        f"{counted(len(found.bits), 'weight')} of {size:.3g} MB were integers in "
        f"{context.source.name}; they are floats for the time of the run, and what rounds the "
        "inputs of their maps in every run is gone"
    )
    return found


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
