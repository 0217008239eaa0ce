"""Recording: the recipe of a run, and the settings of a run that carries one out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onnx_lowrank.compression.context import Context
from onnx_lowrank.compression.headings import GOAL
from onnx_lowrank.compression.option import Option, marked
from onnx_lowrank.compression.options import OPTIONS
from onnx_lowrank.compression.settings import Settings
from onnx_lowrank.compression.verbs import RECORDED
from onnx_lowrank.errors import InputError, UsageError, named
from onnx_lowrank.evaluation.metrics import Metric
from onnx_lowrank.graph.wishes import Wishes
from onnx_lowrank.maps.choice import Decision
from onnx_lowrank.ranks.prepared import Prepared
from onnx_lowrank.ranks.recipe import (
    Recipe,
    digest_of_layers,
    recipe_layers,
    recipe_shared,
)
from onnx_lowrank.ranks.recipe_file import load_recipe
from onnx_lowrank.schema.json_report import tool_name

__all__ = ["carried", "goal_of", "recipe_for"]

# Where a model is fitted to samples.
_SAMPLES = ("data", "calibration", "load_stats")
# What asks for a fit by name; `calibrate=False` excludes it.
_ASKED = ("calibration", "load_stats", "fisher", "refit", "heal")
# What decides about the result only where factors are fitted to samples; else it is of the check.
_OF_SAMPLES = frozenset({"calibration_samples", "judge_at", "mask", "samples", "seed"})
# What may be given where the recipe does not hold it.
_SIZES = frozenset({"dims", "input_shapes"})


def carried(settings: Settings) -> Settings:
    """The settings with those of their recipe, which is read; without one as they are.

    Raises:
        InputError: the recipe cannot be read, or holds an option that there is not.
        UsageError: an option is given that the recipe decides.
    """
    if settings.recipe is None:
        return settings
    recipe = settings.recipe
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(Path(recipe))
    fitted = recipe.settings.get("calibrate", True)
    free = _SIZES.difference(recipe.settings) | (set() if fitted else _OF_SAMPLES)
    for option in RECORDED:
        if option.name not in free and _given(option, settings):
            raise UsageError(
                f"{recipe.label} and {marked(option)} exclude each other: the recipe holds what "
                "decides about the result; change it there"
            )
    _check(recipe.goal, "goal", recipe)
    _check(recipe.settings, "settings", recipe)
    if fitted and _fits(recipe) and not _sampled(settings):
        raise UsageError(
            f"{recipe.label}: it is of a run that had samples to fit to; expected "
            f"{' or '.join(map(named, _SAMPLES))}"
        )
    for name in ("calibration", "load_stats"):
        if not fitted and getattr(settings, name) is not None:
            raise UsageError(
                f"{recipe.label} and {named(name)} exclude each other: the recipe fits its factors "
                "to the weights alone"
            )
    if recipe.methods and settings.data is None and settings.calibration is None:
        raise UsageError(
            f"{recipe.label}: samples judged how its factors are fitted; expected "
            f"{named('data')} or {named('calibration')}"
        )
    own = dict(recipe.settings)
    if settings.load_stats is not None:
        own.pop("mask", None)  # the statistics know it
    if settings.metric is not None and own.get("metric", settings.metric) != settings.metric:
        texts = own.pop("metric"), settings.metric_used.text
        if any(Metric.parse(text).of_classes for text in texts[:1]) or (
            settings.metric_used.of_classes
        ):
            raise UsageError(
                f"{recipe.label} and {named('metric', texts[1])} exclude each other: its factors "
                f"are fitted by {texts[0]}"
            )
    metric = None if settings.check else own.pop("metric", None)
    if metric is not None and Metric.parse(metric).of_classes:  # no other has a part in the fit
        raise UsageError(
            f"{recipe.label} and {named('check', False)} exclude each other: its factors are "
            "fitted by a metric of classes"
        )
    return settings.carrying(recipe, own)


def _sampled(settings: Settings) -> bool:
    return any(getattr(settings, name) is not None for name in _SAMPLES)


def _fits(recipe: Recipe) -> bool:
    """Whether samples may have a part in a layer; integers of a table are of its rows alone."""
    return any(
        layer.rank is not None or (layer.format is not None and layer.form != "gather")
        for layer in recipe.layers
    )


def _given(option: Option, settings: Settings) -> bool:
    value = getattr(settings, option.name)
    if option.name == "rank_multiple":
        return bool(value != Wishes().rank_multiple)
    return option.given(value)


def _check(values: Mapping[str, Any], key: str, recipe: Recipe) -> None:
    """Raise InputError where a part of a recipe holds what is no option, or no value of one."""
    known = [o.name for o in RECORDED if (o.group == GOAL) == (key == "goal")]
    known.append("rank_multiple" if key == "goal" else "metric")
    for name, value in values.items():
        if name not in known:
            raise InputError(
                f"{recipe.label}: {key}: unknown key {name!r}; expected one of {', '.join(known)}"
            )
        try:
            OPTIONS[name].check(value)
        except UsageError as error:
            raise InputError(f"{recipe.label}: {key}: {error}") from error


def recipe_for(
    context: Context,
    prepared: Prepared,
    decisions: Sequence[Decision],
    goal: Mapping[str, Any] | None = None,
    methods: Mapping[str, bool] | None = None,
) -> Recipe:
    """What becomes of the model, for another run.

    Args:
        context: the run.
        prepared: what the decisions were made on.
        decisions: one for every linear map.
        goal: what led to them; None for that of the settings.
        methods: what was tried without being named, and whether the result has it.
    """
    settings = context.settings
    layers, shared = recipe_layers(decisions), recipe_shared(decisions)
    given = settings.recipe if isinstance(settings.recipe, Recipe) else None
    if given is not None:
        own, others, digest = given.goal, given.settings, given.layers_digest
        methods = given.methods
    else:
        own = goal_of(settings) if goal is None else goal
        others = _plain(settings, [o for o in RECORDED if o.group != GOAL])
        others.pop("rank_multiple", None)
        others.pop("calibrate", None)
        metric = settings.metric_used
        if metric.kind != "function" and OPTIONS["metric"].given(settings.metric):
            others["metric"] = metric.text  # a function may be in any folder
        # Where nothing was fitted samples are not needed again, but what was named may be.
        asked = any(OPTIONS[name].given(getattr(settings, name)) for name in _ASKED)
        if not settings.calibrate or (prepared.calibration is None and not asked):
            others = {k: v for k, v in others.items() if k not in _OF_SAMPLES}
            others["calibrate"] = False
        digest = digest_of_layers(layers, shared)
    return Recipe(
        tool=tool_name(),
        input=context.digest,
        goal=own,
        settings=others,
        layers=layers,
        shared=shared,
        methods=methods or {},
        layers_digest=digest,
    )


def goal_of(settings: Settings) -> dict[str, Any]:
    """What a run looks for, as plain values of options."""
    found = _plain(settings, [o for o in RECORDED if o.group == GOAL])
    multiple = settings.rank_multiple
    # So many components are found at first, which decides on the last bits of the factors.
    if multiple is not None and multiple != Wishes().rank_multiple:
        found["rank_multiple"] = multiple
    return found


def _plain(settings: Settings, options: Sequence[Option]) -> dict[str, Any]:
    """The options that are given, as JSON has them."""
    found: dict[str, Any] = {}
    for option in options:
        value = getattr(settings, option.name)
        if not option.given(value):
            continue
        if isinstance(value, tuple):
            value = list(value)
        elif isinstance(value, Mapping):
            value = {k: list(v) if isinstance(v, tuple) else v for k, v in value.items()}
        if value not in ({}, []):
            found[option.name] = value
    return found
