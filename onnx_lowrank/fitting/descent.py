"""Descent: steps of Adam against the original's values, judged on held-out samples.

Where the steps stand can be kept after each look at the held-out samples; a later run goes on from
there and takes the same steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import onnx_ir as ir

from onnx_lowrank.autodiff.gradient import Gradients, Loss, loss_model
from onnx_lowrank.errors import Terminated
from onnx_lowrank.fitting.batches import Batches
from onnx_lowrank.numerics.adam import Adam, AdamState, schedule
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.progress import Advance
from onnx_lowrank.runtime.pieces import Bookmark
from onnx_lowrank.runtime.taps import OpenModel, Runner

__all__ = ["BATCH", "DEFAULT_RATE", "Descent", "DescentPlace", "DescentState", "HealPlan", "Judge"]

BATCH = 16
DEFAULT_RATE = 4e-3
# How often the held-out samples are asked in a round, at most and at least, and at what shares of
# that time before the first.  A batch of them takes about a third of a step, which goes forward and
# back; together they may take so large a share of the steps.
_MOST_LOOKS, _FEWEST_LOOKS = 12, 3
_EARLY = (0.25, 0.5)
_LOOKING, _LOOK = 0.2, 1.0 / 3.0
# A held-out error so far above the best one says that the steps are too long.
_ASTRAY = 1.1
# Rates that are tried where none is given, until one makes the error larger, and with how many
# steps each.  Few steps flatter small rates: on a sentence encoder 2.5e-4 is better after 12 steps,
# 1e-3 after 48.  So the largest one that does not harm is taken.
_RATES = (2.5e-4, 1e-3, 4e-3, 1.2e-2)
_TRIED = 12
# After a round that leaves more than this share of the held-out error there is no other one.
_WORTH = 0.97
# Steps are planned for this share of the time that is left; the rest is for the held-out samples.
_TIMELY = 0.8


@dataclass(frozen=True)
class HealPlan:
    """How to heal.

    Attributes:
        steps: of gradient descent, in the first round.
        at: values inside, known to both models, whose error counts beside the outputs'; none:
            those that `onnx_lowrank.fitting.bottlenecks` finds.
        rate: of an element in one step, as a share of its factor's root mean square; where
            held-out samples show that it leads astray, the descent goes back and halves it.  None:
            the largest one of a few whose first steps help.
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


@dataclass(frozen=True)
class DescentPlace:
    """Where a descent stands.

    Attributes:
        number: of the round, from 1.
        steps: of the round.
        step: of these that are done.
        error: on held-out samples, the lowest before the round.
    """

    number: int
    steps: int
    step: int
    error: float


@dataclass(frozen=True, eq=False)
class DescentState:
    """A descent on its way; see `Descent` for what has the same name there.

    Attributes:
        adam: the arrays, and what the next step depends on.
        place: the round and the step.
        drawn: batches that were taken.
    """

    adam: AdamState
    place: DescentPlace
    drawn: int
    before: float
    best: float
    kept: Mapping[str, Array]
    best_step: int
    done: int
    rate: float


