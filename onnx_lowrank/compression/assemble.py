"""Assemble: a model from choices of ranks, by fit → refit → rewrite → heal → write.

The prepared model stays as it is; every assembly works on a copy that shares its weights, so that
several goals, or a second try at one, need the stages before only once.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnx_lowrank.compression.classes import logits_of
from onnx_lowrank.compression.context import Context
from onnx_lowrank.compression.effort import Improved, improved, methods_of, refitted
from onnx_lowrank.compression.prepare import find_maps
from onnx_lowrank.compression.recording import recipe_for
from onnx_lowrank.compression.result import Destination
from onnx_lowrank.compression.rounding import ROUNDING_NOTES, round_model
from onnx_lowrank.compression.settings import Settings
from onnx_lowrank.compression.static import round_around
from onnx_lowrank.errors import DerivativeError, InputError, ShortError, named
from onnx_lowrank.evaluation.inside import taken_back
from onnx_lowrank.fitting.fit import fit
from onnx_lowrank.fitting.heal import HealPlan, heal
from onnx_lowrank.fitting.rounded_maps import Width
from onnx_lowrank.fitting.rounding import Rounded, close_rounding
from onnx_lowrank.fitting.trainable import beside, constant_names, trainable
from onnx_lowrank.graph.elements import install
from onnx_lowrank.graph.face import differences, drop_inferred
from onnx_lowrank.graph.inline import put_back
from onnx_lowrank.graph.provenance import write_metadata
from onnx_lowrank.graph.save import check_embeddable, written_bytes
from onnx_lowrank.graph.shape_for import SHAPED, shape_for
from onnx_lowrank.graph.spool import Spool
from onnx_lowrank.graph.validity import invalid
from onnx_lowrank.graph.walk import elements, stored_bytes
from onnx_lowrank.maps.choice import Choice, Decision, removed_parameters
from onnx_lowrank.maps.find import Group
from onnx_lowrank.maps.narrow import narrowed_values
from onnx_lowrank.maps.pair import Errors, Factors
from onnx_lowrank.maps.rewrite import rewrite
from onnx_lowrank.ranks.choose import decide
from onnx_lowrank.ranks.prepared import Prepared
from onnx_lowrank.ranks.recipe import Recipe
from onnx_lowrank.ranks.recipe_file import to_metadata
from onnx_lowrank.schema.report import EffortStep, Healing

__all__ = ["Assembled", "assemble", "predicted"]

_CHANGED = "the result's face differs from the input's: "
# Steps of the first round of healing where nobody says how many, and rounds at most.
_ROUND, _ROUNDS = 100, 6
_BEFORE_ROUNDING = "healing before weights were rounded: "
# How notes on one assembly begin.
_AGAIN = (SHAPED, _CHANGED, _BEFORE_ROUNDING, *ROUNDING_NOTES)


@dataclass(frozen=True, eq=False)
class Assembled:
    """A model with pairs in it, written to the workspace.

    Attributes:
        model: the model.
        files: its files, the model itself last.
        decisions: what became of every linear map of the prepared model.
        errors: how far the pairs are off.
        recipe: what makes the model again.
        healing: what gradient descent did to them; None without.
        rounded: what became of weights with a format.
        steps: what was tried for more accuracy.
    """

    model: ir.Model
    files: tuple[Path, ...]
    decisions: tuple[Decision, ...]
    errors: Mapping[Group, Errors]
    recipe: Recipe
    healing: Healing | None = None
    rounded: Mapping[Group, Rounded] = field(default_factory=dict)
    steps: tuple[EffortStep, ...] = ()

    @property
    def path(self) -> Path:
        """The model file."""
        return self.files[-1]

    @property
    def bytes(self) -> int:
        """Size with external data."""
        return written_bytes(self.files)


def predicted(prepared: Prepared, decisions: Iterable[Decision]) -> tuple[int, int]:
    """Parameters and bytes of weights after decisions that are not carried out."""
    parameters, size = elements(prepared.model), stored_bytes(prepared.model)
    for group, decision in {d.group: d for d in decisions if d.group is not None}.items():
        removed = removed_parameters(decision)
        parameters -= removed
        if decision.choice.format is None:
            size -= int(removed * group.matrix.tensor.dtype.itemsize)
        else:
            before = sum(own.matrix.tensor.nbytes for own in group.alone)
            size -= before - decision.choice.bytes(group)
    return parameters, size


def assemble(
    context: Context,
    prepared: Prepared,
    choices: Mapping[Group, Choice],
    destination: Destination | None,
    folder: Path,
    *,
    more: bool = False,
    goal: Mapping[str, Any] | None = None,
) -> Assembled:
    """Put pairs in place of the weights.

    Args:
        context: the run.
        prepared: the model; it is not changed.
        choices: one for each node (see `onnx_lowrank.ranks.choose.settle`).
        destination: names the file, and says where weights go.
        folder: where the files are written.
        more: whether what the effort asks for, and healing, take part.
        goal: what the choices were made for; None for the goal of the settings.

    Raises:
        InputError: the result cannot be written, or is not valid.
    """
    decisions = decide(prepared.finding, choices)
    if destination is not None and destination.external_data == "never":
        check_embeddable(predicted(prepared, decisions)[1])  # before the work is done
    constant_inputs = context.settings.constant_inputs
    work = sum(g.matrix.size for g, choice in choices.items() if choice.rank is not None)
    model = prepared.model.clone()
    finding = find_maps(context, model)
    own = dict(zip(prepared.finding.groups, finding.groups, strict=True))
    with Spool(folder) as spool:
        pairs, steps = _fitted(context, prepared, choices, work, more=more)
        with context.stages("rewrite", work) as advance:
            if pairs is None:
                pairs = fit(choices, prepared.statistics, advance, context.crew)
            known, widths = constant_names(model, constant_inputs), dict[Group, Width]()
            errors = rewrite(model, _given(pairs, own, choices, widths), spool)
        lowered = [own[g] for g, choice in choices.items() if choice.rank and g.heads]
        other = [name for group in lowered for name in narrowed_values(group)]
        heals = more and context.settings.heals and not _dropped(context)
        healing = step = None
        if heals:
            trained = trainable(model, known, lowered, constant_inputs)
            healing, step = _healed(context, prepared, model, trained, spool, other)
            steps += () if step is None else (step,)
        for note in [text for text in context.notes if text.startswith(_AGAIN)]:
            del context.notes[note]  # of an earlier assembly
        rounded, opened = round_model(
            context, prepared, model, choices, finding, spool, heals=heals, widths=widths
        )
        if opened.corrections or opened.scales:
            corrections = opened.corrections.values()
            nodes = [node for own in corrections for node in own.beside]
            nodes += [node for own in opened.scales.values() for node in own]
            pairs_of = [name for own in corrections for name in own.names]
            trained = (*pairs_of, *opened.scales, *beside(model, nodes, constant_inputs))
            again, step = _healed(context, prepared, model, trained, spool, other)
            if healing is not None and again is not None:
                context.say(
                    f"{_BEFORE_ROUNDING}held-out error {healing.error_before:.3g} → "
                    f"{healing.error_after:.3g} of the pairs; then scales, and what corrects "
                    "roundings"
                )
            healing = _both(healing, again)
            steps += () if step is None else (step,)
        close_rounding(model, opened, prepared.statistics, spool)
        if heals and healing is None and step is None:
            context.say(
                "nothing to heal: no layer of the main graph was factored or stored in integers"
            )
        if context.settings.shape_for is not None:
            for note in shape_for(model, context.settings.shape_for, context.trial.sizes):
                context.say(note)
        if opened.static:
            round_around(context, prepared, model, opened.static, spool)
    taken_back(model, context.at, context.source.model)
    if context.inlined:
        put_back(model, context.judged.model, context.source.model)
    drop_inferred(model)
    if context.settings.shape_for is None:  # else it has been said
        changes = differences(context.source.model, model)
        if changes:
            context.say(f"{_CHANGED}{'; '.join(changes)}")
    methods = methods_of(prepared, steps)
    given = context.settings.data, context.settings.calibration
    if context.settings.heals and context.settings.calibrate and any(s is not None for s in given):
        methods["heal"] = heals
    recipe = recipe_for(context, prepared, decisions, goal, methods)
    if _changed(context, decisions):
        write_metadata(model.metadata_props, to_metadata(recipe))
    destination = destination or Destination(folder / "model.onnx")
    with context.stages("write"):
        files = destination.write(model, folder)
        _check_validity(context, model)
    return Assembled(
        model=model,
        files=files,
        decisions=decisions,
        errors={group: errors[other] for group, other in own.items() if other in errors},
        recipe=recipe,
        healing=healing,
        rounded=rounded,
        steps=steps,
    )


def _given(
    pairs: Iterable[tuple[Group, Factors]],
    own: Mapping[Group, Group],
    choices: Mapping[Group, Choice],
    widths: dict[Group, Width],
) -> Iterable[tuple[Group, Factors]]:
    """The pairs for groups of a copy; what they leave of widths is noted where it is rounded."""
    for group, pair in pairs:
        if group.maps and choices[group].format is not None:
            widths[group] = Width.of(group, pair)
        yield own[group], pair


def _dropped(context: Context) -> bool:
    """Whether healing took part in the search for the recipe's goal, and not in the result."""
    recipe = context.settings.recipe
    return isinstance(recipe, Recipe) and not recipe.methods.get("heal", True)


