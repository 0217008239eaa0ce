"""Formats: in which numbers the weights of every layer are stored, beside their rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import onnx_ir as ir

from onnx_lowrank.maps.choice import Choice, Spectrum
from onnx_lowrank.maps.find import Finding, Group, Selection
from onnx_lowrank.maps.formats import Format, no_format, suited

__all__ = ["WEIGHTS", "WITHOUT_BLOCKS", "formats_of", "formatted"]

WEIGHTS: Mapping[str, Format | None] = {
    "fp32": None,
    "8": Format(bits=8, block=128),
    "4": Format(bits=4, block=32),
}
"""What ``weights`` may be."""
WITHOUT_BLOCKS = frozenset({"coreml", "nnapi", "qnn", "xnnpack"})
"""Targets that take no DequantizeLinear with blocks before a product."""


def formats_of(
    finding: Finding,
    measured: Mapping[Group, Spectrum],
    model: ir.Model,
    wanted: Format,
    selection: Selection,
) -> tuple[dict[Group, Format], dict[Group, str]]:
    """The format of every layer that may have one, and why the others have none.

    Args:
        finding: the linear maps.
        measured: what is known of their numbers.
        model: the model.
        wanted: the format.
        selection: which nodes may be changed at all.
    """
    found, left = {}, {}
    for group in finding.groups:
        reasons = [selection.reason(member.site.node) for member in group.members]
        why = next((reason for reason in reasons if reason is not None), no_format(group, model))
        if why is None and group in measured and not measured[group].finite:
            why = f"{group.matrix.name} holds NaN or Inf"
        if group.members[0].site.form.indices:
            continue  # a table: see `onnx_lowrank.maps.tables`
        if why is None:
            found[group] = dataclasses.replace(wanted, block=suited(wanted.block, group.shape[1]))
        else:
            left[group] = why
    return found, left


def formatted(
    choices: Mapping[Group, Choice], formats: Mapping[Group, Format], left: Mapping[Group, str]
) -> dict[Group, Choice]:
    """The choices with the format of each layer, or the reason why it has none."""
    found = {}
    for group, choice in choices.items():
        if group in formats:
            form = formats[group]
            why = f"{choice.reason}; weights in {form}"
            found[group] = dataclasses.replace(choice, format=form, reason=why)
        elif group in left and left[group] != choice.reason:
            why = f"{choice.reason}; weights stay floats: {left[group]}"
            found[group] = dataclasses.replace(choice, reason=why)
        else:
            found[group] = choice
    return found
