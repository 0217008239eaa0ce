"""Searching: what every budget needs to choose among ranks without assembling a model.

The damage of every layer is measured once; from then on the probe, which exchanges weights in one
session, tells what several layers together do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx
import onnx_ir as ir

from onnx_lowrank.data.joining import APART, Joining
from onnx_lowrank.data.samples import Samples
from onnx_lowrank.evaluation.metrics import Metric, Ran
from onnx_lowrank.evaluation.reading import PLAIN, Reading
from onnx_lowrank.fitting.fit import fit
from onnx_lowrank.fitting.rounded_maps import rounded_maps
from onnx_lowrank.fitting.rounded_weights import (
    centre_of,
    moments_of,
    round_factors,
    round_weight,
    shift_by,
)
from onnx_lowrank.fitting.spectra import group_memory, largest_first
from onnx_lowrank.fitting.statistics import Statistics
from onnx_lowrank.graph.walk import node_name
from onnx_lowrank.maps.choice import STAYS, Choice, Decision, linear_bytes, linear_parameters
from onnx_lowrank.maps.find import Group, Refused
from onnx_lowrank.maps.formats import Variant
from onnx_lowrank.maps.pair import Factors, constants_of
from onnx_lowrank.maps.tables import table_codes
from onnx_lowrank.numerics.arrays import Array, Feed
from onnx_lowrank.numerics.fisher import PLAIN as PLAIN_FISHER
from onnx_lowrank.numerics.knapsack import Solution
from onnx_lowrank.numerics.parallel import map_layers
from onnx_lowrank.phrases import listed
from onnx_lowrank.progress import Stages
from onnx_lowrank.ranks.allocation import Ladders, Priced, bytes_of
from onnx_lowrank.ranks.choose import choose, decide, settle
from onnx_lowrank.ranks.damage import STEPS, damage_curves, find_joints, joint_curves
from onnx_lowrank.ranks.formats import by_map, unformatted
from onnx_lowrank.ranks.goals import Goal
from onnx_lowrank.ranks.map_damage import of_groups
from onnx_lowrank.ranks.prepared import Prepared
from onnx_lowrank.ranks.probe import Probe
from onnx_lowrank.ranks.rounded_inputs import seen_inputs
from onnx_lowrank.ranks.rounding_damage import rounding_damages
from onnx_lowrank.ranks.strategy import Plan
from onnx_lowrank.ranks.together import Together
from onnx_lowrank.runtime.memory import Memory
from onnx_lowrank.runtime.taps import Runner

__all__ = ["Searching"]

# Bytes of the original's outputs on further samples that are kept.
_MEMORY = 1 << 28


class Searching:
    """The layers' options and damages, and the model to try them on.

    Attributes:
        ladders: the options.
        curves: damage of every layer alone.
        rounding: damage of its formats.
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
        further: Sequence[Feed] = (),
        joining: Joining = APART,
        known: Probe | None = None,
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
            spare: more samples that a loss is measured on, which nothing was fitted to.
            further: samples that factors are fitted to, which are asked where those of the search
                leave a damage unsure.
            joining: how samples go together in one run.
            known: a probe of the same run, which is used where it does what is asked.

        Raises:
            InputError: the model does not run with its weights as inputs.
        """
        self.prepared, self.stages, self.say = prepared, stages, say
        self._goal, self._samples, self._reading = goal, samples, reading
        self._spare = spare
        self._spare_reference: list[Feed] | None = None
        groups = [group for group, found in prepared.measured.items() if found.finite]
        by_itself = by_map(prepared.formats)
        changed = list(dict.fromkeys([*groups, *prepared.formats, *by_itself]))
        with stages("damage", STEPS * len(groups)) as advance:
            if (
                known is not None
                and not prepared.formats
                and known.serves(prepared.model, changed, samples.feeds, reading, by_classes)
            ):
                self.probe = known
            else:
                self.probe = Probe(
                    prepared.model,
                    changed,
                    samples.feeds,
                    open_model,
                    reading,
                    by_classes,
                    memory,
                    {g: form for g, own in by_itself.items() if (form := own.integers)},
                    prepared.static,
                    prepared.pieces,
                    joining,
                )
            curves = damage_curves(
                groups,
                prepared.measured,
                prepared.search,
                goal,
                self.probe,
                advance,
                lambda group: prepared.known_curve(group, bool(prepared.search.fisher)),
                prepared.crew,
            )
        for note in self.probe.watched.notes:
            self.say(note)
        self.curves = curves
        with stages("damage of formats", len(by_itself)) as advance:
            found = rounding_damages(
                by_itself, curves, prepared.search, self.probe, advance, prepared.crew
            )
        self.rounding = of_groups(found, prepared.formats, curves)
        seen_from = [(group, curve.known_from) for group, curve in curves.items()]
        seen_from += [(group, own.known_from) for group, own in self.rounding.items()]
        unseen = list(dict.fromkeys(group for group, how in seen_from if how == "own error"))
        self._left = frozenset(unseen if only_seen else ())
        if unseen:
            self.say(_unseen_note(unseen, only_seen))
        curves = {group: curve for group, curve in curves.items() if group not in self._left}
        joints = find_joints(curves, prepared.measured, prepared.search, prepared.model)
        with stages("damage together", len(joints)) as advance:
            shared = joint_curves(joints, curves, prepared.search, goal, advance, prepared.crew)
        formats = {
            group: own
            for group, own in prepared.formats.items()
            if group not in self._left or own.dense[0] is not None
        }
        self.ladders = Ladders(
            prepared.finding,
            curves,
            prepared.measured,
            goal,
            multiple,
            shared,
            formats,
            self.rounding,
        )
        slopes = {group: curve.slope for group, curve in self.curves.items() if curve.points}
        slopes = {group: own.slope for group, own in self.rounding.items()} | slopes
        self._together = Together(self.probe, prepared.search, slopes, further)
        self.evaluations = 0
        self._tried: dict[Group, _Tried] = {}

    def plan(self, priced: Priced, solution: Solution) -> Plan:
        """A solution as a plan."""
        settled = self._settled(priced.choices(solution))
        with self.stages("search"):
            found = self._together.measured(self._constants(priced, solution))
        if self._together.asked:
            self.say(
                f"the {len(self.probe.feeds)} samples of the search leave the damage unsure: it is "
                "predicted on some that factors are fitted to as well, times what these gain there"
            )
        together, error = found.mean, found.error
        if together:  # 0 is no finding; and the probe's kernels are those of floats
            choices, estimate = priced.choices(solution), self.ladders.lost_by_inputs
            inputs = seen_inputs(choices, estimate, together, self.probe)
            together += inputs.mean or 0.0
            error = None if error is None else math.hypot(error, inputs.error or 0.0)
        plan = Plan(settled, together, solution.damage, error)
        # Exactly 0 of pairs that lose something: no sample reaches them.
        return replace(plan, damage=together or None) if plan.changed else plan

    def dense(self, reason: str) -> Plan:
        """The plan without pairs, for a reason; in integers only where floats are not allowed."""
        choice = Choice(None, f"dense: {reason}")
        formats = self.prepared.formats
        choices = {
            group: replace(choice, format=formats[group].dense[0]) if group in formats else choice
            for group in self.ladders.groups
        }
        damage = None if self.prepared.quantized.forced else 0.0
        return Plan(self._settled(choices), damage, damage)

    def _settled(self, choices: Mapping[Group, Choice]) -> dict[Group, Choice]:
        """Choices of the groups with options, with those of all others, one for each node."""
        prepared, goal = self.prepared, self._goal
        chosen = dict(prepared.early)
        for group, found in prepared.measured.items():
            if not found.finite:
                chosen[group] = choose(group, found, goal)
            elif group in self._left:
                chosen[group] = Choice(None, "dense: no sample changes an output through it")
        chosen |= {group: _explained(own, chosen.get(group)) for group, own in choices.items()}
        chosen = {g: unformatted(g, own, prepared.floats) for g, own in chosen.items()}
        floats = {group: prepared.floats.get(group) for group in prepared.finding.off}
        chosen |= {g: Choice(None, f"{STAYS}{why}") for g, why in floats.items() if why}
        ordered = {group: chosen[group] for group in prepared.finding.groups if group in chosen}
        return settle(prepared.finding, {**ordered, **chosen}, goal)

    def linear_parameters(self) -> int:
        """Parameters of all linear layers, with or without options."""
        return linear_parameters(self._undecided())[0]

    def linear_bytes(self) -> float:
        """Bytes of the same, and of tables and layers of forms that are off, with formats."""
        finding, stored = self.prepared.finding, self.prepared.stored
        counted = [e.site for e in finding.entries if isinstance(e, Refused) and not e.off]
        known = set(finding.groups)
        known |= {own for own in finding.off if own.members[0].site in counted}
        return linear_bytes(self._undecided(), stored) + sum(
            stored.get(group.matrix.name, group.matrix.tensor.nbytes)
            for group in self.ladders.groups
            if group not in known
        )

    def fixed_bytes(self) -> float:
        """Bytes of linear layers that have no options, as they are written."""
        stored = self.prepared.stored
        options = sum(
            stored.get(own.matrix.name, bytes_of(own, Variant()))
            for ways in self.ladders.ways
            for own in ways[0].alone
        )
        return self.linear_bytes() - options

    def _undecided(self) -> tuple[Decision, ...]:
        return decide(self.prepared.finding, self.dense("not chosen yet").choices)

    @property
    def samples(self) -> int:
        """How many a loss is measured on."""
        return len(self.probe.feeds) + (0 if self._spare is None else len(self._spare.feeds))

    def loss(self, priced: Priced, solution: Solution, metric: Metric) -> float:
        """A solution by a metric, as smooth as it is known, without assembling it."""
        constants = self._constants(priced, solution)
        parts: list[tuple[Samples, Iterable[Feed], Iterable[Feed]]]
        parts = [(self._samples, self.probe.reference, self.probe.outputs(constants))]
        if self._spare is not None:
            feeds = self._spare.feeds
            again = self.probe.outputs(constants, feeds)
            parts.append((self._spare, self._referred(feeds), again))
        runs = (
            Ran(feed, labels, before, own)
            for samples, reference, outputs in parts
            for (feed, labels), before, own in zip(
                samples.labelled(), reference, outputs, strict=True
            )
        )
        judged, notes = metric.judge(runs, self._reading)
        for note in notes:
            self.say(note)
        return judged.smooth

    def _referred(self, feeds: Sequence[Feed]) -> Iterable[Feed]:
        """The original's outputs on further samples; kept where they take little memory."""
        if self._spare_reference is None:
            first = next(iter(self.probe.outputs({}, feeds[:1])))
            if sum(array.nbytes for array in first.values()) * len(feeds) > _MEMORY:
                return self.probe.outputs({}, feeds)
            self._spare_reference = list(self.probe.outputs({}, feeds))
        return self._spare_reference

    def _constants(self, priced: Priced, solution: Solution) -> Mapping[str, Array]:
        """What a solution puts in place of weights; what was made before is used again."""
        self.evaluations += 1
        within = set(self.probe.groups)
        choices = {
            group: choice
            for group, choice in priced.choices(solution).items()
            if choice.changed and group in within
        }
        kept = {
            group: tried
            for group, tried in self._tried.items()
            if group in choices and tried.fits(choices[group])
        }
        missing = {group: choice for group, choice in choices.items() if group not in kept}
        statistics = replace(self.prepared.search, held={})
        pairs = dict(fit(missing, statistics, lambda _: None, self.prepared.crew))

        def work(group: Group) -> _Tried:
            return _Tried(
                missing[group], tried(group, missing[group], pairs.get(group), statistics)
            )

        self._tried = kept | dict(
            map_layers(
                work, largest_first(list(missing)), group_memory, room=self.prepared.crew.room()
            )
        )
        constants: dict[str, Array] = {}
        for own in self._tried.values():
            constants |= own.constants
        for group, choice in priced.choices(solution).items():
            if choice.format is not None and choice.format.integers:
                constants |= self.probe.rounds(group)
        return constants


