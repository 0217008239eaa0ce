"""From decisions to the report: every figure that a run shows is made here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from onnx_lowrank.compression.figures import Figures
from onnx_lowrank.errors import named
from onnx_lowrank.fitting.rounding import Rounded
from onnx_lowrank.graph.constant import FLOAT_FIRST
from onnx_lowrank.graph.constants import requantized
from onnx_lowrank.graph.scopes import module_of
from onnx_lowrank.graph.walk import node_name
from onnx_lowrank.maps.choice import Decision, linear_parameters
from onnx_lowrank.maps.find import Group
from onnx_lowrank.maps.pair import Errors
from onnx_lowrank.numerics.intervals import share_interval
from onnx_lowrank.numerics.ranks import break_even
from onnx_lowrank.ranks.macs import Macs
from onnx_lowrank.schema.layer import Layer
from onnx_lowrank.schema.measures import Check, Judged
from onnx_lowrank.schema.report import OutputVerdict, Totals

__all__ = ["by_chance", "layers", "nothing_gained", "output_verdict", "seen_damage", "totals"]


# Beyond these a result is doubtful, and beyond the second ones unusable, on its face.
_USABLE_ERROR, _LOST_ERROR = 0.1, 0.5
_USABLE_AGREEMENT, _LOST_AGREEMENT = 0.98, 0.9
# Predicted damage over achieved damage that needs no explanation.
_ALIKE = (0.67, 1.5)


def layers(
    decisions: Sequence[Decision],
    errors: Mapping[Group, Errors],
    macs: Macs | None,
    rounded: Mapping[Group, Rounded],
    figures: Figures = Figures(),  # noqa: B008 - frozen
) -> tuple[Layer, ...]:
    """One row for every linear map."""
    rows = []
    tables: dict[ir.Value | None, Decision] = {
        decision.group.matrix.root: decision
        for decision in decisions
        if decision.group is not None and (form := decision.choice.format) and form.table
    }
    for decision in decisions:
        choice, group = decision.choice, decision.group
        error = errors.get(group) if group is not None else None
        integers = rounded.get(group) if group is not None else None
        cost = None if macs is None or decision.site is None else macs.costs.get(decision.site)
        before = after = None
        pair = decision.size
        sizes, times = figures.bytes(decision), figures.milliseconds(decision)
        form = choice.format
        root = None if decision.site is None else decision.site.matrix.root
        if not choice.changed and root in tables:
            table = tables[root]  # it reads the same integers
            form, sizes = table.choice.format, (sizes[0], figures.bytes(table)[1])
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
                first_factor_of=_first_factor(decision),
                refit=None if error is None or error.refit is None else _roots(error.refit),
                format=None if form is None else str(form),
                rounding_error=None if integers is None else integers.error,
                scope=module_of(decision.node),
                spectrum=figures.spectrum(decision),
                bytes_before=sizes[0],
                bytes_after=sizes[1],
                ms_before=times[0],
                ms_after=times[1],
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


def output_verdict(
    check: Check | None,
    decisions: Sequence[Decision],
    *,
    random: bool,
    judged: Judged | None = None,
) -> OutputVerdict | None:
    """A warning where the outputs of a result are beyond what is usable on its face.

    Few rows of classes tell little: only where the whole 95 % interval of the share that agrees is
    below what is usable, that is a reason to warn.

    Args:
        check: the outputs; None where they were not compared.
        decisions: what became of the layers; what is as it was is not warned of.
        random: whether the check ran on random input.
        judged: the result by the metric that the user named; the error of the outputs alone does
            not call it unusable then.
    """
    outputs = [] if check is None else [o for p in check.providers for o in p.outputs]
    if not outputs or not any(decision.choice.changed for decision in decisions):
        return None
    worst = max(outputs, key=lambda output: output.relative_l2)
    agreed = min(
        (output for output in outputs if output.top1_agreement is not None),
        key=lambda output: output.top1_agreement or 0.0,
        default=None,
    )
    error = worst.relative_l2
    agreement = 1.0 if agreed is None else agreed.top1_agreement or 0.0
    rows = None if agreed is None else agreed.top1_rows
    few, most = (agreement, agreement) if not rows else share_interval(agreement, rows)
    if error <= _USABLE_ERROR and most >= _USABLE_AGREEMENT:
        return None
    lost = error > _LOST_ERROR or most < _LOST_AGREEMENT
    bad = not math.isfinite(error) or (judged is None and lost)
    parts = [f"output {worst.name!r} is off by {100 * error:.3g} % (mean relative L2 error)"]
    if agreed is not None:
        sure = ""
        if rows:
            low, high = (100 * (1.0 - end) for end in (most, few))
            count = round((1.0 - agreement) * rows)
            sure = f" ({count} of {rows}: {low:.2g} to {high:.2g} %, with 95 % certainty)"
        changed = f"another one in {100 * (1.0 - agreement):.3g} % of the rows{sure}"
        same = "the same in every row"
        what = same if agreement == 1.0 else changed
        parts.append(f"the largest element of {agreed.name!r} is {what}")
    if random:
        advice = f"on random input; judge it on real samples: {named('data')}, {named('tolerance')}"
    elif judged is not None:
        advice = f"the loss by {judged.metric} is {judged.loss:.3g}; {named('tolerance')} limits it"
    else:
        advice = (
            f"do not ship this without judging it by your own metric: {named('tolerance')}, "
            f"{named('metric')}"
        )
    return OutputVerdict("unusable" if bad else "doubtful", f"{'; '.join(parts)}; {advice}")


def _first_factor(decision: Decision) -> str | None:
    """The layer with whose pair the first factor counts, where that is another one."""
    choice = decision.choice
    if choice.joint is None or choice.leads:
        return None
    return node_name(choice.joint.groups[0].members[0].site.node)


def seen_damage(damage: float | None, decisions: Sequence[Decision]) -> float | None:
    """A measured damage; None where it is exactly 0 though layers are changed: none was seen."""
    return damage or None if any(d.choice.changed for d in decisions) else damage


def by_chance(
    predicted: tuple[float | None, float | None], achieved: tuple[float | None, float | None]
) -> str | None:
    """What to say of two damages that differ much, but no more than samples do.

    Args:
        predicted: a damage, and its standard error; None where it is not known.
        achieved: the same.
    """
    (one, one_error), (other, other_error) = predicted, achieved
    if not one or not other or _ALIKE[0] <= one / other <= _ALIKE[1]:
        return None
    errors = (one_error, other_error)
    known = [error for error in errors if error is not None]
    if len(known) == 2 and abs(one - other) > 2.0 * math.hypot(*known):
        return None
    sure = " and ".join("unknown" if error is None else f"{error:.2g}" for error in errors)
    return (
        f"the damage was predicted as {one:.3g} and is {other:.3g}; that may be chance, their "
        f"standard errors are {sure}: more samples ({named('calibration')}, {named('samples')}) "
        "would tell"
    )


def nothing_gained(decisions: Sequence[Decision], *, fitted: bool) -> str | None:
    """Why nothing was replaced, in one line with what to try; None where something was.

    Args:
        decisions: on every linear map.
        fitted: whether there were samples to fit to.
    """
    choices = [decision.choice for decision in decisions]
    if any(choice.changed for choice in choices):
        return None
    if not decisions:
        return "nothing was replaced: the model has no linear map with a constant weight"
    quantized = [choice.reason for choice in choices if FLOAT_FIRST in choice.reason]
    if 2 * len(quantized) > len(decisions):
        some = any(requantized() in reason for reason in quantized)
        return (
            f"nothing was replaced: {len(quantized)} of {len(decisions)} linear maps have "
            f"quantized weights; {requantized() if some else FLOAT_FIRST}"
        )
    off = [decision for decision in decisions if decision.off]
    decisions = [decision for decision in decisions if not decision.off]
    if not decisions:
        reasons = [decision.choice.reason for decision in off]
        common = max(dict.fromkeys(reasons), key=reasons.count)
        return (
            f"nothing was replaced: the model has no linear map of the forms that {named('ops')} "
            f"chooses; what it has is left: {common} ({reasons.count(common)} of {len(off)} nodes)"
        )
    shares = sorted(
        decision.choice.needed / break_even(*decision.shape)
        for decision in decisions
        if decision.choice.needed and decision.shape is not None
    )
    if shares:
        median = shares[len(shares) // 2]
        samples = "" if fitted else f"{named('data')} to fit to the outputs, "
        return (
            f"nothing was replaced: at this energy the median layer needs {median:.2f} of its "
            f"break-even rank; try a lower {named('energy')}, {samples}or {named('keep', 0.8)} to "
            "fix the size instead, and look at the check"
        )
    reasons = [decision.choice.reason for decision in decisions]
    common = max(dict.fromkeys(reasons), key=reasons.count)
    return f"nothing was replaced: {common} ({reasons.count(common)} of {len(reasons)} layers)"
