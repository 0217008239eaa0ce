"""Round: the stage that puts integers in place of weights and tables with a format."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping

import onnx_ir as ir

from onnx_lowrank.compression.context import Context
from onnx_lowrank.errors import named
from onnx_lowrank.fitting.rounded_maps import Width
from onnx_lowrank.fitting.rounding import Opened, PostponedTable, Rounded, round_weights
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.graph.opset import raise_opset
from onnx_lowrank.graph.spool import Spool
from onnx_lowrank.maps.choice import Choice
from onnx_lowrank.maps.find import Finding, Group
from onnx_lowrank.maps.formats import first_opset
from onnx_lowrank.maps.tables import find_tables, table_codes, write_table
from onnx_lowrank.numerics.correction import felt_error
from onnx_lowrank.phrases import counted
from onnx_lowrank.ranks.prepared import Prepared

__all__ = ["ROUNDING_NOTES", "round_model"]

_TABLES, _WEIGHTS, _NEAREST = "tables in ", "weights in ", "rounded to nearest"
_SIGNED = "weights per channel are stored with a sign"
ROUNDING_NOTES = ("opset ", _TABLES, _WEIGHTS, _NEAREST, _SIGNED)
"""How its notes begin."""


def round_model(
    context: Context,
    prepared: Prepared,
    model: ir.Model,
    choices: Mapping[Group, Choice],
    finding: Finding,
    spool: Spool,
    *,
    heals: bool,
    widths: Mapping[Group, Width],
) -> tuple[dict[Group, Rounded], Opened]:
    """Integers in place of the weights and tables with a format, in place.

    Args:
        context: the run.
        prepared: what the model was made from.
        model: with pairs in it.
        choices: what becomes of the layers.
        finding: the linear maps of the model before it had pairs.
        spool: where the integers wait until they are saved.
        heals: whether healing goes on with scales and with the pairs that correct roundings.
        widths: what is left of the widths in front of groups that became narrower.

    Returns:
        what became of the weights, and what healing goes on with.
    """
    stored = {group: choice for group, choice in choices.items() if choice.format is not None}
    if not stored:
        return {}, Opened()
    opset = max(first_opset(g, c.format) for g, c in stored.items() if c.format is not None)
    context.say(raise_opset(model, opset))
    known, others = ((*found.groups, *found.off) for found in (prepared.finding, finding))
    own = dict(zip(known, others, strict=True))
    settings = context.settings
    with context.stages("round", sum(group.matrix.size for group in stored)) as advance:
        rounded, opened = round_weights(
            model,
            stored,
            own,
            prepared.statistics,
            spool,
            advance,
            heals=heals,
            widths=widths,
        )
        constants = Constants(model, settings.constant_inputs)
        sites = find_tables(finding, model, constants, settings.selection).sites
        for name, group in prepared.tables.groups.items():
            choice = stored.get(group)
            # What was factored is no Gather any more.
            if choice is None or choice.format is None or choice.rank is not None:
                continue
            rows = group.matrix.numpy()[0]
            codes = table_codes(rows, choice.format)
            if heals and choice.format.fused:  # no derivative goes through these nodes
                waits = PostponedTable(sites[name], codes, choice.format)
                waits.put_floats(spool)
                opened.tables.append(waits)
            else:
                write_table(model, sites[name], codes, choice.format, spool)
            whole = felt_error(rows, None)
            lost = felt_error(rows - codes.values().T, None)
            error = math.sqrt(lost / whole) if whole > 0.0 else 0.0
            rounded[group] = Rounded(choice.format.stored(codes), error)
            advance(group.matrix.size)
    for note in _rounded_notes(prepared, stored, rounded):
        context.say(note)
    fit = prepared.statistics.fit
    blind = [g for g in stored if not _gathers(g) and any(own not in fit for own in g.alone)]
    if blind:
        why = "no sample says how"
        if any(group in prepared.finding.off for group in blind) and fit:
            why += f", unless {named('ops')} turns their forms on"
        context.say(f"{_NEAREST} in {len(blind)} of {len(stored)} weights: {why}")
    return rounded, opened


def _gathers(group: Group) -> bool:
    return group.members[0].site.form.indices


def _rounded_notes(
    prepared: Prepared, stored: Mapping[Group, Choice], rounded: Mapping[Group, Rounded]
) -> Iterable[str]:
    """How many layers have which format, and the tables by name."""
    tables = {group: name for name, group in prepared.tables.groups.items() if group in stored}
    for bits in (8, 6, 4):
        own = [g for g in tables if (form := stored[g].format) is not None and form.bits == bits]
        if own:
            size = sum(rounded[group].bytes for group in own) / 1e6
            yield f"{_TABLES}{bits} bits: {', '.join(tables[g] for g in own)}, {size:.3g} MB"
    layers = [group for group in stored if group not in tables]
    if layers:
        counts = Counter(str(stored[group].format) for group in layers)
        size = sum(rounded[group].bytes for group in layers) / 1e6
        each = "; ".join(f"{counted(n, 'layer')} in {form}" for form, n in counts.most_common())
        yield f"{_WEIGHTS}integers: {each}; {size:.3g} MB together"
    if any(form.dynamic and form.signed for own in stored.values() if (form := own.format)):
        yield (
            f"{_SIGNED}, as kernels compute them exactly where that was chosen; on x86 processors "
            "without VNNI their sums may saturate, and a search there stores them unsigned"
        )