@dataclass(frozen=True, eq=False)
class _Tried:
    """What stands in place of one group's constants for a choice."""

    choice: Choice
    constants: Mapping[str, Array]

    def fits(self, choice: Choice) -> bool:
        """Whether another choice would give the same."""
        own = self.choice
        alone = own.joint is None and choice.joint is None
        return alone and (own.rank, own.format) == (choice.rank, choice.format)


def tried(
    group: Group, choice: Choice, pair: Factors | None, statistics: Statistics
) -> dict[str, Array]:
    """What stands in place of a group's constants for a choice, by name.

    Args:
        group: the group.
        choice: what becomes of it; not left as it is.
        pair: its pair where it has a rank.
        statistics: what is rounded on.
    """
    form = choice.format
    if form is None:
        assert pair is not None
        return pair.constants(group)
    if group.maps:
        return rounded_maps(group, form, pair, statistics)
    moments, centre = moments_of(statistics, group), centre_of(statistics, group)
    if pair is not None:
        return round_factors(pair, form, moments, centre).constants(group)
    matrix = group.matrix.numpy()[0]
    if form.table:
        return constants_of(group, table_codes(matrix, form).values().T[None])
    fisher = statistics.felt.get(group, PLAIN_FISHER)
    values = round_weight(matrix, form, moments, fisher).values()
    return constants_of(group, values[None], shift_by(centre, matrix, values))


def _explained(choice: Choice, early: Choice | None) -> Choice:
    """A choice with the reason why there is no rank, where that was known before."""
    if early is None or choice.rank is not None:
        return choice
    why = early.reason if choice.format is None else f"{early.reason}; {choice.reason}"
    return replace(choice, reason=why)


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
