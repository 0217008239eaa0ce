"""Effort: ways to more accuracy at the same ranks, each tried and judged on samples kept aside.

The pairs of the plain fit are where it starts.  A method is kept if the whole model is nearer to
the original with it, on samples to which nothing was fitted; else it is dropped.  What was tried,
what it gained and what it cost are `EffortStep` objects of the report, and so is why something was
not tried.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from onnx_lowrank.compression.context import Context
from onnx_lowrank.compression.settings import Settings
from onnx_lowrank.data.samples import Samples
from onnx_lowrank.errors import InputError, named
from onnx_lowrank.fitting.fit import fit
from onnx_lowrank.fitting.refit import Refitted, refit
from onnx_lowrank.fitting.sample_needs import wanted_samples
from onnx_lowrank.fitting.statistics import Statistics
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.maps.choice import Choice
from onnx_lowrank.maps.find import Group
from onnx_lowrank.maps.pair import Factors, constants_of_pairs
from onnx_lowrank.phrases import by_reason, size
from onnx_lowrank.ranks.prepared import Prepared
from onnx_lowrank.ranks.probe import Probe
from onnx_lowrank.ranks.recipe import Recipe
from onnx_lowrank.schema.report import EffortStep

__all__ = [
    "FISHER",
    "REFIT",
    "Improved",
    "error_of",
    "improved",
    "judging_probe",
    "methods_of",
    "refitted",
    "untried",
]

FISHER, REFIT = "Fisher information", "refit"
_NOT_REFITTED = "not refitted"
# With so many rows of samples Fisher information is worth a try, as samples kept aside judge it; to
# be sure of a gain it wants more (`onnx_lowrank.fitting.sample_needs`).
_TRY_FISHER = 64
# Samples that judge, at most; a tolerance searches with more.
_MOST_JUDGING = 64


# What a refit holds of the samples of a run: values of both models, their rows, and products.
_HELD = 4


# How a recipe calls them.
_KEYS = {FISHER: "fisher", REFIT: "refit"}


def methods_of(prepared: Prepared, steps: Sequence[EffortStep]) -> dict[str, bool]:
    """What was tried, as a recipe has it, and whether the result has it."""
    tried = [*prepared.steps, *steps]
    known = {method for method, why in prepared.untried.items() if why is None}
    known |= {step.method for step in prepared.steps}
    taken = {step.method for step in tried if step.taken}
    return {key: method in taken for method, key in _KEYS.items() if method in known}


@dataclass(frozen=True, eq=False)
class Improved:
    """The pairs, and what was tried to make them better.

    Attributes:
        factors: for every group that has a rank; None where the plain fit is best.
        steps: what was tried, in this order.
    """

    factors: Mapping[Group, Factors] | None
    steps: tuple[EffortStep, ...]


def untried(
    settings: Settings, statistics: Statistics, gathered: int, samples: int, rows: int
) -> dict[str, str | None]:
    """The methods that the effort asks for, and why one is not worth a try; None where it is.

    What the user named is not among them: that is done whatever it gains.

    Args:
        settings: of the run.
        statistics: moments of the layers, without the samples kept aside.
        gathered: samples that these are of.
        samples: how many there are to fit to, with those kept aside.
        rows: how many rows a sample holds.
    """
    if settings.load_stats is not None:
        return {}
    if isinstance(settings.recipe, Recipe):
        return {method: None for method, key in _KEYS.items() if key in settings.recipe.methods}
    if settings.effort_used == "quick" or settings.dry_run:
        return {}
    asked = {FISHER: settings.fisher, REFIT: settings.refit}
    methods = [method for method, named in asked.items() if not named]
    if not statistics.fit or not (settings.check or settings.bench):
        return {}
    needs = wanted_samples(statistics, gathered, methods, rows)
    needs[FISHER] = math.ceil(_TRY_FISHER / rows)
    found: dict[str, str | None] = {}
    for method in methods:
        few = samples < needs[method]
        found[method] = (
            f"{samples} samples to fit to, {needs[method]} would be enough" if few else None
        )
    known = settings.searched or settings.effort_used == "thorough"
    if found.get(FISHER, "") is None and not known:
        # Without a goal for the whole model nothing else needs the derivatives.
        found[FISHER] = f"this goal takes no derivatives; {named('effort', 'thorough')} tries it"
    return found


def improved(context: Context, prepared: Prepared, choices: Mapping[Group, Choice]) -> Improved:
    """Try what the effort asks for.

    Args:
        context: the run.
        prepared: the model.
        choices: what becomes of the layers.
    """
    methods = [method for method, why in prepared.untried.items() if why is None]
    recipe = context.settings.recipe
    known = recipe.methods if isinstance(recipe, Recipe) else None
    if known is not None:
        methods = [method for method in methods if known[_KEYS[method]]]
    ranked = [group for group, choice in choices.items() if choice.rank is not None]
    if not methods or not ranked:
        return Improved(None, ())
    split, steps = context.trial.split, list[EffortStep]()
    samples = split.calibration
    assert samples is not None  # moments were gathered of them
    fitted_to = samples.part([n for n in range(len(samples.feeds)) if n not in split.searched])
    fitting = replace(prepared.search, held=prepared.statistics.held)
    if any(step.taken for step in prepared.steps):
        fitting = replace(fitting, bases={})  # as the recipe of this run finds them
    with context.stages("effort"):
        probe = judging_probe(context, prepared.model, ranked)
        pairs = dict(fit(choices, fitting, lambda _: None, context.crew))
        error = error_of(probe, pairs) if known is None else None
    of = context.settings.damage_of
    for method in methods:
        if known is None and (error is None or context.late()):
            why = "the time is up" if context.late() else "no sample kept aside shows an error"
            steps.append(EffortStep(method, False, None, None, 0.0, why))
            continue
        start, other = time.perf_counter(), fitting
        if method == FISHER:
            start -= context.stages.seconds.get("fisher", 0.0)
        if method == FISHER:
            other = replace(fitting, fisher=fitting.felt, bases={})
            with context.stages("effort"):
                tried: Mapping[Group, Factors] = dict(
                    fit(choices, other, lambda _: None, context.crew)
                )
        else:
            found = refitted(context, prepared, pairs, fitting, fitted_to)
            if isinstance(found, str):
                steps.append(
                    EffortStep(method, False, None, None, time.perf_counter() - start, found)
                )
                continue
            tried = found.factors
        with context.stages("effort"):
            after = error_of(probe, tried) if known is None else None
        taken = known is not None or (after is not None and error is not None and after < error)
        seconds = time.perf_counter() - start
        steps.append(EffortStep(method, taken, error, after, seconds, error_of=of))
        if taken:
            pairs, fitting, error = dict(tried), other, after
        elif method == REFIT:  # which layers it left has no meaning any more
            _unsay_refit(context)
    done = {step.method for step in steps if step.taken}
    if REFIT in done:
        return Improved(pairs, tuple(steps))
    if not done:
        return Improved(None, tuple(steps))
    # Samples that judged have a part in the last fit, as they have where nothing is tried.
    whole = replace(prepared.statistics, fisher=prepared.search.felt, bases={})
    with context.stages("fit", sum(group.matrix.size for group in ranked)) as advance:
        return Improved(dict(fit(choices, whole, advance, context.crew)), tuple(steps))


def refitted(
    context: Context,
    prepared: Prepared,
    pairs: Mapping[Group, Factors],
    statistics: Statistics,
    samples: Samples,
) -> Refitted | str:
    """The pairs, fitted again to what the compressed model gives each layer; or why not.

    Args:
        context: the run.
        prepared: the model.
        pairs: of every group that has a rank.
        statistics: in what coordinates errors count alike.
        samples: what they are fitted to; a part of them judges each layer.
    """
    work = sum(group.matrix.size for group in pairs)
    constants = Constants(prepared.model, context.settings.constant_inputs)
    context.trial.rest()
    with context.stages("refit", work) as advance:
        try:
            found = refit(
                prepared.model,
                constants,
                pairs,
                statistics,
                samples.feeds,
                context.trial.mask,
                context.trial.runner,
                advance,
                context.trial.memory,
                context.pieces,
                context.trial.joined(_HELD),
            )
        except InputError as error:
            return str(error)
    if found.spilled:
        context.say(f"refit: {size(found.spilled)} of values waited in files: memory")
    _unsay_refit(context)  # what was said of a model that was tried before
    for note in by_reason(found.left, _NOT_REFITTED):
        context.say(note)
    return found


def _unsay_refit(context: Context) -> None:
    for note in [note for note in context.notes if note.startswith(_NOT_REFITTED)]:
        del context.notes[note]


def judging_probe(context: Context, model: ir.Model, groups: Sequence[Group]) -> Probe:
    """The model with some of the samples kept aside, to judge what is tried.

    Args:
        context: the run.
        model: the model, simplified.
        groups: whose pairs are judged.
    """
    judging, trial = context.trial.split.search.feeds, context.trial
    places = {int(p) for p in np.linspace(0, len(judging) - 1, min(len(judging), _MOST_JUDGING))}
    feeds = [judging[place] for place in sorted(places)]
    how = trial.reading, context.settings.metric_used.of_classes
    known = context.probe
    if known is not None and known.serves(model, groups, feeds, *how):
        return known
    return context.keep(
        Probe(
            model,
            groups,
            feeds,
            trial.runner,
            *how,
            memory=trial.memory,
            pieces=context.pieces,
            joining=trial.joining,
        )
    )


def error_of(probe: Probe, pairs: Mapping[Group, Factors]) -> float | None:
    """Relative error of the outputs, root mean square over samples; None where none shows any.

    Of classes it is their divergence.
    """
    within = set(probe.groups)
    own = {group: pair for group, pair in pairs.items() if group in within}
    damage = probe.damage(constants_of_pairs(own))
    if not damage:
        return None
    return damage if probe.watched.by_classes else math.sqrt(damage)
