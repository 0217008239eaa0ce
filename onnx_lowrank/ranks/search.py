"""Searching: what every budget needs to choose among ranks without assembling a model.

The damage of every layer is measured once; from then on the probe, which exchanges weights in one
session, tells what several layers together do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import onnx
import onnx_ir as ir

from onnx_lowrank.data.samples import Samples
from onnx_lowrank.evaluation.metrics import Metric
from onnx_lowrank.evaluation.reading import PLAIN, Reading
from onnx_lowrank.fitting.fit import fit
from onnx_lowrank.graph.walk import node_name
from onnx_lowrank.maps.choice import Choice, linear_parameters
from onnx_lowrank.maps.find import Group
from onnx_lowrank.maps.pair import Factors
from onnx_lowrank.numerics.arrays import Feed
from onnx_lowrank.numerics.knapsack import Solution
from onnx_lowrank.phrases import listed
from onnx_lowrank.progress import Stages
from onnx_lowrank.ranks.allocation import Ladders, Priced
from onnx_lowrank.ranks.choose import choose, decide, settle
from onnx_lowrank.ranks.damage import damage_curves, find_joints, joint_curves
from onnx_lowrank.ranks.goals import Goal
from onnx_lowrank.ranks.prepared import Prepared
from onnx_lowrank.ranks.probe import Probe
from onnx_lowrank.ranks.strategy import Plan
from onnx_lowrank.runtime.memory import Memory
from onnx_lowrank.runtime.taps import Runner

__all__ = ["Searching", "furthest"]

# How often the whole model is judged in a search.
_EVALUATIONS = 12
# After so many the guess is not asked any more.
_GUESSED = 4
# Bytes of the original's outputs on further samples that are kept.
_MEMORY = 1 << 28


class Searching:
    """The layers' options and damages, and the model to try them on.

    Attributes:
        ladders: the options.
        curves: damage of every layer alone.
        evaluations: how often several layers were tried together.
    """

    def __init__(
        self,
        prepared: Prepared,
        samples: Samples,
        open_model: Callable[[ir.Model | onnx.ModelProto], Runner],
        goal: Goal,
        stages: Stages,
        say: Callable[[str | None], None],
        multiple: Callable[[Group], int | None] | None = None,
        *,
        reading: Reading = PLAIN,
        memory: Memory | None = None,
        only_seen: bool = False,
        by_classes: bool = False,
        spare: Samples | None = None,
    ) -> None:
        """Measure the damage of every layer.

        Args:
            prepared: the model.
            samples: what the damage is measured on.
            open_model: makes a runner of a model that gives its outputs by name.
            goal: how ranks are chosen.
            stages: shows and times what is being done.
            say: takes a note for the user.
            multiple: on which multiple a group's rank should be, where that is not the goal's.
            reading: what is known of the model's outputs.
            memory: what may be held; default: without a limit.
            only_seen: whether layers stay dense whose damage the outputs do not show.
            by_classes: whether damage is measured at shares of classes.
            spare: further samples that a loss is measured on, which nothing was fitted to.

        Raises:
            InputError: the model does not run with its weights as inputs.
        """
        self.prepared, self.stages, self.say = prepared, stages, say
        self._goal, self._samples, self._reading = goal, samples, reading
        self._spare = spare
        self._spare_reference: list[Feed] | None = None
        groups = [group for group, found in prepared.measured.items() if found.finite]
        with stages("damage", len(groups)) as advance:
            self.probe = Probe(
                prepared.model, groups, samples.feeds, open_model, reading.mask, by_classes, memory
            )
            curves = damage_curves(
                groups,
                prepared.measured,
                prepared.search,
                goal,
                self.probe,
                advance,
                lambda group: prepared.known_curve(group, bool(prepared.search.fisher)),
            )
        for note in self.probe.watched.notes:
            self.say(note)
        self.curves = curves
        unseen = [group for group, curve in curves.items() if curve.known_from == "own error"]
        self._left = frozenset(unseen if only_seen else ())
        if unseen:
            self.say(_unseen_note(unseen, only_seen))
        curves = {group: curve for group, curve in curves.items() if group not in self._left}
        joints = find_joints(curves, prepared.measured, prepared.search, prepared.model)
        with stages("damage together", len(joints)) as advance:
            together = joint_curves(joints, curves, prepared.search, goal, advance)
        self.ladders = Ladders(
            prepared.finding, curves, prepared.measured, goal, multiple, together
        )
        self.evaluations = 0
        self._pairs: dict[Group, Factors] = {}

    def plan(self, priced: Priced, solution: Solution) -> Plan:
        """A solution as a plan."""
        settled = self._settled(priced.choices(solution))
        with self.stages("search"):
            together = self.probe.damage(self._fitted(priced, solution))
        plan = Plan(settled, together, solution.damage)
        # Exactly 0 of pairs that lose something: no sample reaches them.
        return dataclasses.replace(plan, damage=together or None) if plan.factored else plan

    def dense(self, reason: str) -> Plan:
        """The plan that leaves all layers dense, for a reason."""
        choice = Choice(None, f"dense: {reason}")
        return Plan(self._settled(dict.fromkeys(self.ladders.groups, choice)), 0.0, 0.0)

    def _settled(self, choices: Mapping[Group, Choice]) -> dict[Group, Choice]:
        """Choices of the groups with options, with those of all others, one for each node."""
        prepared, goal = self.prepared, self._goal
        chosen = dict(prepared.early)
        for group, found in prepared.measured.items():
            if not found.finite:
                chosen[group] = choose(group, found, goal)
            elif group in self._left:
                chosen[group] = Choice(None, "dense: no sample changes an output through it")
        chosen |= choices
        ordered = {group: chosen[group] for group in prepared.finding.groups if group in chosen}
        return settle(prepared.finding, ordered, goal)

    def linear_parameters(self) -> int:
        """Parameters of all linear layers, with or without options."""
        choices = self.dense("not chosen yet").choices
        return linear_parameters(decide(self.prepared.finding, choices))[0]

    @property
    def samples(self) -> int:
        """How many a loss is measured on."""
        return len(self.probe.feeds) + (0 if self._spare is None else len(self._spare.feeds))

    def loss(self, priced: Priced, solution: Solution, metric: Metric) -> float:
        """A solution by a metric, as smooth as it is known, without assembling it."""
        pairs = self._fitted(priced, solution)
        meter = metric.meter(self._reading)
        parts: list[tuple[Samples, Iterable[Feed], Iterable[Feed]]]
        parts = [(self._samples, self.probe.reference, self.probe.outputs(pairs))]
        if self._spare is not None:
            feeds = self._spare.feeds
            parts.append((self._spare, self._referred(feeds), self.probe.outputs(pairs, feeds)))
        for samples, reference, outputs in parts:
            labelled = samples.labels
            for number, (own, before) in enumerate(zip(outputs, reference, strict=True)):
                feed = samples.feeds[number]
                given = None if labelled is None else labelled[number]
                labels = metric.labels(feed, given, self._reading.mask)
                meter.add(own, before, labels, self._reading.kept(feed))
        for note in meter.notes:
            self.say(note)
        return meter.result().smooth

    def _referred(self, feeds: Sequence[Feed]) -> Iterable[Feed]:
        """The original's outputs on further samples; kept where they take little memory."""
        if self._spare_reference is None:
            first = next(iter(self.probe.outputs({}, feeds[:1])))
            if sum(array.nbytes for array in first.values()) * len(feeds) > _MEMORY:
                return self.probe.outputs({}, feeds)
            self._spare_reference = list(self.probe.outputs({}, feeds))
        return self._spare_reference

    def _fitted(self, priced: Priced, solution: Solution) -> Mapping[Group, Factors]:
        """The pairs of a solution; those of the one before are used again where they fit."""
        self.evaluations += 1
        choices = priced.choices(solution)
        within = set(self.probe.groups)
        ranked = {g: c for g, c in choices.items() if c.rank is not None and g in within}
        kept = {
            g: p
            for g, p in self._pairs.items()
            if g in ranked and p.rank == ranked[g].rank and not (p.shared or ranked[g].joint)
        }
        missing = {group: choice for group, choice in ranked.items() if group not in kept}
        statistics = dataclasses.replace(self.prepared.search, held={})
        self._pairs = kept | dict(fit(missing, statistics, lambda _: None))
        return self._pairs


