"""Carrying out a recipe: its layers found in a model, their ranks and formats checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from onnx_lowrank.errors import InputError, named
from onnx_lowrank.maps.choice import Choice, Joint
from onnx_lowrank.maps.dynamic import rounds_inputs
from onnx_lowrank.maps.find import Factorable, Finding, Group, Refused
from onnx_lowrank.maps.formats import (
    SMALLEST,
    Format,
    block_for,
    correctable,
    fusable,
    products,
    suited,
)
from onnx_lowrank.maps.forms import Site
from onnx_lowrank.maps.tables import Tables, table_formats
from onnx_lowrank.numerics.ranks import largest_rank
from onnx_lowrank.phrases import near_names
from onnx_lowrank.ranks.choose import settle
from onnx_lowrank.ranks.formats import Formats, formatted
from onnx_lowrank.ranks.prepared import Prepared
from onnx_lowrank.ranks.recipe import Recipe, RecipeLayer, labels_of, shape_of
from onnx_lowrank.ranks.strategy import Plan, Strategy

__all__ = ["FromRecipe", "formats_in", "formats_off_in", "ranks_of"]


@dataclass(frozen=True, eq=False)
class _Found:
    """A layer of a recipe in a model."""

    layer: RecipeLayer
    group: Group


def ranks_of(recipe: Recipe, finding: Finding, min_gain: float) -> dict[Group, RecipeLayer]:
    """What the recipe says of the groups that it names.

    Args:
        recipe: the recipe.
        finding: the linear maps of the model.
        min_gain: below 0 pairs may be larger than their weights.

    Raises:
        InputError: a layer does not exist, or is another one, or a rank cannot be had.
    """
    ranks: dict[Group, RecipeLayer] = {}
    for found in _found(recipe, finding):
        layer, group = found.layer, found.group
        other = ranks.setdefault(group, layer)
        if (other.rank, other.format) != (layer.rank, layer.format):
            raise InputError(
                f"{recipe.label}: layer {layer.name!r} reads the weight of {other.name!r}: "
                f"expected the same rank and format, {_fate(other)}, got {_fate(layer)}"
            )
    together = {name: own for own in recipe.shared for name in own.layers}
    for group, layer in ranks.items():
        if layer.rank is not None and layer.name not in together:
            share = max(1.0, 1.0 - min_gain) - (1.0 if group.others else 0.0)
            _check_rank(recipe, layer, group.largest(share))
    for joint in _joints(recipe, ranks):
        groups, (first, *others) = joint.groups, [ranks[group] for group in joint.groups]
        for layer in others:
            if layer.format != first.format:
                raise InputError(
                    f"{recipe.label}: layer {layer.name!r} shares its first factor with "
                    f"{first.name!r}: expected format {first.format or 'floats'}, got "
                    f"{layer.format or 'floats'}"
                )
            if layer.rank != first.rank:
                raise InputError(
                    f"{recipe.label}: layer {layer.name!r} shares its first factor with "
                    f"{first.name!r}: expected rank {first.rank}, got {layer.rank}"
                )
        if first.rank is not None:
            m, widths = groups[0].shape[1], [group.shape[2] for group in groups]
            most = largest_rank(m, sum(widths), max(1.0, 1.0 - min_gain))
            _check_rank(recipe, first, min(most, *widths))
    return ranks


def formats_in(
    recipe: Recipe,
    ranks: Mapping[Group, RecipeLayer],
    formats: Mapping[Group, Formats],
    left: Mapping[Group, str],
) -> tuple[dict[Group, Formats], dict[Group, str]]:
    """The formats of a recipe in place of those of the settings, and why others have none.

    Args:
        recipe: the recipe.
        ranks: its layers, by group.
        formats: of every layer that may have some.
        left: why the others have none.

    Returns:
        the only format of each layer, and the reasons.

    Raises:
        InputError: a layer cannot have its format.
    """
    found: dict[Group, Formats] = {}
    floats = dict(left)
    for group, layer in ranks.items():
        wanted = layer.format
        if wanted is None:
            if group in formats:
                floats[group] = "the recipe has no format for it"
            continue
        where = f"{recipe.label}: layer {layer.name!r}: format"
        if group not in formats:
            why = left.get(group, f"{named('weights')} is not among the settings of the recipe")
            raise InputError(f"{where}: {why}")
        if wanted.table or group.members[0].site.form.indices:
            found[group] = _of_table(group, layer, where, formats[group])
            continue
        _check_format(wanted, layer, group, where)
        found[group] = Formats((wanted,), (wanted,))
    return found, floats


def _check_integers(group: Group, wanted: Format, where: str) -> None:
    """Raise where products of a group cannot round their inputs, or not in such a format."""
    nodes = [member.site.node for own in group.alone for member in own.members]
    if not products(group) or not rounds_inputs(nodes):
        raise InputError(f"{where}: a Gemm with transA, alpha or beta does not round its inputs")
    if (wanted.bits, wanted.block, wanted.correction) != (8, 0, 0):
        raise InputError(
            f"{where}: expected 8 bits, a block of 0 and no correction where inputs are rounded, "
            f"got {wanted.bits} bits, a block of {wanted.block} and rank {wanted.correction}"
        )


def _check_format(wanted: Format, layer: RecipeLayer, group: Group, where: str) -> None:
    """Raise InputError where a weight cannot have a format."""
    if wanted.bits == 6:
        raise InputError(f"{where}: 6 bits are for tables; expected 4 or 8, got 6")
    corrected = layer.rank is None and correctable(group)
    most = min(group.shape[1:]) if corrected else 0
    if not 0 <= wanted.correction <= most:
        raise InputError(
            f"{where}: expected a correction of a rank from 0 to {most}, got {wanted.correction}"
        )
    if wanted.zeros and (wanted.bits != 4 or wanted.integers):
        raise InputError(f"{where}: zero points are for 4 bits and inputs in floats")
    if wanted.integers:
        _check_integers(group, wanted, where)
        return
    if not wanted.signed or not wanted.channels:
        raise InputError(f"{where}: expected signed integers in blocks, each with its own scale")
    if wanted.fused and not fusable(group):
        raise InputError(f"{where}: the layer cannot be MatMulNBits; expected fused false")
    if not wanted.block and wanted.bits == 8 and group.shape[1] < SMALLEST and not group.maps:
        return
    block = wanted.block if layer.rank is not None else block_for(wanted.block, group)
    if block != wanted.block or block & (block - 1) or block < SMALLEST:
        raise InputError(
            f"{where}: expected a block that is a power of two from {SMALLEST} to "
            f"{suited(1 << 30, max(own.shape[1] for own in group.alone))}, got {wanted.block}"
        )


def formats_off_in(
    recipe: Recipe,
    finding: Finding,
    tables: Tables,
    formats: Mapping[Group, Formats],
    left: Mapping[Group, str],
) -> dict[Group, Formats]:
    """The formats that a recipe has for tables and layers of forms that are off.

    Args:
        recipe: the recipe.
        finding: the linear maps of the model.
        tables: of the model.
        formats: of every layer that may have some.
        left: why the others have none.

    Raises:
        InputError: one cannot have its format.
    """
    labels = labels_of([entry.node for entry in finding.entries])
    site_of = {labels[e.node]: e.site for e in finding.entries if isinstance(e, Refused)}
    group_of = {m.site: group for group in tables.groups.values() for m in group.members}
    off = {m.site: group for group in finding.off for m in group.members}
    found: dict[Group, Formats] = {}
    for layer in recipe.layers:
        site = site_of.get(layer.name)
        if layer.format is None or site is None:
            continue
        where = f"{recipe.label}: layer {layer.name!r}: format"
        group = off.get(site, group_of.get(site))
        missing = f"{named('weights')} is not among the settings of the recipe"
        if group is None:
            raise InputError(f"{where}: {tables.left.get(site.matrix.name, missing)}")
        if site in off:
            if group not in formats or layer.format.table:
                raise InputError(f"{where}: {left.get(group, missing)}")
            _check_format(layer.format, layer, group, where)
            found[group] = Formats((layer.format,))
            continue
        found[group] = _of_table(group, layer, where, formats.get(group))
    return found


def _of_table(group: Group, layer: RecipeLayer, where: str, may: Formats | None) -> Formats:
    form = layer.format
    assert form is not None
    if layer.rank is not None:
        raise InputError(f"{where}: a table has a format or a rank, got both (rank {layer.rank})")
    fused = form.fused and may is not None and any(one and one.fused for one in may.dense)
    expected = table_formats(group.shape[2], form.bits, fused=fused)
    if form not in expected:
        some = " or ".join(map(str, expected))
        raise InputError(f"{where}: expected {some} of a table, got {form}")
    return Formats((form,))


def _found(recipe: Recipe, finding: Finding) -> Iterator[_Found]:
    """Every layer of the recipe with the group that it is."""
    group_of = {member.site: group for group in finding.groups for member in group.members}
    labels = labels_of([entry.node for entry in finding.entries])
    entries = {labels[entry.node]: entry for entry in finding.entries}
    counts = Counter(layer.name for layer in recipe.layers)
    for layer in recipe.layers:
        where = f"{recipe.label}: layer {layer.name!r}"
        if counts[layer.name] > 1:
            raise InputError(f"{where}: expected it once, got it {counts[layer.name]} times")
        entry = entries.get(layer.name)
        if entry is None:
            near = near_names(layer.name, entries)
            raise InputError(f"{where}: the model has no linear map of that name; {near}")
        if isinstance(entry, Refused):
            if layer.kept or (entry.site is not None and layer.rank is None):
                continue  # see `formats_off_in`
            raise InputError(
                f"{where}: expected a layer that can be factored; {entry.refusal.reason}"
            )
        yield _Found(layer, group_of[_site(layer, entry, where)])


def _site(layer: RecipeLayer, entry: Factorable, where: str) -> Site:
    site = next((site for site in entry.sites if site.form.name == layer.form), None)
    if site is None:
        forms = " or ".join(site.form.name for site in entry.sites)
        raise InputError(f"{where}: the recipe has form {layer.form!r}, the model has {forms}")
    if shape_of(site) != layer.shape:
        raise InputError(
            f"{where}: the recipe has shape {_times(layer.shape)}, the model has "
            f"{_times(shape_of(site))}"
        )
    return site


def _check_rank(recipe: Recipe, layer: RecipeLayer, most: int) -> None:
    """Raise where a pair of the rank would be larger than its weight, or could not be."""
    assert layer.rank is not None
    if 1 <= layer.rank <= most:
        return
    expected = f"a rank from 1 to {most}" if most else "no rank: any pair is larger than the weight"
    raise InputError(f"{recipe.label}: layer {layer.name!r}: expected {expected}, got {layer.rank}")


def _joints(recipe: Recipe, ranks: Mapping[Group, RecipeLayer]) -> list[Joint]:
    """The groups that share their first factor.

    Raises:
        InputError: a layer is not there, or cannot share it.
    """
    groups = {layer.name: group for group, layer in ranks.items()}
    joints = []
    for own in recipe.shared:
        for name in own.layers:
            if name not in groups:
                raise InputError(f"{recipe.label}: shared layer {name!r}: it is none of the layers")
        members = [groups[name] for name in own.layers]
        sites = [group.members[0].site for group in members]
        for group, site, name in zip(members, sites, own.layers, strict=True):
            first = sites[0]
            alike = (
                site.form.shares_first
                and site.form.activation(site) is first.form.activation(first)
                and site.form.reading(site) == first.form.reading(first)
                and site.m == first.m
            )
            alone = len(group.members) == 1 and site.slices == 1 and not group.others
            if not (alike and alone):
                raise InputError(
                    f"{recipe.label}: layer {name!r} cannot share its first factor with "
                    f"{own.layers[0]!r}: expected products of one activation with weights of "
                    "their own"
                )
        joints.append(Joint(tuple(members), own.scales))
    return joints


class FromRecipe(Strategy):
    """The ranks of a recipe: nothing is searched, and no time decides."""

    once = True
    may_put_back = False

    def __init__(self, recipe: Recipe, prepared: Prepared, min_gain: float) -> None:
        self._recipe, self._prepared, self._min_gain = recipe, prepared, min_gain

    def first(self) -> Plan:
        """The only plan.

        Raises:
            InputError: the recipe does not fit the model.
        """
        recipe, prepared = self._recipe, self._prepared
        ranks = ranks_of(recipe, prepared.finding, self._min_gain)
        joints = {group: joint for joint in _joints(recipe, ranks) for group in joint.groups}
        choices = {}
        for group in prepared.finding.groups:
            layer = ranks.get(group)
            choices[group] = self._choice(group, layer, joints.get(group))
        goal = recipe.limits(self._min_gain)
        settled = settle(prepared.finding, choices, goal)
        off = prepared.finding.off
        return Plan(formatted(settled, prepared.formats, prepared.floats, off))

    def _choice(self, group: Group, layer: RecipeLayer | None, joint: Joint | None) -> Choice:
        if layer is None or layer.rank is None:
            dense = "the recipe leaves it dense"
            return self._prepared.early.get(group) or Choice(None, dense)
        measured = self._prepared.measured[group]
        if not measured.finite:
            raise InputError(
                f"{self._recipe.label}: layer {layer.name!r}: {group.matrix.name} holds NaN or Inf"
            )
        why = f"rank {layer.rank} of the recipe"
        if joint is None:
            energy = measured.held(layer.rank)
            return Choice(layer.rank, why, energy, of=measured.of)
        leads = joint.groups[0] is group
        return Choice(layer.rank, why, of=measured.of, joint=joint, leads=leads)


def _fate(layer: RecipeLayer) -> str:
    rank = "dense" if layer.rank is None else f"rank {layer.rank}"
    return rank if layer.format is None else f"{rank} in {layer.format}"


def _times(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))
