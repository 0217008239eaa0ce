"""Inspect: every linear map of a model, the ranks it needs, and what is not handled.

With samples the ranks are those that the layers need for what they multiply, and budgets for the
whole model are tried; nothing is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from onnx_lowrank.compression.context import Context
from onnx_lowrank.compression.figures import shown_spectrum
from onnx_lowrank.compression.inlining import with_weights_in_sight
from onnx_lowrank.compression.outlook import Looked, Outlook, look_ahead, place_of
from onnx_lowrank.compression.places import read_files, side_outputs
from onnx_lowrank.compression.settings import Settings
from onnx_lowrank.compression.stages import stages_before
from onnx_lowrank.errors import InputError, named
from onnx_lowrank.files import Output, check_outputs, workspace
from onnx_lowrank.fitting.spectra import measure
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.graph.load import LoadedModel, ModelLike, load
from onnx_lowrank.graph.scopes import module_of
from onnx_lowrank.graph.spool import Spool
from onnx_lowrank.graph.walk import all_graphs, all_nodes, elements, node_name
from onnx_lowrank.maps.adapters import Merged, merge_adapters
from onnx_lowrank.maps.choice import EnergyOf, Spectrum
from onnx_lowrank.maps.find import (
    Finding,
    Group,
    Refused,
    find,
)
from onnx_lowrank.maps.forms import Site, all_forms, chosen_forms
from onnx_lowrank.maps.forms.inner import InnerForm
from onnx_lowrank.numerics.ranks import break_even
from onnx_lowrank.phrases import listed
from onnx_lowrank.progress import Progress, Stages
from onnx_lowrank.ranks.recipe import Recipe
from onnx_lowrank.ranks.recipe_file import from_metadata
from onnx_lowrank.runtime.rehearsal import with_custom_ops
from onnx_lowrank.runtime.session import OrtLog
from onnx_lowrank.schema.json_report import File, JsonReport, Origin, tool_name
from onnx_lowrank.schema.layer import LayerSpectrum
from onnx_lowrank.schema.report import Calibration

__all__ = [
    "ENERGIES",
    "Inspected",
    "Inspection",
    "inspect_model",
]

ENERGIES = (0.8, 0.9, 0.95, 0.99)
_LARGE = 0.01


@dataclass(frozen=True)
class Inspected:
    """One linear map, or a large constant that none reads.

    Attributes:
        name: the node, or for a constant that is no linear map, the nodes that read it.
        form: how it stands in the graph; "" for a constant that is no linear map.
        ops: the name by which the user chooses the form.
        weight: the constant.
        shape: as (e, m, n) for a linear map, else the constant's own.
        parameters: its elements.
        break_even: the rank at which a pair is as large; None where it cannot be factored.
        ranks: rank at each of `ENERGIES`; empty where it cannot be factored.
        reason: why it is not factored, or is not by default; "" otherwise.
        op_type: the node's operator; "" for a constant that is no linear map.
        scope: the module of the network around the node, where torch's exporter wrote it; else
            None.
        energy_of: of what the ranks hold the energy: "weight", its squared singular values, or
            "output", the second moments of ``x W`` over the samples.
        half: share of the energy that a pair of half the parameters holds; None where there is no
            such pair.
        spectrum: what its ranks hold; None where it cannot be factored.
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
    op_type: str = ""
    scope: str | None = None
    energy_of: EnergyOf = "weight"
    half: float | None = None
    spectrum: LayerSpectrum | None = None


@dataclass(frozen=True)
class Inspection(JsonReport):
    """What `inspect_model` found; also the schema of the JSON report of ``inspect``.

    Attributes:
        tool: name and version of the program.
        path: the model.
        input: its file.
        parameters: elements of all its constants, with samples of the simplified model's.
        energies: what `Inspected.ranks` hold.
        entries: the linear maps, in the order of the graph.
        others: the large constants that none of them reads.
        calibration: the samples; None without.
        budgets: what budgets for the whole model would give; none without samples.
        missed: budgets that cannot be had, and why.
        notes: what else the user should know.
        origin: what it takes to do it again; None where it was not kept.
        recipe: how the model was made, where its metadata say that a run of this tool made it.
    """

    tool: str
    path: str
    input: File
    parameters: int
    energies: tuple[float, ...]
    entries: tuple[Inspected, ...]
    others: tuple[Inspected, ...]
    calibration: Calibration | None = None
    budgets: tuple[Outlook, ...] = ()
    missed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    origin: Origin | None = None
    recipe: Recipe | None = None


def inspect_model(
    model: ModelLike,
    settings: Settings,
    shares: Sequence[float],
    progress: Progress,
    log: OrtLog,
    outputs: Sequence[Output] = (),
) -> Inspection:
    """Find and measure every linear map of a model: as it is, or with samples as a run sees it.

    A weight and the adapter beside it are one map.

    Args:
        model: the model; it is not changed.
        settings: what a run would use; without samples only what is chosen counts.
        shares: budgets to try, as shares of the linear parameters.
        progress: shows the stages.
        log: collects ONNX Runtime's messages.
        outputs: what the caller writes of the result, checked before the work.

    Raises:
        InputError: the model cannot be read, or the samples do not fit it.
    """
    stages = Stages(progress)
    without = settings.data is settings.calibration is settings.load_stats is None
    known = ("load",) if without else (*stages_before(settings), *(["budgets"] if shares else []))
    stages.plan((*known, "find all", "measure all"))
    with stages("load"):
        source = load(model)
        _ = source.described  # its digest is of the file that was read
    check_outputs((*side_outputs(settings), *outputs), read_files(source, settings))
    if without:
        shown = with_weights_in_sight(source, constant_inputs=settings.constant_inputs)
        return _inspection(source, shown.model, settings, stages, Looked())
    with workspace(None) as folder, with_custom_ops(settings.custom_ops):
        context = Context(source, settings, folder, stages, log)
        looked = look_ahead(context, shares)
        assert looked.prepared is not None
        return _inspection(source, looked.prepared.model, settings, stages, looked)