def _changed(context: Context, decisions: Sequence[Decision]) -> bool:
    """Whether anything is done to the model that it should say."""
    return any(d.choice.changed for d in decisions) or context.settings.shape_for is not None


def _fitted(
    context: Context, prepared: Prepared, choices: Mapping[Group, Choice], work: int, *, more: bool
) -> tuple[Iterable[tuple[Group, Factors]] | None, tuple[EffortStep, ...]]:
    """The pairs, better than by the plain fit; None where that is as good.  And what was tried.

    Args:
        context: the run.
        prepared: the model.
        choices: what becomes of the layers.
        work: elements of all that has a rank.
        more: whether what the effort asks for is tried.
    """
    settings = context.settings
    found = improved(context, prepared, choices) if more and work else Improved(None, ())
    measured = any(step.error_after is not None for step in found.steps)
    if measured and any(choice.format is not None for choice in choices.values()):
        context.say("the errors of fits that were tried are those before weights are rounded")
    if not settings.refit:
        return None if found.factors is None else found.factors.items(), found.steps
    samples = context.trial.split.calibration
    if samples is None:
        context.say("nothing was refitted: there are no samples to fit to")
        return None, found.steps
    if len(samples.feeds) == 1:
        context.say("nothing was refitted: of one sample none is left to judge the refit")
        return None, found.steps
    statistics, pairs = prepared.statistics, found.factors
    if pairs is None:
        with context.stages("fit", work) as advance:
            pairs = dict(fit(choices, statistics, advance, context.crew))
    else:  # Fisher information was taken
        statistics = replace(statistics, fisher=prepared.search.felt)
    again = refitted(context, prepared, pairs, statistics, samples)
    if isinstance(again, str):
        context.say(f"nothing was refitted: {again}")
        return pairs.items(), found.steps
    return again.factors.items(), found.steps


