"""From decisions to the report: every figure that a run shows is made here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from onnx_lowrank.errors import named
from onnx_lowrank.graph.walk import node_name
from onnx_lowrank.maps.choice import Decision, linear_parameters
from onnx_lowrank.maps.find import Group
from onnx_lowrank.maps.pair import Errors
from onnx_lowrank.numerics.ranks import break_even
from onnx_lowrank.ranks.macs import Macs
from onnx_lowrank.report import Layer, Totals

__all__ = ["layers", "nothing_gained", "seen_damage", "totals"]


def layers(
    decisions: Sequence[Decision], errors: Mapping[Group, Errors], macs: Macs | None
) -> tuple[Layer, ...]:
    """One row for every linear map."""
    rows = []
    for decision in decisions:
        choice, group = decision.choice, decision.group
        error = errors.get(group) if group is not None else None
        cost = None if macs is None or decision.site is None else macs.costs.get(decision.site)
        before = after = None
        pair = decision.size
        if group is not None and choice.rank is not None:
            pair = choice.parameters(group)
        if cost is not None:
            before = after = cost.dense
            if choice.rank is not None:
                after = cost.pair(choice.rank) if choice.leads else choice.rank * cost.second
        rows.append(
            Layer(
                name=node_name(decision.node),
                op_type=decision.node.op_type,
                form=decision.form,
                weight=decision.weight,
                shape=decision.shape,
                slices=decision.slices,
                status="dense" if choice.rank is None else "factored",
                rank=choice.rank,
                reason=choice.reason,
                parameters_before=decision.size,
                parameters_after=pair,
                energy=_energy(decision, error),
                energy_of=choice.of,
                predicted_error=_predicted_error(decision),
                output_error=None if error is None else error.output,
                weight_error=None if error is None else error.weight,
                macs_before=before,
                macs_after=after,
                shared=0 if group is None else len(group.members) - 1,
                off=decision.off,
                refit=None if error is None or error.refit is None else _roots(error.refit),
            )
        )
    return tuple(rows)


def _roots(squares: tuple[float, float]) -> tuple[float, float]:
    return math.sqrt(squares[0]), math.sqrt(squares[1])


def _energy(decision: Decision, error: Errors | None) -> float | None:
    """The energy that the rank holds; by Eckart and Young ``1 − error²`` where not measured."""
    choice = decision.choice
    if choice.energy is not None or error is None or choice.of != "weight":
        return choice.energy
    return max(0.0, 1.0 - error.weight * error.weight)


def _predicted_error(decision: Decision) -> float | None:
    choice = decision.choice
    if choice.of == "weight" or choice.energy is None:
        return None
    return math.sqrt(max(0.0, 1.0 - choice.energy))


def totals(
    decisions: Sequence[Decision],
    rows: Sequence[Layer],
    macs: Macs | None,
    parameters_before: int,
    parameters_after: int,
) -> Totals:
    """Sums over the model; a shared constant counts once."""
    linear_before, linear_after = linear_parameters(decisions)
    after = None
    if macs is not None and macs.total is not None:
        after = macs.total - sum(
            row.macs_before - row.macs_after
            for row in rows
            if row.macs_before is not None and row.macs_after is not None
        )
    return Totals(
        parameters_before=parameters_before,
        parameters_after=parameters_after,
        linear_parameters_before=linear_before,
        linear_parameters_after=linear_after,
        macs_before=None if macs is None else macs.total,
        macs_after=after,
    )


def seen_damage(damage: float | None, decisions: Sequence[Decision]) -> float | None:
    """A measured damage; None where it is exactly 0 though layers are factored: none was seen."""
    return damage or None if any(d.choice.rank is not None for d in decisions) else damage


def nothing_gained(decisions: Sequence[Decision]) -> str | None:
    """Why nothing was replaced, in one line with what to try; None where something was."""
    if any(decision.choice.rank is not None for decision in decisions):
        return None
    if not decisions:
        return "nothing was replaced: the model has no linear map with a constant weight"
    decisions = [decision for decision in decisions if not decision.off]
    if not decisions:
        return (
            f"nothing was replaced: the model has no linear map of the forms that {named('ops')} "
            "chooses"
        )
    shares = sorted(
        decision.choice.needed / break_even(*decision.shape)
        for decision in decisions
        if decision.choice.needed and decision.shape is not None
    )
    if shares:
        median = shares[len(shares) // 2]
        return (
            f"nothing was replaced: at this energy the median layer needs {median:.2f} of its "
            f"break-even rank; try a lower {named('energy')}, {named('data')} to fit to the "
            f"outputs, or {named('keep')} 0.8 to "
            "fix the size instead, and look at the check"
        )
    reasons = [decision.choice.reason for decision in decisions]
    common = max(dict.fromkeys(reasons), key=reasons.count)
    return f"nothing was replaced: {common} ({reasons.count(common)} of {len(reasons)} layers)"
