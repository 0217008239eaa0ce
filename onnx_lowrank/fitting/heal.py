"""Heal: gradient descent on the factors against what the original model gives.

No training framework is needed: the gradients are one more ONNX graph
(`onnx_lowrank.autodiff.gradient`), ONNX Runtime runs the graph, numpy takes the steps.  Held-out
samples choose the step that is kept; if no step is better than the start, nothing changes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnx_lowrank.autodiff.gradient import (
    Gradients,
    Loss,
    depends,
    differentiable,
    gradient_model,
    loss_model,
    read_ranks,
)
from onnx_lowrank.data.samples import Lazy, largest
from onnx_lowrank.errors import InputError, Terminated, named
from onnx_lowrank.fitting.batches import Batches, batch_size, joined, wide
from onnx_lowrank.fitting.bottlenecks import bottlenecks
from onnx_lowrank.fitting.whiten import whiten
from onnx_lowrank.graph.elements import elements_of
from onnx_lowrank.graph.types_aside import unread
from onnx_lowrank.numerics.adam import Adam, schedule
from onnx_lowrank.numerics.arrays import Array, Feed
from onnx_lowrank.phrases import counted
from onnx_lowrank.progress import Advance
from onnx_lowrank.runtime.kept import Kept
from onnx_lowrank.runtime.memory import Memory
from onnx_lowrank.runtime.shelf import Shelf
from onnx_lowrank.runtime.taps import OpenModel, Runner

__all__ = ["BATCH", "DEFAULT_RATE", "HealPlan", "Healed", "heal"]

BATCH = 16
DEFAULT_RATE = 4e-3
# How often the held-out samples are asked, and at what shares of that time before the first.
_LOOKS = 12
_EARLY = (0.25, 0.5)
# A held-out error so far above the best one says that the steps are too long.
_ASTRAY = 1.1
# Rates that are tried where none is given, and with how many steps each.
_RATES = (2.5e-4, 1e-3, 4e-3, 1.2e-2)
_TRIED = 12
# After a round that leaves more than this share of the held-out error there is no other one.
_WORTH = 0.97
# Steps are planned for this share of the time that is left; the rest is for the held-out samples.
_TIMELY = 0.8
# Values inside that are compared, unless they are named.
_INSIDE = 8


@dataclass(frozen=True)
class HealPlan:
    """How to heal.

    Attributes:
        steps: of gradient descent, in the first round.
        at: values inside, known to both models, whose error counts beside the outputs'; none:
            those that `onnx_lowrank.fitting.bottlenecks` finds.
        rate: of an element in one step, as a share of its factor's root mean square; where
            held-out samples show that it leads astray, the descent goes back and halves it.  None:
            the one of a few whose first steps help most.
        seed: of the order of the batches.
        batch: samples of a batch, where they can be put together.
        rounds: how many there are at most.  Each takes twice the steps of the one before, from the
            best arrays so far, and there is another one only where one helped.
        until: time by `time.monotonic` after which no step begins; None: as long as it takes.
    """

    steps: int
    at: tuple[str, ...] = ()
    rate: float | None = DEFAULT_RATE
    seed: int = 0
    batch: int = BATCH
    rounds: int = 1
    until: float | None = None


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
        memory: what may be held; default: without a limit.
        logits: values of both models whose shares of classes are compared in place of the outputs.
        narrowed: values that have another width in the original.

    Raises:
        ShortError: the derivatives of one sample do not fit in memory.
        InputError: an operator between factors and outputs has no derivative (it is named),
            or a value of the plan is not in both models.
    """
    memory = memory or Memory()
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
    shares = _shares(outputs, values)
    single = Batches([one], mask, values, source, shares, by_classes=logits).inputs(0)
    size = batch_size(descend, single, plan.batch, memory, adam.arrays)
    shelf = Shelf(memory)
    (fit, judging), said = joined(model, (feeds, held), size, source.read, shelf)
    judged = Batches(judging, mask, outputs or values, source, shelf=shelf, by_classes=logits)
    descent = _Descent(
        adam,
        gradients,
        descend,
        Batches(fit, mask, values, source, shares, shelf, logits),
        _Judge(judged, white.model, open_model, logits),
        plan,
        advance,
        show,
    )
    notes = [*said]
    if size < plan.batch and len(fit) > 1:
        notes.append(f"healing takes {counted(size, 'sample')} at a time, not {plan.batch}: memory")
    notes += descent.go()
    found = white.back(descent.kept) if descent.best_step else {}
    return Healed(
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


class _Descent:
    """Steps of Adam, and the best of what they reached.

    Attributes:
        before: held-out error at the start.
        best: the lowest so far.
        best_step: after which it was reached; 0 is the start.
        kept: the arrays then.
        done: steps so far.
        rate: that the steps began with.
    """

    def __init__(
        self,
        adam: Adam,
        gradients: Gradients,
        descend: Runner,
        batches: Batches,
        judge: _Judge,
        plan: HealPlan,
        advance: Advance,
        show: Callable[[int, float], None] | None,
    ) -> None:
        self._adam, self._gradients, self._descend = adam, gradients, descend
        self._batches, self._judge, self._plan = batches, judge, plan
        self._advance, self._show = advance, show or (lambda _, __: None)
        self._order = _order(len(batches), plan.seed)
        self._seconds = self._stepped = 0.0
        self.before = self.best = judge.error(adam.arrays)
        self.kept, self.best_step, self.done = adam.copy(), 0, 0
        self.rate = adam.rate

    def go(self) -> list[str]:
        """Descend as the plan says; what the user should know of it."""
        plan, adam, notes = self._plan, self._adam, list[str]()
        self._show(0, self.before)
        try:
            if plan.rate is None:
                self.rate = self._found_rate()
                adam.restart(self.kept, self.rate)
            steps, number = plan.steps, 0
            while True:
                error, number = self.best, number + 1
                stopped = self._round(self._affordable(steps))
                if stopped is not None:
                    notes.append(stopped)
                    break
                if number >= plan.rounds or not self.best < _WORTH * error:
                    break
                # Twice as long: what a short round cannot reach, a longer one may.
                steps *= 2
                adam.restart(self.kept, adam.rate)
        except KeyboardInterrupt as stop:
            if isinstance(stop, Terminated):
                raise
            notes.append(f"healing was interrupted after step {self.done} of {plan.steps}")
            self._advance(max(plan.steps - self.done, 0))
        if not self.best_step:
            notes.append(
                "healing did not bring held-out samples closer to the original: the factors stay"
            )
        if adam.rate != self.rate:
            notes.append(
                f"healing went back and lowered its rate from {self.rate:g} to {adam.rate:g}, as "
                "the held-out error rose"
            )
        return notes

    def _found_rate(self) -> float:
        """The rate of those that are tried whose few steps help held-out samples most."""
        errors = {}
        for rate in _RATES:
            if self._late():
                break
            self._adam.restart(self.kept, rate)
            alive = all(self._step(schedule(step, 2 * _TRIED)) for step in range(_TRIED))
            errors[rate] = self._judge.error(self._adam.arrays) if alive else math.inf
        return min(errors, key=lambda rate: errors[rate], default=DEFAULT_RATE)

    def _round(self, steps: int) -> str | None:
        """Some steps, the last ones short; why they were stopped, if they were."""
        for step in range(steps):
            if self._late():
                self._advance(steps - step)
                return f"healing stopped after step {self.done}: the time is up"
            if not self._step(schedule(step, steps)):
                self._advance(steps - step)
                return f"healing stopped after step {self.done}: a gradient holds NaN or Inf"
            self.done += 1
            self._advance(1)
            if _looks(step + 1, steps):
                self._look()
        return None

    def _step(self, share: float) -> bool:
        """One step; False if its gradients are no numbers, and nothing has changed."""
        start = time.monotonic()
        result = self._descend({**self._batches.inputs(next(self._order)), **self._adam.arrays})
        slopes = {name: result[output] for name, output in self._gradients.outputs.items()}
        if not all(np.isfinite(slope).all() for slope in slopes.values()):
            return False
        self._adam.step(slopes, share)
        self._seconds += time.monotonic() - start
        self._stepped += 1
        return True

    def _look(self) -> None:
        error = self._judge.error(self._adam.arrays)
        self._show(self.done, error)
        if error < self.best:
            self.best, self.kept, self.best_step = error, self._adam.copy(), self.done
        elif error > _ASTRAY * self.best:
            self._adam.restart(self.kept, self._adam.rate / 2.0)

    def _late(self) -> bool:
        return self._plan.until is not None and time.monotonic() >= self._plan.until

    def _affordable(self, steps: int) -> int:
        """So many steps, or as many as there is time for, so that the last ones are short."""
        if self._plan.until is None or not self._stepped:
            return steps
        left = self._plan.until - time.monotonic()
        return max(1, min(steps, int(_TIMELY * left * self._stepped / max(self._seconds, 1e-9))))


class _Judge:
    """The error of the outputs on held-out batches."""

    def __init__(
        self, batches: Batches, base: ir.Model, open_model: OpenModel, logits: Sequence[str]
    ) -> None:
        self._batches = batches
        self._values = batches.values
        self._square = not logits
        self._run = open_model(loss_model(base, batches.values, logits))

    def error(self, arrays: Mapping[str, Array]) -> float:
        """Relative L2 error over all batches, mean over the values; of classes their divergence."""
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
        error = sum(shares) / len(shares) if shares else 0.0
        error = math.sqrt(max(error, 0.0)) if self._square else error
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


def _order(count: int, seed: int) -> Iterator[int]:
    """Batches in a new random order each time round, without end."""
    rng = np.random.default_rng(seed)
    while True:
        yield from map(int, rng.permutation(count))


def _looks(done: int, steps: int) -> bool:
    every = max(1, steps // _LOOKS)
    early = done in {int(share * every) for share in _EARLY}
    return early or done % every == 0 or done == steps
