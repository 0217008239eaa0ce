"""Heal: gradient descent on the factors against what the original model gives.

No training framework is needed: the gradients are one more ONNX graph
(`onnx_lowrank.autodiff.gradient`), ONNX Runtime runs the graph, numpy takes the steps.  Held-out
samples choose the step that is kept; if no step is better than the start, nothing changes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from onnx_lowrank.autodiff.gradient import depends, differentiable, gradient_model, read_ranks
from onnx_lowrank.data.cache import cache_outputs, output_shares
from onnx_lowrank.data.samples import Lazy, largest
from onnx_lowrank.errors import InputError, named
from onnx_lowrank.fitting.batches import Batches, batch_size, joined, wide
from onnx_lowrank.fitting.bottlenecks import bottlenecks
from onnx_lowrank.fitting.descent import BATCH, DEFAULT_RATE, Descent, HealPlan, Judge
from onnx_lowrank.fitting.whiten import whiten
from onnx_lowrank.graph.elements import elements_of
from onnx_lowrank.graph.fingerprint import fingerprint
from onnx_lowrank.graph.types_aside import unread
from onnx_lowrank.numerics.adam import Adam
from onnx_lowrank.numerics.arrays import Array, Feed
from onnx_lowrank.phrases import counted
from onnx_lowrank.progress import Advance
from onnx_lowrank.runtime.kept import Kept
from onnx_lowrank.runtime.memory import Memory
from onnx_lowrank.runtime.pieces import Bookmark, Pieces
from onnx_lowrank.runtime.shelf import Shelf
from onnx_lowrank.runtime.taps import OpenModel

__all__ = ["BATCH", "DEFAULT_RATE", "HealPlan", "Healed", "heal"]

# Values inside that are compared, unless they are named.
_INSIDE = 8


@dataclass(frozen=True, eq=False)
class Healed:
    """What healing reached.

    Attributes:
        arrays: what was trained, by name, in the types it is stored in; empty if nothing is better.
        steps: how many were done.
        best_step: after which the arrays were taken; 0 is the start.
        error_before: relative L2 error of the outputs on held-out samples, mean over the outputs;
            where shares of classes were compared their divergence, in nats a row.
        error_after: the same after the best step.
        values: what the descent compared.
        samples: batches that it read.
        held_out: batches that judged it.
        notes: what the user should know.
        rate: that the steps began with.
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
    rate: float = DEFAULT_RATE


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
    memory: Memory | None = None,
    logits: Sequence[str] = (),
    narrowed: Collection[str] = (),
    pieces: Pieces | None = None,
) -> Healed:
    """Change factors so that the outputs get closer to the original's.

    Args:
        model: the model with the factors; it is not changed.
        original: the model that it was made from.
        trained: names of the constants to change: factors, and biases beside them.
        feeds: samples.
        held: others, which say what step is kept; the factors may have been fitted to them.
        mask: input whose zeros mark rows that do not count, where its shape fits.
        open_model: makes a runner of a model that gives its outputs by name.
        plan: how.
        advance: called with 1 for each step.
        show: called with the step and the held-out error whenever that is known.
        memory: what may be held; default: without a limit.
        logits: values of both models whose shares of classes are compared in place of the outputs.
        narrowed: values that have another width in the original.
        pieces: where an earlier run keeps its result and its last step; None for no such place.

    Raises:
        ShortError: the derivatives of one sample do not fit in memory.
        InputError: an operator between factors and outputs has no derivative (it is named),
            or a value of the plan is not in both models.
    """
    memory = memory or Memory()
    key = ""
    if pieces is not None:
        models = fingerprint(model, whole=True), fingerprint(original, whole=True)
        wanted = replace(plan, until=None), tuple(logits), mask
        key = pieces.key("healed", *models, tuple(trained), feeds, held, *wanted)
        known: Healed | None = pieces.load("healed", key)
        if known is not None:
            advance(known.steps)
            return known
    base = differentiable(model, trained)
    outputs = tuple(logits) or _outputs(base, original, trained)
    if not outputs and not plan.at:
        raise InputError(
            f"{named('heal')}: no output of the model is a float that depends on a factor"
        )
    start = {name: elements_of(model, name) for name in trained}
    one = feeds[largest(feeds)]
    ranks = read_ranks(base, trained, open_model, {**wide(one), **wide(start)})
    made = {value.name or "" for node in original.graph for value in node.outputs}
    made -= set(narrowed)
    inside = plan.at or bottlenecks(base, trained, ranks, made, _INSIDE)
    values = tuple(dict.fromkeys((*outputs, *inside)))
    ours = {value.name or "" for node in base.graph for value in node.outputs}
    for name in values:
        for which, names in (("original", made), ("compressed", ours)):
            if name not in names:
                why = "has another width for it" if name in narrowed else "has no such value"
                raise InputError(f"{named('heal_at', name)}: the {which} model {why}")
    source = Kept(original, values, open_model)
    order = np.random.default_rng(plan.seed).permutation(len(feeds))
    mixed = Lazy(len(feeds), lambda index: feeds[int(order[index])])
    white = whiten(base, wide(start), mixed, mask, open_model, memory)
    adam = Adam(white.into(start), plan.rate or DEFAULT_RATE)
    gradients = gradient_model(white.model, values, trained, ranks, logits)
    descend = open_model(gradients.model)
    own = output_shares(outputs, cache_outputs(original))
    shares = _shares(own, values)
    single = Batches([one], mask, values, source, shares, by_classes=logits).inputs(0)
    size = batch_size(descend, single, plan.batch, memory, adam.arrays)
    shelf = Shelf(memory)
    (fit, judging), said = joined(model, (feeds, held), size, source.read, shelf)
    judged = Batches(judging, mask, outputs or values, source, own or None, shelf, logits)
    bookmark = None
    if pieces is not None:  # batches are made by the memory there is
        bookmark = Bookmark(pieces, "healing", pieces.key("healing", key, size))
    descent = Descent(
        adam,
        gradients,
        descend,
        Batches(fit, mask, values, source, shares, shelf, logits),
        Judge(judged, white.model, open_model, logits),
        plan,
        advance,
        show,
        bookmark,
    )
    notes = [*said]
    batched = any(array.shape[:1] != (1,) for array in one.values())  # such stay as they are
    if size < plan.batch and len(fit) > 1 and not batched:
        notes.append(f"healing takes {counted(size, 'sample')} at a time, not {plan.batch}: memory")
    notes += descent.go()
    found = white.back(descent.kept) if descent.best_step else {}
    healed = Healed(
        arrays={name: array.astype(start[name].dtype) for name, array in found.items()},
        steps=descent.done,
        best_step=descent.best_step,
        error_before=descent.before,
        error_after=descent.best,
        values=values,
        samples=len(fit),
        held_out=len(judging),
        notes=tuple(notes),
        rate=descent.rate,
    )
    # What was ended by the time, or by the user, may go on.
    if pieces is not None and bookmark is not None and not descent.ended and plan.until is None:
        pieces.save("healed", key, healed)
        bookmark.drop()
    return healed


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


def _shares(outputs: Mapping[str, float], values: Sequence[str]) -> dict[str, float]:
    """What each value's loss counts: the outputs together as much as all that is inside."""
    inside = [value for value in values if value not in outputs]
    half = 0.5 if outputs and inside else 1.0
    return {value: half * outputs.get(value, 1.0 / max(len(inside), 1)) for value in values}
