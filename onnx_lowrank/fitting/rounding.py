"""Round: weights and pairs of a finished model become integers in blocks.

Rounding comes last, behind refit and healing, so that what those did is rounded once.  Weights are
rounded by GPTQ on the moments of their inputs, to nearest where there are none; the second factor
of a pair is fitted to what became of the first one.  Where a bias corrects the error of a pair at
the mean of the inputs it corrects that of a rounding too.  A search rounds in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_lowrank.fitting.rounded_maps import Width, inputs_of
from onnx_lowrank.fitting.rounded_weights import (
    centre_of,
    moments_of,
    round_correction,
    round_first,
    round_second,
    round_weight,
    shift_by,
)
from onnx_lowrank.fitting.statistics import Statistics
from onnx_lowrank.graph.elements import elements_of, install, put_elements
from onnx_lowrank.graph.spool import Spool
from onnx_lowrank.maps.choice import Choice
from onnx_lowrank.maps.find import Group
from onnx_lowrank.maps.format_writer import Correction, FormatWriter
from onnx_lowrank.maps.formats import SMALLEST, Format
from onnx_lowrank.maps.forms import Site
from onnx_lowrank.maps.pair import shifted
from onnx_lowrank.maps.tables import write_table
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.blocks import Blocks
from onnx_lowrank.numerics.correction import felt_error
from onnx_lowrank.numerics.fisher import PLAIN, Fisher
from onnx_lowrank.numerics.gptq import Inverse
from onnx_lowrank.numerics.moments import Moments
from onnx_lowrank.progress import Advance

__all__ = [
    "Opened",
    "Postponed",
    "Rounded",
    "close_rounding",
    "round_weights",
]

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Rounded:
    """What became of one group's weights.

    Attributes:
        bytes: of its integers, scales and correction; a shared first factor counts once.
        error: relative error that the rounding adds, ``√(E‖x (W − Ŵ)‖² / E‖x W‖²)`` on the samples
            that it was made with, W the weight or the product of the pair; without samples of the
            weight itself.  Of several maps the root of the sum of their squares.
    """

    bytes: int
    error: float


@dataclass(frozen=True, eq=False)
class Postponed:
    """Products that multiply with what codes stand for, until their inputs are rounded too.

    Attributes:
        nodes: the products.
        codes: of their weight.
        form: its format.
        scales: name of the constant that their scales are until then; empty where they are none.
    """

    nodes: list[ir.Node]
    codes: Blocks
    form: Format
    scales: str = ""

    def closed(self, model: ir.Model, writer: FormatWriter) -> Postponed:
        """With the scales that there are now, and a constant that the products read."""
        if not self.scales:
            return self
        codes = self.codes
        scales = elements_of(model, self.scales).reshape(codes.scales.shape).astype(np.float32)
        codes = replace(codes, scales=scales)
        writer.close(self.nodes, codes)
        return replace(self, codes=codes, scales="")


@dataclass(frozen=True, eq=False)
class PostponedTable:
    """A table that is gathered as floats until its nodes may become others.

    Attributes:
        sites: the Gathers.
        codes: of its transpose.
        form: its format.
    """

    sites: tuple[Site, ...]
    codes: Blocks
    form: Format

    def put_floats(self, spool: Spool) -> None:
        """Put what the codes stand for in the table's place."""
        table = self.sites[0].matrix
        rows = np.asarray(self.codes.values().T[None], table.tensor.dtype.numpy())
        put_elements(table.root, np.ascontiguousarray(table.layout.inverse().apply(rows)), spool)


@dataclass(eq=False)
class Opened:
    """What healing goes on with, and what is left as floats until then, or longer.

    Attributes:
        corrections: nodes of the pairs that correct roundings, which are floats until then.
        scales: of codes that are written, by name, and the nodes that multiply with what they
            stand for.
        products: those that round their inputs in every run, or are one node with their codes: no
            derivative goes through that, but through what stands there until then.
        tables: those that one node gathers, for the same reason.
        static: those whose inputs have ranges that are known before; they wait until the graph has
            its shape (see `onnx_lowrank.fitting.static`).
    """

    corrections: dict[Group, Correction] = field(default_factory=dict)
    scales: dict[str, list[ir.Node]] = field(default_factory=dict)
    products: list[Postponed] = field(default_factory=list)
    static: list[Postponed] = field(default_factory=list)
    tables: list[PostponedTable] = field(default_factory=list)