def _inspection(
    source: LoadedModel, graph: ir.Model, settings: Settings, stages: Stages, looked: Looked
) -> Inspection:
    """Measure what was found, with the moments that are known."""
    constants = Constants(graph, settings.constant_inputs)
    with stages("find all"):
        total = elements(graph)
        adapted = merge_adapters(graph, constants, all_forms(), Spool())
        own = {form.name for form in chosen_forms(settings.ops)}
        forms = all_forms()
        # Two maps are shown as one where the user asks for that.
        shown = [f for f in forms if not isinstance(f, InnerForm) or f.name in own]
        finding = find(graph, constants, forms, shown)
    fitted = looked.fitted
    # Every site is measured with its moments where it has some, else with its whole group.
    of = {
        m.site: fitted.get(place_of(m.site), group)
        for group in finding.groups
        for m in group.members
    }
    wanted = [group for group in dict.fromkeys(of.values()) if 0 not in group.shape]
    with stages("measure all", sum(group.matrix.size for group in wanted)) as advance:
        measured, _ = measure(wanted, looked.statistics, advance)
    recipe, notes = None, looked.notes
    try:
        recipe = from_metadata(source.model.metadata_props, source.name)
    except InputError as error:  # other tools may have changed them
        notes = (*notes, str(error))
    return Inspection(
        tool_name(),
        source.name,
        source.described,
        total,
        ENERGIES,
        tuple(_entries(finding, of, measured, settings, adapted)),
        tuple(_others(graph, finding, constants, total)),
        calibration=looked.calibration,
        budgets=looked.budgets,
        missed=looked.missed,
        notes=notes,
        recipe=recipe,
    )


def _entries(
    finding: Finding,
    of: Mapping[Site, Group],
    measured: Mapping[Group, Spectrum],
    settings: Settings,
    adapted: Merged,
) -> list[Inspected]:
    own = {m.site: group for group in finding.groups for m in group.members}
    chosen = {form.name for form in chosen_forms(settings.ops)}
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
                    entry.node.op_type,
                    module_of(entry.node),
                )
            )
            continue
        for site in entry.sites:
            reasons = []
            if site.form.name not in chosen:
                off = "off" if settings.ops else "off by default"
                reasons.append(f"{off}; {named('ops', site.form.ops)}")
            left_out = settings.selection.reason(site.node)
            if left_out is not None:
                reasons.append(left_out)
            adapter = adapted.nodes.get(site.node, 0)
            if adapter:
                reasons.append(f"with its adapter, W + s·A·B, {adapter:,} parameters beside W")
            elif node_name(site.node) in adapted.left:
                left = adapted.left[node_name(site.node)]
                reasons.append(f"its adapter stays beside it: {left}")
            found = measured.get(of[site])
            if found is not None and not found.finite:
                reasons.append("holds NaN or Inf")
            if own[site].others:
                reasons.append(f"its constant is also read by {listed(own[site].others, 2)}")
            if heads := own[site].heads:
                names = listed([repr(node_name(head.node)) for head in heads], 4)
                pair = f"is a pair of rank {site.m} already, with {names}"
                makes = "makes" if len(heads) == 1 else "make"
                reasons.append(pair if own[site].inner is None else f"{names} {makes} its width")
            if (why := finding.wide.get(node_name(site.node))) is not None:
                reasons.append(f"its width stays: {why}")
            rows.append(_site(site, own[site], found, "; ".join(reasons), adapter))
    return rows


def _site(site: Site, group: Group, found: Spectrum | None, reason: str, adapter: int) -> Inspected:
    row = Inspected(
        node_name(site.node),
        f"{site.form.name} + adapter" if adapter else site.form.name,
        site.form.ops,
        site.operand.name,
        (site.slices, site.m, site.n),
        (group.elements if group.heads else site.operand.size) + adapter,
        group.break_even if group.heads else break_even(site.m, site.n),
        (),
        reason,
        site.node.op_type,
        module_of(site.node),
    )
    if found is None or not found.finite or found.squares is None:
        return row
    return replace(
        row,
        ranks=tuple(found.needed(energy) for energy in ENERGIES),
        energy_of=found.of,
        half=found.held(half) if (half := group.largest(0.5)) else None,
        spectrum=shown_spectrum(found, (site.m, site.n), even=group.break_even),
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
        reason = f"read by {', '.join(kinds) or 'nothing'}, where no weight is factored"
        rows.append(
            Inspected(
                listed(names, 2), "", "", value.name or "", found.shape, size, None, (), reason
            )
        )
    return rows