def _healed(
    context: Context,
    prepared: Prepared,
    model: ir.Model,
    trained: tuple[str, ...],
    spool: Spool,
    narrowed: Collection[str],
) -> tuple[Healing | None, EffortStep | None]:
    """Gradient descent on factors, in place; and the step that it is, where effort asked.

    None and None where there are no factors.

    Args:
        context: the run.
        prepared: what the model was made from.  What it gives is aimed at, not what the input
            gives: onnxsim may keep a name for another value, as it does where it folds a
            normalization into a convolution.
        model: rewritten.
        trained: names of the constants to change.
        spool: where trained constants wait until they are saved.
        narrowed: values that are narrower than in what it was made from.

    Raises:
        InputError: there are no samples, or an operator has no derivative, though healing was
            named.
    """
    settings, trial = context.settings, context.trial
    if not trained:
        return None, None
    with context.stages("prepare"):
        unavailable = trial.unavailable
    samples = None if unavailable is not None else trial.split.healing
    if samples is None:
        why = unavailable or "expected two samples or more, one of them to judge with"
        return _unhealed(settings, InputError(why))
    if context.late():
        return _unhealed(settings, InputError("the time is up"))
    descending, judging = samples
    plan = HealPlan(settings.heal, settings.heal_at, seed=settings.seed, until=context.until)
    if not settings.heal:
        plan = replace(plan, steps=_ROUND, rounds=_ROUNDS, rate=None)
    logits = logits_of(context, prepared.model)
    start = time.perf_counter()
    trial.rest()
    with context.stages("heal", settings.heal or None) as advance:
        try:
            found = heal(
                model,
                prepared.model,
                trained,
                descending.feeds,
                judging.feeds,
                trial.mask,
                trial.runner,
                plan,
                advance,
                lambda _, error: context.stages.detail(f"held-out error {error:.4g}"),
                trial.memory,
                logits,
                narrowed,
                context.pieces,
            )
        except ShortError as error:
            context.say(f"nothing was healed: {error}")
            return None, None
        except DerivativeError as error:
            return _unhealed(settings, error)
        install(model, found.arrays, spool)
    for note in found.notes:
        context.say(note)
    if found.arrays:
        context.say("the errors of single layers are those before healing")
    seconds = time.perf_counter() - start
    healing = Healing(
        steps=found.steps,
        best_step=found.best_step,
        error_before=found.error_before,
        error_after=found.error_after,
        batches=found.samples,
        held_out=found.held_out,
        values=found.values,
        trained=len(found.arrays),
        seconds=seconds,
        rate=found.rate,
        error_of=settings.damage_of,
    )
    errors = found.error_before, found.error_after
    better = bool(found.best_step)
    step = EffortStep("healing", better, *errors, seconds, error_of=settings.damage_of)
    return healing, step


def _unhealed(settings: Settings, why: InputError) -> tuple[None, EffortStep]:
    """Healing that cannot be done: an error where it was named, else a step that was not tried."""
    if settings.heal and str(why) != "the time is up":
        raise InputError(f"{named('heal')}: {why}") from why
    return None, EffortStep("healing", False, None, None, 0.0, str(why))


def _both(first: Healing | None, second: Healing | None) -> Healing | None:
    """Healing of pairs, then of scales and what corrects roundings, as one.

    Errors are those of the second: between both weights were rounded, which is no healing's doing.
    """
    if first is None or second is None:
        return first or second
    return replace(
        second,
        steps=first.steps + second.steps,
        best_step=(first.best_step + second.best_step),
        trained=first.trained + second.trained,
        seconds=first.seconds + second.seconds,
    )


def _check_validity(context: Context, model: ir.Model) -> None:
    wrong = invalid(model)
    if wrong is not None:
        if invalid(context.source.model) is None:
            raise InputError(f"{context.source.name}: the result is not valid ONNX: {wrong}")
        context.say(f"the input does not pass onnx.checker, nor does the result: {wrong}")