def round_weights(
    model: ir.Model,
    choices: Mapping[Group, Choice],
    own: Mapping[Group, Group],
    statistics: Statistics,
    spool: Spool,
    advance: Advance,
    *,
    heals: bool = False,
    widths: Mapping[Group, Width] | None = None,
) -> tuple[dict[Group, Rounded], Opened]:
    """Round the weights of groups with a format.

    Args:
        model: with pairs in it, of opset 21 or newer; it is changed.
        choices: of the groups that were found in the model before it had pairs.
        own: the same groups of this model.
        statistics: moments of the inputs of the groups, as they were before.
        spool: where the integers wait until they are saved.
        advance: called with the number of elements of every group that is done.
        heals: whether healing goes on with scales and with the pairs that correct roundings.
        widths: what is left of the widths in front of groups that became narrower.

    Returns:
        what became of the weights, and what healing goes on with.
    """
    opened, widths = Opened(), widths or {}
    writer = _Writer(FormatWriter(model, spool), opened, heals)
    firsts: dict[ir.Node, _First] = {}
    found = {}
    for group, choice in choices.items():
        if choice.format is None or choice.format.table:
            continue
        inputs = _Inputs(
            moments_of(statistics, group),
            centre_of(statistics, group),
            statistics.felt.get(group, PLAIN),
        )
        nodes = [member.site.node for member in own[group].members]
        if group.maps:
            made, width = [], widths.get(group)
            for known, now in zip(group.maps, own[group].maps, strict=True):
                read = inputs_of(statistics, known, width if known is group.maps[-1] else None)
                alone = [member.site.node for member in now.members]
                one, shift = _write_map(writer, alone, choice.format, _Inputs(*read, PLAIN))
                made.append(one)
                _shift(model, now, shift, spool)
            found[group] = _together(made)
            advance(group.matrix.size)
            continue
        if choice.rank is None:
            found[group], shift, correction = _write_dense(writer, nodes, choice.format, inputs)
            if correction is not None and heals:
                opened.corrections[group] = correction
        else:
            found[group], shift = _write_pair(writer, nodes, choice.format, inputs, firsts)
        _shift(model, own[group], shift, spool)
        advance(group.matrix.size)
    return found, opened


def close_rounding(model: ir.Model, opened: Opened, statistics: Statistics, spool: Spool) -> None:
    """Round what `round_weights` left as floats.

    Args:
        model: that holds it; it is changed.
        opened: what it left.
        statistics: moments of the inputs of the groups.
        spool: where the integers wait until they are saved.
    """
    writer = FormatWriter(model, spool)
    for group, nodes in opened.corrections.items():
        moments = moments_of(statistics, group)
        inverse = None if moments is None else Inverse(moments)
        a, b = (np.array(writer.weight(own[0]).numpy()) for own in (nodes.inner, nodes.outer))
        first, second = round_correction(a @ b, a, b, moments, inverse)
        writer.put(nodes.inner, first, nodes.form)
        writer.put(nodes.outer, second, nodes.form)
    opened.static = [own.closed(model, writer) for own in opened.static]
    for own in (own.closed(model, writer) for own in opened.products):
        writer.put(own.nodes, own.codes, own.form)
    for table in opened.tables:
        write_table(model, table.sites, table.codes, table.form, spool)


@dataclass(frozen=True, eq=False)
class _Writer:
    """Writes codes, or notes what waits.

    Attributes:
        formats: writes into the model.
        opened: takes what waits.
        heals: whether what healing cannot go through waits too, and scales are noted.
    """

    formats: FormatWriter
    opened: Opened
    heals: bool

    def put(self, nodes: list[ir.Node], codes: Blocks | Array, form: Format) -> None:
        waits = form.static or (self.heals and (form.dynamic or form.fused))
        if not waits or not isinstance(codes, Blocks):
            scales = self.formats.put(nodes, codes, form)
            if self.heals and scales is not None:
                self.opened.scales[scales.name or ""] = nodes
            return
        queue = self.opened.static if form.static else self.opened.products
        name = ""
        if self.heals and form.channels:  # one scale of all columns would become many
            name = self.formats.open(nodes, codes).name or ""
            self.opened.scales[name] = nodes
        else:
            self.formats.put(nodes, codes.values())
        queue.append(Postponed(nodes, codes, form, name))


