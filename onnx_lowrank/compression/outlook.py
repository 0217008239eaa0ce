"""Outlook: what is known of a model with samples before anything is written.

The statistics are those of a run, and budgets for the whole model are planned as a run would plan
them; no model is assembled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from onnx_lowrank.compression.assemble import predicted
from onnx_lowrank.compression.context import Context
from onnx_lowrank.compression.plan import searching_for
from onnx_lowrank.compression.prepare import prepare
from onnx_lowrank.compression.summary import layers, totals
from onnx_lowrank.fitting.statistics import Statistics
from onnx_lowrank.graph.walk import elements
from onnx_lowrank.maps.find import Group
from onnx_lowrank.maps.forms import Site
from onnx_lowrank.ranks.budget_strategies import Keep
from onnx_lowrank.ranks.choose import decide
from onnx_lowrank.ranks.goals import Budget
from onnx_lowrank.ranks.prepared import Prepared
from onnx_lowrank.ranks.strategy import Plan, Unreachable
from onnx_lowrank.schema.report import Calibration

__all__ = ["Looked", "Outlook", "Place", "look_ahead", "place_of"]

Place = tuple[ir.Node, str, int]
"""Where a linear map stands: its node, its form's name, and which input is the constant."""


@dataclass(frozen=True)
class Outlook:
    """What a budget for the whole model would give.

    Attributes:
        keep: share of the linear parameters asked for.
        factored: how many nodes would be pairs.
        linear_parameters: of the linear layers, afterwards.
        parameters: of the model.
        bytes: of the file with its external data, about.
        macs: multiply-accumulates of one inference; None where they are not counted.
        damage: mean relative square error of the outputs, all pairs together, on the samples of
            the search; None where no sample changes an output that shows it.
    """

    keep: float
    factored: int
    linear_parameters: int
    parameters: int
    bytes: int
    macs: int | None
    damage: float | None


@dataclass(frozen=True, eq=False)
class Looked:
    """What was found with samples; nothing without them.

    Attributes:
        prepared: the model with its statistics.
        budgets: what was asked for.
        missed: what cannot be had, and why.
        notes: what the user should know.
    """

    prepared: Prepared | None = None
    budgets: tuple[Outlook, ...] = ()
    missed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    fitted: Mapping[Place, Group] = field(init=False)

    def __post_init__(self) -> None:
        groups = () if self.prepared is None else self.prepared.statistics.fit
        fitted = {place_of(m.site): group for group in groups for m in group.members}
        object.__setattr__(self, "fitted", fitted)

    @property
    def statistics(self) -> Statistics:
        """Of the groups in ``fitted``, from all samples to fit to."""
        if self.prepared is None:
            return Statistics()
        if not self.prepared.steps:
            return self.prepared.statistics
        # Energies that are shown are those of outputs, whatever a budget would be spent by.
        return replace(self.prepared.statistics, fisher={}, bases={})

    @property
    def calibration(self) -> Calibration | None:
        """What they were made of."""
        return None if self.prepared is None else self.prepared.calibration


def place_of(site: Site) -> Place:
    """Where a site stands, for every look at one model."""
    return site.node, site.form.name, site.index


def look_ahead(context: Context, shares: Sequence[float]) -> Looked:
    """Gather statistics, and plan budgets.

    Args:
        context: a run whose goal is a budget, where there are shares.
        shares: of the linear parameters to keep; none tries no budget.

    Raises:
        InputError: the samples do not fit the model.
    """
    prepared = prepare(context)
    found: list[Outlook] = []
    missed: list[str] = []
    if shares and prepared.measured and context.runs():
        searching, _ = searching_for(context, prepared, timed=False)
        with context.stages("budgets", len(shares)) as advance:
            for share in sorted(set(shares), reverse=True):
                try:
                    plan = Keep(searching, Budget("keep", share)).first()
                    found.append(_outlook(context, prepared, share, plan))
                except Unreachable as error:
                    missed.append(str(error))
                advance(1)
    return Looked(prepared, tuple(found), tuple(missed), _notes(context))


def _notes(context: Context) -> tuple[str, ...]:
    summary = context.log.summary()
    return (*context.notes, *context.trial.notes, *([] if summary is None else [summary]))


def _outlook(context: Context, prepared: Prepared, share: float, plan: Plan) -> Outlook:
    decisions = decide(prepared.finding, plan.choices)
    parameters, size = predicted(prepared, decisions)
    rows = layers(decisions, {}, prepared.macs, {})
    sums = totals(decisions, rows, prepared.macs, elements(prepared.model), parameters)
    return Outlook(
        keep=share,
        factored=sum(decision.choice.rank is not None for decision in decisions),
        linear_parameters=sums.linear_parameters_after,
        parameters=parameters,
        bytes=size + context.source.frame_bytes,
        macs=sums.macs_after,
        damage=plan.damage,
    )