class Descent:
    """Steps of Adam, and the best of what they reached.

    Attributes:
        before: held-out error at the start.
        best: the lowest so far.
        best_step: after which it was reached; 0 is the start.
        kept: the arrays then.
        done: steps so far.
        rate: that the steps began with.
        ended: whether the time or the user ended it.
    """

    def __init__(
        self,
        adam: Adam,
        gradients: Gradients,
        descend: Runner,
        batches: Batches,
        judge: Judge,
        plan: HealPlan,
        advance: Advance,
        show: Callable[[int, float], None] | None,
        bookmark: Bookmark | None = None,
    ) -> None:
        self._adam, self._gradients, self._descend = adam, gradients, descend
        self._batches, self._judge, self._plan = batches, judge, plan
        self._advance, self._show = advance, show or (lambda _, __: None)
        self._order, self._drawn = _order(len(batches), plan.seed), 0
        self._seconds = self._stepped = 0.0
        self.done, self.rate, self.best_step, self.ended = 0, adam.rate, 0, False
        self._bookmark = bookmark
        state: DescentState | None = None if bookmark is None else bookmark.load()
        self._begun = state
        if state is None:
            self.before = self.best = judge.error(adam.arrays)
            self.kept = adam.copy()
            return
        self.before, self.best, self.kept = state.before, state.best, dict(state.kept)
        self.best_step, self.done, self.rate = state.best_step, state.done, state.rate
        adam.resume(state.adam)
        for _ in range(state.drawn):
            self._next()
        advance(state.done)

    def go(self) -> list[str]:
        """Descend as the plan says; what the user should know of it."""
        plan, adam, notes = self._plan, self._adam, list[str]()
        self._show(self.done, self.best)
        try:
            if self._begun is None:
                if plan.rate is None:
                    self.rate = self._found_rate()
                    adam.restart(self.kept, self.rate)
                place = DescentPlace(1, self._affordable(plan.steps), 0, self.best)
            else:
                place = self._begun.place
            while True:
                stopped = self._round(place)
                if stopped is not None:
                    notes.append(stopped)
                    break
                if place.number >= plan.rounds or not self.best < _WORTH * place.error:
                    break
                # Twice as long: what a short round cannot reach, a longer one may.
                adam.restart(self.kept, adam.rate)
                steps = self._affordable(plan.steps * 2**place.number)
                place = DescentPlace(place.number + 1, steps, 0, self.best)
        except KeyboardInterrupt as stop:
            if isinstance(stop, Terminated):
                raise
            self.ended = True
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
        """The largest rate of those that are tried whose few steps help held-out samples.

        What helps most of these steps is kept.
        """
        found, start = _RATES[0], self.kept
        for rate in _RATES:
            if self._late():
                break
            self._adam.restart(start, rate)
            if not all(self._step(schedule(step, _TRIED)) for step in range(_TRIED)):
                break
            error = self._judge.error(self._adam.arrays)
            if not error < self.before:
                break
            found = rate
            if error < self.best:
                self.best, self.kept = error, self._adam.copy()
                self.best_step = self.done = _TRIED
        return found

    def _next(self) -> int:
        """The next batch."""
        self._drawn += 1
        return next(self._order)

    def _round(self, place: DescentPlace) -> str | None:
        """The steps of a round, the last ones short; why they were stopped, if they were."""
        steps = place.steps
        for step in range(place.step, steps):
            if self._late():
                self.ended = True
                self._advance(steps - step)
                return f"healing stopped after step {self.done}: the time is up"
            if not self._step(schedule(step, steps)):
                self._advance(steps - step)
                return f"healing stopped after step {self.done}: a gradient holds NaN or Inf"
            self.done += 1
            self._advance(1)
            if _looks(step + 1, steps, self._often(steps)):
                self._look()
                if self._bookmark is not None:
                    self._bookmark.save(partial(self._state, replace(place, step=step + 1)))
        return None

    def _state(self, place: DescentPlace) -> DescentState:
        return DescentState(
            self._adam.state(),
            place,
            self._drawn,
            self.before,
            self.best,
            self.kept,
            self.best_step,
            self.done,
            self.rate,
        )

    def _step(self, share: float) -> bool:
        """One step; False if its gradients are no numbers, and nothing has changed."""
        start = time.monotonic()
        result = self._descend({**self._batches.inputs(self._next()), **self._adam.arrays})
        slopes = {name: result[output] for name, output in self._gradients.outputs.items()}
        if not all(np.isfinite(slope).all() for slope in slopes.values()):
            return False
        self._adam.step(slopes, share)
        self._seconds += time.monotonic() - start
        self._stepped += 1
        return True

    def _often(self, steps: int) -> int:
        """How often the held-out samples are asked in so many steps."""
        looks = int(_LOOKING * steps / (_LOOK * len(self._judge)))
        return max(_FEWEST_LOOKS, min(_MOST_LOOKS, looks))

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


class Judge:
    """The error of the outputs on held-out batches."""

    def __init__(
        self, batches: Batches, base: ir.Model, open_model: OpenModel, logits: Sequence[str]
    ) -> None:
        self._batches = batches
        self._values = batches.values
        self._square = not logits
        self._run = open_model(loss_model(base, batches.values, logits))

    def __len__(self) -> int:
        return len(self._batches)

    def error(self, arrays: Mapping[str, Array]) -> float:
        """Relative L2 error over all batches, mean over the values by their shares.

        Of classes it is their divergence.
        """
        apart = dict.fromkeys(self._values, 0.0)
        energy = dict.fromkeys(self._values, 0.0)
        for index in range(len(self._batches)):
            losses = self._run({**self._batches.inputs(index), **arrays})
            for value in self._values:
                own = self._batches.energy(index, value)
                # Each loss is a share of its own batch's energy, times the value's share.
                apart[value] += float(losses[Loss.of(value).loss]) * own
                energy[value] += own
        known = [value for value in self._values if energy[value] > 0.0]
        counted = sum(self._batches.shares[value] for value in known)
        error = sum(apart[value] / energy[value] for value in known) / counted if known else 0.0
        error = math.sqrt(max(error, 0.0)) if self._square else error
        return error if math.isfinite(error) else math.inf


def _order(count: int, seed: int) -> Iterator[int]:
    """Batches in a new random order each time round, without end."""
    rng = np.random.default_rng(seed)
    while True:
        yield from map(int, rng.permutation(count))


def _looks(done: int, steps: int, looks: int) -> bool:
    every = max(1, steps // looks)
    early = done in {int(share * every) for share in _EARLY}
    return early or done % every == 0 or done == steps
