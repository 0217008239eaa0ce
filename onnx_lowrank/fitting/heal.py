"""Heal: gradient descent on the factors against what the original model gives.

No training framework is needed: the gradients are one more ONNX graph
(`onnx_lowrank.autodiff.gradient`), ONNX Runtime runs the graph, numpy takes the steps.  Held-out
samples choose the step that is kept; if no step is better than the start, nothing changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnx_lowrank.autodiff.gradient import (
    Loss,
    depends,
    differentiable,
    gradient_model,
    loss_model,
    read_ranks,
)
from onnx_lowrank.errors import InputError, Terminated, named
from onnx_lowrank.fitting.batches import Batches, joined, wide
from onnx_lowrank.fitting.bottlenecks import bottlenecks
from onnx_lowrank.fitting.whiten import whiten
from onnx_lowrank.graph.elements import elements_of
from onnx_lowrank.graph.types_aside import unread
from onnx_lowrank.numerics.adam import Adam, schedule
from onnx_lowrank.numerics.arrays import Array, Feed
from onnx_lowrank.progress import Advance
from onnx_lowrank.runtime.taps import OpenModel, tapped

__all__ = ["BATCH", "DEFAULT_RATE", "HealPlan", "Healed", "heal"]

BATCH = 16
DEFAULT_RATE = 4e-3
# How often the held-out samples are asked, and at what shares of that time before the first.
_LOOKS = 12
_EARLY = (0.25, 0.5)
# A held-out error so far above the best one says that the steps are too long.
_ASTRAY = 1.1
# Values inside that are compared, unless they are named.
_INSIDE = 8


@dataclass(frozen=True)
class HealPlan:
    """How to heal.

    Attributes:
        steps: of gradient descent, at most.
        at: values inside, known to both models, whose error counts beside the outputs'; none:
            those that `onnx_lowrank.fitting.bottlenecks` finds.
        rate: of an element in one step, as a share of its factor's root mean square; where
            held-out samples show that it leads astray, the descent goes back and halves it.
        seed: of the order of the batches.
        batch: samples of a batch, where they can be put together.
    """

    steps: int
    at: tuple[str, ...] = ()
    rate: float = DEFAULT_RATE
    seed: int = 0
    batch: int = BATCH


@dataclass(frozen=True, eq=False)
class Healed:
    """What healing reached.

    Attributes:
        arrays: what was trained, by name, in the types it is stored in; empty if nothing is better.
        steps: how many were done.
        best_step: after which the arrays were taken; 0 is the start.
        error_before: relative L2 error of the outputs on held-out samples, mean over the outputs.
        error_after: the same after the best step.
        values: what the descent compared.
        samples: batches that it read.
        held_out: batches that judged it.
        notes: what the user should know.
    """

    arrays: Mapping[str, Array]
    steps: int
    best_step: int
    error_before: float
    error_after: float
    values: tuple[str, ...]
    samples: int
    held_out: int
    notes: tuple[str, ...]


def heal(
    model: ir.Model,
    original: ir.Model,
    trained: Sequence[str],
    feeds: Sequence[Feed],
    held: Sequence[Feed],
    mask: str | None,
    open_model: OpenModel,
    plan: HealPlan,
    advance: Advance,
    show: Callable[[int, float], None] | None = None,
) -> Healed:
    """Change factors so that the outputs get closer to the original's.

    Args:
        model: the model with the factors; it is not changed.
        original: the model that it was made from.
        trained: names of the constants to change: factors, and biases beside them.
        feeds: samples.
        held: others, which say what step is kept.
        mask: input whose zeros mark rows that do not count, where its shape fits.
        open_model: makes a runner of a model that gives its outputs by name.
        plan: how.
        advance: called with 1 for each step.
        show: called with the step and the held-out error whenever that is known.

    Raises:
        InputError: an operator between factors and outputs has no derivative (it is named),
            or a value of the plan is not in both models.
    """
    base = differentiable(model, trained)
    outputs = _outputs(base, original, trained)
    if not outputs and not plan.at:
        raise InputError(
            f"{named('heal')}: no output of the model is a float that depends on a factor"
        )
    start = {name: elements_of(model, name) for name in trained}
    ranks = read_ranks(base, trained, open_model, {**wide(feeds[0]), **wide(start)})
    made = {value.name or "" for node in original.graph for value in node.outputs}
    inside = plan.at or bottlenecks(base, trained, ranks, made, _INSIDE)
    values = tuple(dict.fromkeys((*outputs, *inside)))
    ours = {value.name or "" for node in base.graph for value in node.outputs}
    for name in values:
        for which, names in (("original", made), ("compressed", ours)):
            if name not in names:
                raise InputError(f"{named('heal_at', name)}: the {which} model has no such value")
    source = tapped(original, values, open_model)
    (fit, judging), said = joined(model, (feeds, held), plan.batch, source)
    notes = list(said)
    mixed = [fit[index] for index in np.random.default_rng(plan.seed).permutation(len(fit))]
    white = whiten(base, wide(start), mixed, mask, open_model)
    base, adam = white.model, Adam(white.into(start), plan.rate)
    gradients = gradient_model(base, values, trained, ranks)
    descend = open_model(gradients.model)
    judge = _Judge(Batches(judging, mask, outputs or values, source), base, open_model)
    batches = Batches(fit, mask, values, source, _shares(outputs, values))

    before = judge.error(adam.arrays)
    best, kept, best_step, done = before, adam.copy(), 0, 0
    if show is not None:
        show(0, before)

    def look() -> None:
        nonlocal best, kept, best_step
        error = judge.error(adam.arrays)
        if show is not None:
            show(done, error)
        if error < best:
            best, kept, best_step = error, adam.copy(), done
        elif error > _ASTRAY * best:
            adam.restart(kept, adam.rate / 2.0)

    try:
        for index in _order(len(batches), plan):
            result = descend({**batches.inputs(index), **adam.arrays})
            slopes = {name: result[output] for name, output in gradients.outputs.items()}
            if not all(np.isfinite(slope).all() for slope in slopes.values()):
                notes.append(f"healing stopped after step {done}: a gradient holds NaN or Inf")
                advance(plan.steps - done)
                break
            adam.step(slopes, schedule(done, plan.steps))
            done += 1
            advance(1)
            if _looks(done, plan.steps):
                look()
    except KeyboardInterrupt as stop:
        if isinstance(stop, Terminated):
            raise
        notes.append(f"healing was interrupted after step {done} of {plan.steps}")
        advance(plan.steps - done)
    if not best_step:
        notes.append(
            "healing did not bring held-out samples closer to the original: the factors stay"
        )
    if adam.rate != plan.rate:
        notes.append(
            f"healing went back and lowered its rate from {plan.rate:g} to {adam.rate:g}, as the "
            "held-out error rose"
        )
    found = white.back(kept) if best_step else {}
    return Healed(
        arrays={name: array.astype(start[name].dtype) for name, array in found.items()},
        steps=done,
        best_step=best_step,
        error_before=before,
        error_after=best,
        values=values,
        samples=len(fit),
        held_out=len(judging),
        notes=tuple(notes),
    )


class _Judge:
    """The error of the outputs on held-out batches."""

    def __init__(self, batches: Batches, base: ir.Model, open_model: OpenModel) -> None:
        self._batches = batches
        self._values = batches.values
        self._run = open_model(loss_model(base, batches.values))

    def error(self, arrays: Mapping[str, Array]) -> float:
        """Relative L2 error over all batches, mean over the values."""
        apart = dict.fromkeys(self._values, 0.0)
        energy = dict.fromkeys(self._values, 0.0)
        for index in range(len(self._batches)):
            losses = self._run({**self._batches.inputs(index), **arrays})
            for value in self._values:
                own = self._batches.energy(index, value)
                # Each loss is a share of its own batch's energy and of all values together.
                apart[value] += float(losses[Loss.of(value).loss]) * own * len(self._values)
                energy[value] += own
        shares = [apart[v] / energy[v] for v in self._values if energy[v] > 0.0]
        error = math.sqrt(sum(shares) / len(shares)) if shares else 0.0
        return error if math.isfinite(error) else math.inf


def _outputs(base: ir.Model, original: ir.Model, trained: Sequence[str]) -> tuple[str, ...]:
    """Float outputs of both models that depend on what is trained.

    In place of an output that is no array, such as ZipMap's, stands what its node reads.
    """
    theirs = {value.name for value in original.graph.outputs}
    reached = depends(base, trained)
    found: dict[str, None] = {}
    for value in base.graph.outputs:
        if value.name not in theirs:
            continue
        producer = value.producer()
        read = producer.inputs if unread(value) and producer is not None else (value,)
        found.update({own.name or "": None for own in read if own is not None and own in reached})
    return tuple(found)


def _shares(outputs: Sequence[str], values: Sequence[str]) -> dict[str, float]:
    """What each value's loss counts: the outputs together as much as all that is inside."""
    inside = [value for value in values if value not in outputs]
    half = 0.5 if outputs and inside else 1.0
    return {value: half / len(outputs if value in outputs else inside) for value in values}


def _order(count: int, plan: HealPlan) -> Iterator[int]:
    """Batches in a new random order each time round."""
    rng = np.random.default_rng(plan.seed)
    given = 0
    while given < plan.steps:
        for index in rng.permutation(count)[: plan.steps - given]:
            yield int(index)
            given += 1


def _looks(done: int, steps: int) -> bool:
    every = max(1, steps // _LOOKS)
    early = done in {int(share * every) for share in _EARLY}
    return early or done % every == 0 or done == steps