@dataclass(frozen=True, eq=False)
class _Inputs:
    """What is known of a group's inputs and outputs.

    Attributes:
        moments: of the inputs, about the centre; None without samples.
        centre: their mean, where a bias makes up for it.
        fisher: what is felt of the outputs.
    """

    moments: Moments | None
    centre: Float64 | None
    fisher: Fisher

    def relative(self, exact: Array, values: Array) -> float:
        """The relative error of outputs."""
        whole = felt_error(exact, self.moments)
        if self.centre is not None:
            whole += float(np.square(self.centre @ exact).sum())
        off = felt_error(exact - values, self.moments)
        return math.sqrt(off / whole) if whole > 0.0 else 0.0


@dataclass(frozen=True, eq=False)
class _First:
    """A first factor ``A[m, k]`` as it was, and what its codes stand for."""

    exact: Array
    values: Array


def _shift(model: ir.Model, own: Group, shift: Float64 | None, spool: Spool) -> None:
    """Add to the bias of a group of the model."""
    if shift is None:
        return
    assert own.bias is not None
    name = own.bias.root.name or ""
    install(model, {name: shifted(elements_of(model, name), shift)}, spool)


def _together(parts: Sequence[Rounded]) -> Rounded:
    """Of several maps one behind the other: errors add up as those of different rows do."""
    error = math.sqrt(sum(part.error**2 for part in parts))
    return Rounded(sum(part.bytes for part in parts), error)


def _write_map(
    writer: _Writer, nodes: list[ir.Node], form: Format, inputs: _Inputs
) -> tuple[Rounded, Float64 | None]:
    """One of the maps around a width; what is narrower than a block stays floats."""
    weight = writer.formats.weight(nodes[0])
    if weight.shape[0] < SMALLEST:
        return Rounded(weight.tensor.nbytes, 0.0), None
    found, shift, _ = _write_dense(writer, nodes, form, inputs)
    return found, shift


def _write_dense(
    writer: _Writer, nodes: list[ir.Node], form: Format, inputs: _Inputs
) -> tuple[Rounded, Float64 | None, Correction | None]:
    matrix = np.array(writer.formats.weight(nodes[0]).numpy())
    found = round_weight(matrix, form, inputs.moments, inputs.fisher)
    values = found.values()
    correction, products = None, nodes
    if found.correction is not None:
        first, second = found.correction
        own = form.corrected_by
        if writer.heals:
            correction = writer.formats.correct(nodes, first.values(), second.values(), own)
        else:
            correction = writer.formats.correct(nodes, first, second, own)
        products = list(correction.products)
    writer.put(products, found.codes, form)
    rounded_as = Rounded(found.bytes(form), inputs.relative(matrix, values))
    return rounded_as, shift_by(inputs.centre, matrix, values), correction


def _write_pair(
    writer: _Writer,
    nodes: list[ir.Node],
    form: Format,
    inputs: _Inputs,
    firsts: dict[ir.Node, _First],
) -> tuple[Rounded, Float64 | None]:
    """Both factors; a first one that several groups share is rounded with the first of them."""
    moments = inputs.moments
    heads = [writer.formats.head(node) for node in nodes]
    size = 0
    if heads[0] not in firsts:
        first = writer.formats.weight(heads[0]).numpy()
        codes = round_first(first, form, moments)
        size = form.stored(codes)
        known = _First(np.array(first, np.float64), codes.values())
        writer.put(heads, codes, form)
        firsts |= dict.fromkeys(heads, known)
    exact, inner = firsts[heads[0]].exact, firsts[heads[0]].values
    second = writer.formats.weight(nodes[0]).numpy().reshape(exact.shape[1], -1)
    found = round_second(exact, inner, second, form, moments)
    writer.put(nodes, found, form)
    values = found.values() if isinstance(found, Blocks) else found
    product, stored = exact @ second, inner @ values
    size += form.stored(found) if isinstance(found, Blocks) else found.nbytes
    rounded_as = Rounded(size, inputs.relative(product, stored))
    return rounded_as, shift_by(inputs.centre, product, stored)
