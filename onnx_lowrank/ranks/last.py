"""Last: layers behind which there are only the outputs, whose rank the outputs themselves decide.

The energy of a layer's products says little of what is made of them: of the logits of a classifier
with thousands of classes 95 % may be in what all classes share, and the answers be gone.  Of most
layers nothing nearer is known without running the model for each rank.  Of the last one it is: the
layer alone gets a pair, the model runs on a part of the calibration samples, and the rank is raised
until the outputs hold the energy (their mean relative square error is at most 1 − energy), and a
classifier's answer changes in at most that share of the rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import onnx
import onnx_ir as ir

from onnx_lowrank.data.samples import Samples
from onnx_lowrank.evaluation.metrics import Metric, Ran
from onnx_lowrank.evaluation.reading import Reading
from onnx_lowrank.fitting.fit import fit
from onnx_lowrank.graph.flow import flow_from
from onnx_lowrank.maps.choice import Choice
from onnx_lowrank.maps.find import Finding, Group
from onnx_lowrank.maps.pair import constants_of_pairs
from onnx_lowrank.ranks.goals import Goal
from onnx_lowrank.ranks.prepared import Prepared
from onnx_lowrank.ranks.probe import Probe
from onnx_lowrank.runtime.taps import Runner

__all__ = ["ByOutputs", "last_groups"]

# So much of the outputs' energy is the rounding of float32: energy 1 is held up to it.
_ROUNDING = 1e-9


def last_groups(model: ir.Model, finding: Finding) -> list[Group]:
    """Groups of the main graph on which no other linear map that may be factored depends."""
    of_group = {member.site.node: group for group in finding.groups for member in group.members}
    found = []
    for group in finding.groups:
        own = [member.site.node for member in group.members]
        if any(node.graph is not model.graph for node in own):
            continue
        reached = flow_from(model, nodes=own).reached
        others = (node for node in of_group if node not in own)
        if not any(value in reached for node in others for value in node.inputs):
            found.append(group)
    return found


class ByOutputs:
    """Raises the rank of a last layer until the outputs hold the energy."""

    def __init__(
        self,
        goal: Goal,
        prepared: Prepared,
        samples: Samples,
        open_model: Callable[[ir.Model | onnx.ModelProto], Runner],
        reading: Reading,
    ) -> None:
        """Nothing runs before the first layer that has a rank.

        Args:
            goal: an energy.
            prepared: the model.
            samples: what the outputs are compared on.
            open_model: makes a runner of a model that gives its outputs by name.
            reading: what is known of the outputs.
        """
        self._goal, self._prepared = goal, prepared
        self._samples, self._open, self._reading = samples, open_model, reading
        fitted = prepared.search.fit
        own = last_groups(prepared.model, prepared.finding)
        self.groups = tuple(group for group in own if group in fitted)

    def choose(self, group: Group, choice: Choice) -> Choice:
        """A choice, with a larger rank or none where the outputs do not hold the energy.

        Raises:
            InputError: the model does not run with its weight as an input.
        """
        energy = self._goal.energy
        if choice.rank is None or energy is None or group not in self.groups:
            return choice
        probe = Probe(
            self._prepared.model,
            [group],
            self._samples.feeds,
            self._open,
            self._reading,
            pieces=self._prepared.pieces,
        )
        if group not in probe.groups:
            return choice
        limit = self._goal.largest(group)
        step = self._goal.rank_multiple
        ranks = [*range(choice.rank, limit, step), limit]
        low, high = 0, len(ranks)
        seen = ""
        while low < high:  # the first rank that holds; the first one is asked first
            middle = low if low == 0 and high == len(ranks) else (low + high) // 2
            holds, text = self._holds(probe, group, ranks[middle], energy)
            seen = seen or text
            low, high = (low, middle) if holds else (middle + 1, high)
        if low == 0:
            return choice
        if low == len(ranks):
            return dataclasses.replace(
                choice,
                rank=None,
                energy=None,
                reason=f"energy {energy:g} of the model's outputs, which follow this layer, is not "
                f"held by rank {limit}, the largest that saves {100 * self._goal.min_gain:g} % "
                f"(at rank {choice.rank}: {seen})",
            )
        spectrum = self._prepared.measured[group]
        return dataclasses.replace(
            choice,
            rank=ranks[low],
            energy=spectrum.held(ranks[low]),
            reason=f"{choice.reason}; rank {ranks[low]} holds it of the model's outputs, which "
            f"follow this layer (at rank {choice.rank}: {seen})",
        )

    def _holds(self, probe: Probe, group: Group, rank: int, energy: float) -> tuple[bool, str]:
        """Whether the outputs hold the energy with a pair of this rank, and what they lose."""
        statistics = dataclasses.replace(self._prepared.search, held={})
        fitted = dict(
            fit({group: Choice(rank, "tried")}, statistics, lambda _: None, self._prepared.crew)
        )
        pairs = constants_of_pairs(fitted)
        damage = probe.damage(pairs) or 0.0
        text = f"relative error {damage**0.5:.2g}"
        changed = 0.0
        if self._reading.classifiers:
            outputs = zip(probe.feeds, probe.reference, probe.outputs(pairs), strict=True)
            runs = (Ran(feed, None, before, own) for feed, before, own in outputs)
            judged, _ = Metric.parse("top1").judge(runs, self._reading)
            changed = max(judged.loss, judged.smooth)
            text += f", other answers in {100 * changed:.2g} % of the rows"
        lost = max(1.0 - energy, _ROUNDING)
        return damage <= lost and changed <= lost, text
