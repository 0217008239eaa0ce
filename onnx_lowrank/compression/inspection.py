"""Inspect: every linear map of a model, the ranks it needs, and what is not handled."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from onnx_lowrank.errors import named
from onnx_lowrank.fitting.spectra import measure
from onnx_lowrank.fitting.statistics import Statistics
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.graph.load import ModelLike, load
from onnx_lowrank.graph.spool import Spool
from onnx_lowrank.graph.walk import all_graphs, all_nodes, elements, node_name
from onnx_lowrank.maps.adapters import Merged, merge_adapters
from onnx_lowrank.maps.choice import Spectrum
from onnx_lowrank.maps.find import (
    Finding,
    Group,
    Refused,
    find,
)
from onnx_lowrank.maps.forms import Site, all_forms
from onnx_lowrank.numerics.ranks import break_even
from onnx_lowrank.phrases import listed
from onnx_lowrank.progress import Progress, Stages

__all__ = [
    "ENERGIES",
    "Inspected",
    "Inspection",
    "inspect_model",
]

ENERGIES = (0.9, 0.95, 0.99)
_LARGE = 0.01


@dataclass(frozen=True)
class Inspected:
    """One linear map, or a large constant that none reads.

    Attributes:
        name: the node, or for a constant that is no linear map, the nodes that read it.
        form: how it stands in the graph, "… + adapter" with an adapter beside it; "" for a constant
            that is no linear map.
        ops: the name by which the user chooses the form.
        weight: the constant.
        shape: as (e, m, n) for a linear map, else the constant's own.
        parameters: its elements.
        break_even: the rank at which a pair is as large; None where it cannot be factored.
        ranks: rank at each of `ENERGIES`; empty where it cannot be factored.
        reason: why it is not factored, or is not by default; "" otherwise.
    """

    name: str
    form: str
    ops: str
    weight: str
    shape: tuple[int, ...] | None
    parameters: int
    break_even: float | None
    ranks: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Inspection:
    """What `inspect_model` found; ``parameters`` counts the elements of all constants."""

    path: str
    parameters: int
    entries: tuple[Inspected, ...]
    others: tuple[Inspected, ...]


def inspect_model(model: ModelLike, constant_inputs: bool, progress: Progress) -> Inspection:
    """Find and measure every linear map of a model, as it is, without simplifying it.

    A weight and the adapter beside it are one map.

    Raises:
        InputError: the model cannot be read.
    """
    stages = Stages(progress)
    with stages("load"):
        source = load(model)
    graph = source.model
    constants = Constants(graph, constant_inputs)
    with stages("find"):
        total = elements(graph)
        adapted = merge_adapters(graph, constants, all_forms(), Spool())
        finding = find(graph, constants, all_forms())
    wanted = [group for group in finding.groups if 0 not in group.shape]
    with stages("measure", sum(group.matrix.size for group in wanted)) as advance:
        measured, _ = measure(wanted, Statistics(), advance)
    return Inspection(
        source.name,
        total,
        tuple(_entries(finding, measured, adapted)),
        tuple(_others(graph, finding, constants, total)),
    )


def _entries(finding: Finding, measured: dict[Group, Spectrum], adapted: Merged) -> list[Inspected]:
    group_of = {m.site: group for group in finding.groups for m in group.members}
    rows = []
    for entry in finding.entries:
        if isinstance(entry, Refused):
            refusal = entry.refusal
            rows.append(
                Inspected(
                    node_name(entry.node),
                    entry.form.name,
                    entry.form.ops,
                    refusal.weight,
                    refusal.shape,
                    refusal.size,
                    None,
                    (),
                    refusal.reason,
                )
            )
            continue
        rows.extend(_site(site, group_of[site], measured, adapted) for site in entry.sites)
    return rows


def _site(site: Site, group: Group, measured: dict[Group, Spectrum], adapted: Merged) -> Inspected:
    found = measured.get(group)
    reasons = [] if site.form.default else [f"off by default; {named('ops', site.form.ops)}"]
    adapter = adapted.nodes.get(site.node, 0)
    if adapter:
        reasons.append(f"with its adapter, W + s·A·B, {adapter:,} parameters beside W")
    elif node_name(site.node) in adapted.left:
        reasons.append(f"its adapter stays beside it: {adapted.left[node_name(site.node)]}")
    if found is not None and not found.finite:
        reasons.append("holds NaN or Inf")
    if group.others:
        reasons.append(f"its constant is also read by {listed(group.others, 2)}")
    return Inspected(
        node_name(site.node),
        f"{site.form.name} + adapter" if adapter else site.form.name,
        site.form.ops,
        site.operand.name,
        (site.slices, site.m, site.n),
        site.operand.size + adapter,
        break_even(site.m, site.n),
        tuple(found.needed(e) for e in ENERGIES) if found is not None and found.finite else (),
        "; ".join(reasons),
    )


def _others(model: ir.Model, finding: Finding, constants: Constants, total: int) -> list[Inspected]:
    """Constants with at least 1 % of the parameters that no listed node reads."""
    known = {
        entry.refusal.weight if isinstance(entry, Refused) else entry.sites[0].operand.name
        for entry in finding.entries
    }
    values = [v for graph in all_graphs(model) for v in graph.initializers.values()]
    values += [n.outputs[0] for n in all_nodes(model) if n.op_type == "Constant" and n.outputs]
    rows = []
    for value in values:
        found = constants.resolve(value)
        if found is None or value.name in known:
            continue
        size = found.size
        if not size or size < _LARGE * total:
            continue
        readers = list(constants.readers(value))
        names = [node_name(node) for node, _ in readers if node is not None]
        kinds = dict.fromkeys(
            "the graph's outputs" if node is None else f"{node.op_type} (input {index})"
            for node, index in readers
        )
        reason = f"read by {', '.join(kinds) or 'nothing'}, which is no linear map that is handled"
        rows.append(
            Inspected(
                listed(names, 2), "", "", value.name or "", found.shape, size, None, (), reason
            )
        )
    return rows