def _unseen_note(groups: Sequence[Group], left: bool) -> str:
    names = listed([node_name(group.members[0].site.node) for group in groups], 4)
    fate = (
        "these layers stay dense, because nothing tells what a rank does to the loss"
        if left
        else "the layer's own relative square error counts instead, and no check judges it"
    )
    return (
        f"damage not measured at {names}: no sample changes an output through it (a branch that is "
        f"not taken, or an output that hides it); {fate}"
    )


def furthest(
    steps: Sequence[Solution],
    loss: Callable[[Solution], float],
    limit: float,
    guess: Callable[[Solution], float],
    known: Mapping[int, float],
) -> tuple[int, dict[int, float]]:
    """The last step whose loss stays within a limit, by bisection.

    The loss grows along the steps but for noise.  A guess of it, scaled to what was found so far,
    says where to look next.

    Args:
        steps: from no damage to the most.
        loss: the real loss; dear.
        limit: the limit.
        guess: about proportional to the loss; cheap.
        known: losses of steps that are known already.

    Returns:
        Index of the step (0 at worst), and all losses that are known now.
    """
    found = {0: 0.0, **known}
    low = max(index for index, value in found.items() if value <= limit)
    high = min((i for i, value in found.items() if value > limit and i > low), default=len(steps))
    scale = 1.0
    for number in range(_EVALUATIONS):
        if high - low <= 1:
            break
        # As far as the guess goes within the limit, but always well inside of the interval.
        inside = [i for i in range(low + 1, high) if scale * guess(steps[i]) <= limit]
        margin = (high - low) // 8
        index = min(max(max(inside, default=low + 1), low + 1 + margin), high - 1 - margin)
        if number >= _GUESSED:  # the guess leads astray: halve
            index = (low + high) // 2
        index = min(max(index, low + 1), high - 1)
        found[index] = value = loss(steps[index])
        guessed = guess(steps[index])
        if guessed > 0.0 and value > 0.0:
            scale = value / guessed
        if value <= limit:
            low = index
        else:
            high = index
        if steps[low].cost - steps[min(high, len(steps) - 1)].cost <= 0.005 * steps[0].cost:
            break
    return low, found
