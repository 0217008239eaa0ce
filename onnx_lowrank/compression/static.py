"""Static ranges of a run: from its samples, for what products read and give in 8 bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from onnx_lowrank.compression.context import Context
from onnx_lowrank.errors import InputError, named
from onnx_lowrank.fitting.rounding import Postponed
from onnx_lowrank.fitting.static import StaticSteps, chosen_steps, put_static
from onnx_lowrank.graph.spool import Spool
from onnx_lowrank.maps.find import Group
from onnx_lowrank.numerics.arrays import Feed
from onnx_lowrank.ranks.formats import Formats, by_map
from onnx_lowrank.ranks.prepared import Prepared
from onnx_lowrank.ranks.probe import Probe

__all__ = ["round_around", "static_steps"]


def static_steps(
    context: Context, model: ir.Model, formats: Mapping[Group, Formats]
) -> StaticSteps | None:
    """Steps of a model before its weights are rounded; None where no format asks for any.

    Args:
        context: the run.
        model: simplified.
        formats: of its layers.

    Raises:
        InputError: there are no samples, or the model does not run on them.
    """
    each = by_map(formats).items()
    static = {g: form for g, own in each if (form := own.integers) and form.static}
    if not static:
        return None
    trial = context.trial
    with context.stages("prepare"):
        unavailable = trial.unavailable
    samples = None if unavailable is not None else trial.split.calibration
    if samples is None:
        none = f"{named('data')} or {named('calibration')} gives none to calibrate with"
        raise InputError(
            f"{named('activations', 'int8')}: the ranges of static inputs come from samples, "
            f"expected some: {unavailable or none}"
        )
    probes: list[Probe] = []

    def damage_of(copy: ir.Model, feeds: Sequence[Feed]) -> float | None:
        if not probes:  # the same samples every time
            classes = context.settings.metric_used.of_classes
            probes.append(
                Probe(model, (), feeds, trial.runner, trial.reading, classes, trial.memory)
            )
        return probes[0].damage_of(copy)

    nodes = [member.site.node for group in static for member in group.members]
    with context.stages("ranges", len(samples.feeds)) as advance:
        opset = max(form.opset for form in static.values())
        steps = chosen_steps(model, nodes, samples.feeds, trial.runner, damage_of, advance, opset)
    context.say(f"ranges of inputs and results in 8 bits: by {steps}")
    return steps


def round_around(
    context: Context,
    prepared: Prepared,
    model: ir.Model,
    waiting: Sequence[Postponed],
    spool: Spool,
) -> None:
    """Round inputs and results of products, in place, with ranges of samples.

    Args:
        context: the run.
        prepared: what the model was made from.
        model: in its final shape.
        waiting: the products.
        spool: where the integers wait until they are saved.

    Raises:
        InputError: the model does not run on the samples.
    """
    samples, known = context.trial.split.calibration, prepared.static
    assert samples is not None  # else there is no such format
    assert known is not None
    with context.stages("ranges", len(samples.feeds)) as advance:
        run = context.trial.runner
        put_static(model, waiting, known.method, samples.feeds, run, spool, advance)
