"""Damage of maps around a width that are rounded together: that of each, added up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnx_lowrank.maps.find import Group
from onnx_lowrank.ranks.damage import DamageCurve, DamageFrom
from onnx_lowrank.ranks.formats import Formats
from onnx_lowrank.ranks.rounding_damage import RoundingDamage

__all__ = ["of_groups"]

# What is known best comes first.
_KNOWN: tuple[DamageFrom, ...] = ("outputs", "other layers", "own error")


def of_groups(
    found: Mapping[Group, RoundingDamage],
    formats: Mapping[Group, Formats],
    curves: Mapping[Group, DamageCurve],
) -> dict[Group, RoundingDamage]:
    """What rounding does to the outputs, of groups.

    Args:
        found: of every map that is rounded by itself.
        formats: of the groups.
        curves: damage of their ranks.
    """
    own = {group: [found[one] for one in group.alone if one in found] for group in formats}
    return {
        group: _added(parts, curves.get(group)) if group.maps else parts[0]
        for group, parts in own.items()
        if parts
    }


def _added(parts: Sequence[RoundingDamage], curve: DamageCurve | None) -> RoundingDamage:
    """Of all maps; a lower rank loses by rounding what it holds of the energy loses."""
    dense = {form: sum(part.dense[form] for part in parts) for form in parts[0].dense}
    held = 0.0 if curve is None else curve.held(curve.full)
    return RoundingDamage(
        dense,
        {form: damage / held if held > 0.0 else 0.0 for form, damage in dense.items()},
        max((part.known_from for part in parts), key=_KNOWN.index),
        parts[-1].slope,
        inputs=sum(part.inputs for part in parts),
        ranged=sum(part.ranged for part in parts),
        maps=True,
    )
