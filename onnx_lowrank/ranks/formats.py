"""Formats: in which numbers the weights of a layer may be stored, beside its rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnx_lowrank.errors import named
from onnx_lowrank.maps.block_tables import in_blocks
from onnx_lowrank.maps.choice import STAYS, Choice, Spectrum
from onnx_lowrank.maps.dynamic import rounds_inputs
from onnx_lowrank.maps.find import Finding, Group
from onnx_lowrank.maps.formats import (
    SMALLEST,
    Format,
    block_for,
    correctable,
    first_opset,
    folded,
    fusable,
    no_format,
    products,
)
from onnx_lowrank.maps.selection import Selection
from onnx_lowrank.maps.tables import Tables, table_formats
from onnx_lowrank.numerics.blocks import Bits
from onnx_lowrank.ranks.format_wishes import KINDS, OPS, FormatWishes

__all__ = [
    "ONLY_FLOATS",
    "Formats",
    "by_map",
    "formats_of",
    "formatted",
    "needed_opset",
    "unformatted",
    "without_opset",
]

# Of each kind: formats of a dense weight, the first one where there is no budget to choose by, and
# of the factors of a pair.
_DENSE: Mapping[str, tuple[Format, ...]] = {
    "8": (Format(8, 128),),
    "4": (Format(4, 32), Format(4, 16), Format(4, 64), Format(4, 128)),
}
# Of what is narrower than a block.
_NARROW = Format(8, 0)
_PAIRS: Mapping[str, Format] = {"8": Format(8, 128), "4": Format(4, 32)}
# Blocks of 4 bits whose rounding may be corrected, and by which ranks.
_CORRECTED, _RANKS = (32, 128), (4, 8, 16, 32)


@dataclass(frozen=True)
class Formats:
    """The formats that one layer may have.

    Attributes:
        dense: where it stays dense; None for floats.  Without a budget it gets the first one.
        pairs: of the factors of a pair, in the same way.
    """

    dense: tuple[Format | None, ...] = (None,)
    pairs: tuple[Format | None, ...] = (None,)

    @property
    def blocks(self) -> Format | None:
        """A format of a dense weight that is multiplied with floats; None without one."""
        plain = (form for form in self.dense if form is not None and not form.integers)
        return next(plain, None)

    @property
    def integers(self) -> Format | None:
        """The format whose inputs are rounded too; None without one."""
        every = (form for form in (*self.dense, *self.pairs) if form is not None)
        return next((form for form in every if form.integers), None)

    def joined(self, other: Formats) -> Formats:
        """Those of both."""
        dense = dict.fromkeys([*self.dense, *other.dense])
        return Formats(tuple(dense), tuple(dict.fromkeys([*self.pairs, *other.pairs])))


ONLY_FLOATS = Formats()
"""Of a layer that has no format."""


def formats_of(
    finding: Finding,
    measured: Mapping[Group, Spectrum],
    tables: Tables,
    model: ir.Model,
    wanted: FormatWishes,
    selection: Selection,
) -> tuple[dict[Group, Formats], dict[Group, str]]:
    """The formats of every layer and table that may have one, and why other layers have none.

    Args:
        finding: the linear maps.
        measured: what is known of their numbers.
        tables: of embeddings.
        model: the model.
        wanted: which formats.
        selection: which nodes may be changed at all.
    """
    found: dict[Group, Formats] = {}
    left: dict[Group, str] = {}
    for group in (*finding.groups, *finding.off):
        if group.members[0].site.form.indices:
            continue  # a table
        if group.others and group.matrix.name in tables.groups:
            continue  # it has the format of the table that it reads
        why = _left(group, measured, model, wanted, selection)
        if why is None:
            found[group] = _of_product(group, wanted)
        else:
            left[group] = why
    for group in finding.off:
        if group in found:
            found[group] = dataclasses.replace(found[group], pairs=(None,))
    if "gather" in wanted.ops and wanted.blocks:
        for group in tables.groups.values():
            kinds = wanted.kinds_of(group.matrix.name)
            fused = wanted.fused and in_blocks(tables.sites[group.matrix.name], model.graph)
            found[group] = Formats(_of_table(group.shape[2], kinds, fused=fused))
    return found, left


def _of_table(width: int, kinds: Sequence[str], *, fused: bool) -> tuple[Format | None, ...]:
    """The formats of a table; those of one node each where all kinds can have them."""
    own: list[Format | None] = []
    bits: dict[str, Bits] = {"8": 8, "4": 4}
    fused = fused and all(table_formats(width, bits[k], fused=True) for k in kinds if k in bits)
    for kind in kinds:
        own += table_formats(width, bits[kind], fused=fused) if kind in bits else [None]
    if {"8", "4"}.issubset(kinds):
        own += table_formats(width, 6, fused=fused)  # between the two
    return tuple(dict.fromkeys(own))


def _left(
    group: Group,
    measured: Mapping[Group, Spectrum],
    model: ir.Model,
    wanted: FormatWishes,
    selection: Selection,
) -> str | None:
    """Why the weights of a group stay floats; None where they need not."""
    for member in (member for own in group.alone for member in own.members):
        reason = selection.reason(member.site.node)
        if reason is not None:
            return reason
        form = member.site.form
        if form.ops in OPS and form.ops not in wanted.ops:
            return f"{named('quantize_ops')} does not name {form.ops}"
    why = no_format(group, model)
    if why is not None:
        return why
    if not wanted.blocks and not _multiplies(group):
        return "only MatMul, and Gemm without transA, alpha and beta, multiply integers there"
    known = measured.get(group)
    for own in group.alone:
        seen = own is group and known is not None
        finite = known.finite if seen and known else bool(np.isfinite(own.matrix.numpy()).all())
        if not finite:
            return f"{own.matrix.name} holds NaN or Inf"
    return None


def _of_product(group: Group, wanted: FormatWishes) -> Formats:
    """The formats of a product with a weight, those first that are taken without a choice."""
    _, m, n = group.shape
    dense: list[Format | None] = []
    pairs: list[Format | None] = []
    fused = wanted.fused and fusable(group)
    for kind in _kinds(group, wanted):
        if kind == "fp32":
            dense.append(None)
            pairs.append(None)
            continue
        if kind == "8" and wanted.integers is not None and _multiplies(group):
            dense.append(wanted.integers)
            pairs.append(wanted.integers)
        if not wanted.blocks:
            continue
        # The least and the largest weight of a block are seldom as far from 0; of 8 bits it matters
        # little.
        zeros = kind == "4" and (wanted.zeros or folded(group))
        plain = [
            dataclasses.replace(f, block=block_for(f.block, group), fused=fused, zeros=zeros)
            for f in _DENSE[kind]
        ]
        if m < SMALLEST and not group.maps:  # of a convolution: a few weights of each output
            plain = [_NARROW]
        dense += plain
        pairs.append(dataclasses.replace(_PAIRS[kind], fused=fused, zeros=zeros))
        if kind == "4" and correctable(group) and m >= SMALLEST:
            dense += [
                dataclasses.replace(form, correction=rank)
                for form in plain
                if form.block in _CORRECTED
                for rank in _RANKS
                if 4 * rank <= min(m, n)
            ]
    # Narrower maps are stored in the same ways.
    return Formats(
        tuple(dict.fromkeys(dense)), tuple(dict.fromkeys(dense if group.maps else pairs))
    )


def by_map(formats: Mapping[Group, Formats]) -> dict[Group, Formats]:
    """Formats of every map that is stored by itself: those around a width have the same ones.

    Args:
        formats: of groups.
    """
    found: dict[Group, Formats] = {}
    for group, own in formats.items():
        found |= dict.fromkeys(group.maps, Formats(own.dense)) if group.maps else {group: own}
    return found


def _kinds(group: Group, wanted: FormatWishes) -> tuple[str, ...]:
    """The kinds that a group may have; all its maps have the same."""
    every = {kind for own in group.alone for kind in wanted.kinds_of(own.matrix.name)}
    return tuple(kind for kind in KINDS if kind in every)


def _multiplies(group: Group) -> bool:
    """Whether the nodes of a group can multiply integers."""
    nodes = [member.site.node for own in group.alone for member in own.members]
    return products(group) and rounds_inputs(nodes)


def needed_opset(formats: Mapping[Group, Formats]) -> int:
    """The first opset that has all operators of some formats."""
    return max(
        (
            first_opset(group, form)
            for group, own in formats.items()
            for form in (*own.dense, *own.pairs)
            if form is not None
        ),
        default=1,
    )


def without_opset(formats: Mapping[Group, Formats], opset: int) -> dict[Group, Formats]:
    """The formats that an opset has; what is left with none but floats is left out.

    Args:
        formats: of layers and tables.
        opset: of a model that cannot be raised.
    """

    def had(group: Group, forms: tuple[Format | None, ...]) -> tuple[Format | None, ...]:
        return tuple(form for form in forms if form is None or first_opset(group, form) <= opset)

    found = {}
    for group, own in formats.items():
        rest = Formats(had(group, own.dense), had(group, own.pairs))
        if any(rest.dense):
            found[group] = rest
    return found


def formatted(
    choices: Mapping[Group, Choice],
    formats: Mapping[Group, Formats],
    left: Mapping[Group, str],
    off: Collection[Group] = (),
    *,
    smallest: bool = False,
) -> dict[Group, Choice]:
    """The choices of ranks with the first format of each layer, or why it has none.

    Args:
        choices: without formats.
        formats: of layers and tables.
        left: why others have none.
        off: layers of forms that are off.
        smallest: whether a pair that is stored in no fewer bytes than the whole layer gives way.
    """
    found = {}
    for group, choice in choices.items():
        if choice.excluded:
            found[group] = choice
        elif group in formats:
            own = formats[group]
            form = own.dense[0] if choice.rank is None else own.pairs[0]
            found[group] = _with(choice, form)
            if not smallest or choice.rank is None:
                continue
            whole = _with(dataclasses.replace(choice, rank=None, energy=None), own.dense[0])
            if whole.bytes(group) <= found[group].bytes(group):
                why = f"dense: in {own.dense[0] or 'floats'} it is no larger than a pair in {form}"
                found[group] = dataclasses.replace(whole, reason=f"{why} of rank {choice.rank}")
        else:
            found[group] = unformatted(group, choice, left)
    for group, own in formats.items():
        table = group.members[0].site.form.indices
        if group not in choices and (table or group in off):
            form = own.dense[0]
            why = "its rows are not factored" if table else "as it is"
            found[group] = (
                _with(Choice(None, why), form)
                if table or form is None
                else Choice(None, f"weights in {form}", format=form)
            )
    for group in off:
        if group in left:
            found[group] = Choice(None, f"{STAYS}{left[group]}")
    return found


def unformatted(group: Group, choice: Choice, left: Mapping[Group, str]) -> Choice:
    """A choice with the reason why its weights stay floats, where that says more."""
    if group not in left or left[group] == choice.reason:
        return choice
    why = f"{choice.reason}; {STAYS}{left[group]}"
    return dataclasses.replace(choice, reason=why)


def _with(choice: Choice, form: Format | None) -> Choice:
    if form is None:
        return choice
    return dataclasses.replace(choice, format=form, reason=f"{choice.reason}; weights in {form}")
