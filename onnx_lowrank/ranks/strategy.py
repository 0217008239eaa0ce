"""Strategy: from the user's goal to a choice for every layer, and to another one if needed.

A strategy makes a first plan; when that is assembled and measured it accepts it or makes another.
What cannot be had is `Unreachable`, with the best that can.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from onnx_lowrank.maps.choice import Choice
from onnx_lowrank.maps.find import Group
from onnx_lowrank.ranks.choose import choose, settle
from onnx_lowrank.ranks.formats import formatted
from onnx_lowrank.ranks.goals import Goal
from onnx_lowrank.ranks.prepared import Prepared
from onnx_lowrank.schema.measures import Judged, Latency

__all__ = ["Measured", "PerLayer", "Plan", "Strategy", "Unreachable"]


@dataclass(frozen=True, eq=False)
class Plan:
    """One choice for every layer.

    Attributes:
        choices: the choices, one for each node.
        damage: predicted mean relative square error of the outputs, all pairs together, on the
            samples of the search, and where these leave it unsure on more (see `Together`); None
            where not predicted.
        summed: sum of the layers' damages, each alone.
        error: standard error of the damage; None where one sample does not tell.
    """

    choices: Mapping[Group, Choice]
    damage: float | None = None
    summed: float | None = None
    error: float | None = None

    @property
    def factored(self) -> bool:
        """Whether any layer has a rank."""
        return any(choice.rank is not None for choice in self.choices.values())

    @property
    def changed(self) -> bool:
        """Whether any layer has a rank or a format."""
        return any(choice.changed for choice in self.choices.values())


@dataclass(frozen=True, eq=False)
class Measured:
    """What is known of an assembled plan.

    Attributes:
        bytes: of the written model.
        judged: by a metric, on samples that no search has seen; None where there is none.
        latency: against the original.
    """

    bytes: int
    judged: Judged | None
    latency: Latency | None

    @property
    def loss(self) -> float | None:
        """The loss by the metric."""
        return None if self.judged is None else self.judged.loss


class Unreachable(Exception):  # noqa: N818 - it is a finding, not a fault
    """A goal cannot be met.

    Attributes:
        plan: the best that can be had.
    """

    def __init__(self, message: str, plan: Plan) -> None:
        super().__init__(message)
        self.plan = plan


class Strategy(abc.ABC):
    """How a goal is met.

    Attributes:
        evaluations: how often the model was run with several layers factored.
    """

    evaluations: int = 0
    once: bool = False
    """Whether the first plan is never revised."""
    may_put_back: bool = True
    """Whether layers that are slower as pairs may be dense again without missing the goal."""

    @abc.abstractmethod
    def first(self) -> Plan:
        """The first plan.

        Raises:
            Unreachable: no choice meets the goal.
        """

    def revise(self, plan: Plan, measured: Measured) -> Plan | None:  # noqa: ARG002
        """Another plan after one was assembled, or None to accept it.

        Raises:
            Unreachable: as measured, the goal cannot be met.
        """
        return None

    def further(self) -> bool:
        """Look again from the plan that was accepted, now that it loses less than it did.

        Returns:
            Whether there is anything to look for; `revise` then goes on from there.
        """
        return False


class PerLayer(Strategy):
    """Every layer for itself: an energy, a rank, or the same share of each."""

    once = True

    def __init__(
        self,
        goal: Goal,
        prepared: Prepared,
        revised: Callable[[Group, Choice], Choice] = lambda _, choice: choice,
    ) -> None:
        """A strategy.

        Args:
            goal: what is asked of each layer.
            prepared: the model.
            revised: another choice where a layer's own numbers do not decide.
        """
        self._goal, self._prepared, self._revised = goal, prepared, revised

    def first(self) -> Plan:
        """The only plan."""
        prepared, goal = self._prepared, self._goal
        chosen = dict(prepared.early)
        for group, measurement in prepared.measured.items():
            chosen[group] = self._revised(group, choose(group, measurement, goal))
        ordered = {group: chosen[group] for group in prepared.finding.groups}
        settled = settle(prepared.finding, ordered, goal)
        if not prepared.quantized.wanted:
            return Plan(settled)
        # A rank that the user named is taken as it is.
        return Plan(
            formatted(
                settled,
                prepared.formats,
                prepared.floats,
                prepared.finding.off,
                smallest=self._goal.rank is None,
            )
        )
