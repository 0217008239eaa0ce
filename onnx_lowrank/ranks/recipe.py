"""Recipe: what became of every layer, as values that another run carries out without a search.

A layer is known by its label: the name of its node, and of the second and later nodes of one name
``name#2`` and so on, in the order of the graph.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnx_lowrank.errors import InputError, named
from onnx_lowrank.graph.walk import node_name
from onnx_lowrank.maps.choice import Choice, Decision, Joint
from onnx_lowrank.maps.find import Factorable, Finding, Group, Refused
from onnx_lowrank.maps.formats import SMALLEST, Format, correctable, suited
from onnx_lowrank.maps.forms import Site
from onnx_lowrank.maps.tables import Tables, table_format
from onnx_lowrank.numerics.ranks import largest_rank
from onnx_lowrank.phrases import near_names
from onnx_lowrank.ranks.choose import settle
from onnx_lowrank.ranks.formats import Formats, formatted
from onnx_lowrank.ranks.goals import Goal
from onnx_lowrank.ranks.prepared import Prepared
from onnx_lowrank.ranks.strategy import Plan, Strategy

__all__ = [
    "FromRecipe",
    "Recipe",
    "RecipeLayer",
    "SharedFirst",
    "digest_of_layers",
    "formats_in",
    "ranks_of",
    "recipe_layers",
    "recipe_shared",
    "tables_in",
]


@dataclass(frozen=True)
class RecipeLayer:
    """One layer.

    Attributes:
        name: its label.
        form: how the linear map stands in the graph.
        shape: (m, n), or (e, m, n) of e matrices.
        rank: of its pair; None leaves it dense.
        format: in which integers its weights are stored; None leaves them floats.
    """

    name: str
    form: str
    shape: tuple[int, ...]
    rank: int | None
    format: Format | None = None

    @property
    def kept(self) -> bool:
        """Whether it stays as it is."""
        return self.rank is None and self.format is None


@dataclass(frozen=True)
class SharedFirst:
    """Layers of one activation that share their first factor.

    Attributes:
        layers: their labels; the first factor counts with the first one.
        scales: how strongly the errors of each count when it is fitted.
    """

    layers: tuple[str, ...]
    scales: tuple[float, ...]


@dataclass(frozen=True)
class Recipe:
    """What to do with a model.

    Attributes:
        tool: what made the recipe.
        input: digest of the model that it was made for (`onnx_lowrank.graph.digest`).
        goal: what found the ranks, as options; it is not looked for again.
        settings: the other options that decide about the result, where they are not the defaults.
        layers: in the order of the graph; a layer that is not named stays dense.
        shared: which of them share their first factor.
        methods: "fisher", "refit" or "heal", where it was tried without being named -> whether the
            result has it.
        layers_digest: of the layers that the goal led to (`digest_of_layers`).
        path: where it was read; None for one in memory.
    """

    tool: str
    input: str
    goal: Mapping[str, Any]
    settings: Mapping[str, Any]
    layers: tuple[RecipeLayer, ...]
    shared: tuple[SharedFirst, ...] = ()
    methods: Mapping[str, bool] = field(default_factory=dict)
    layers_digest: str = ""
    path: Path | None = field(default=None, compare=False)

    @property
    def label(self) -> str:
        """As a message names it."""
        return named("recipe") if self.path is None else named("recipe", self.path)

    @property
    def changed(self) -> bool:
        """Whether layers were changed by hand since the goal led to them."""
        own = digest_of_layers(self.layers, self.shared)
        return bool(self.layers_digest) and self.layers_digest != own

    @property
    def searched(self) -> bool:
        """Whether its ranks were found by a search, for which some samples were kept aside."""
        return self.limits(0.0).budget

    def limits(self, min_gain: float) -> Goal:
        """The goal by which the layers are measured, which has a part in what their factors are."""
        energy, rank, keep = (self.goal.get(name) for name in ("energy", "rank", "keep"))
        if energy is not None:
            return Goal(energy=energy, min_gain=min_gain)
        if rank is not None:
            return Goal(rank=rank, min_gain=min_gain)
        if keep is not None and self.goal.get("uniform"):
            return Goal(keep=keep, min_gain=min_gain)
        return Goal(min_gain=min_gain, budget=True)


def digest_of_layers(layers: Sequence[RecipeLayer], shared: Sequence[SharedFirst]) -> str:
    """By which changes of the layers are known; those that stay as they are have no part in it."""
    own = [dataclasses.astuple(layer) for layer in layers if not layer.kept]
    text = json.dumps([own, [dataclasses.astuple(group) for group in shared]])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def recipe_layers(decisions: Sequence[Decision]) -> tuple[RecipeLayer, ...]:
    """What became of every layer that could have been factored."""
    labels = _labels([decision.node for decision in decisions])
    return tuple(
        RecipeLayer(
            labels[decision.node],
            decision.form,
            _shape(decision.site),
            decision.choice.rank,
            decision.choice.format,
        )
        for decision in decisions
        if decision.group is not None and decision.site is not None
    )


def recipe_shared(decisions: Sequence[Decision]) -> tuple[SharedFirst, ...]:
    """Which of them share their first factor."""
    labels = _labels([decision.node for decision in decisions])
    joints = dict.fromkeys(d.choice.joint for d in decisions if d.choice.joint is not None)
    return tuple(
        SharedFirst(
            tuple(labels[group.members[0].site.node] for group in joint.groups), joint.scales
        )
        for joint in joints
    )


def _shape(site: Site) -> tuple[int, ...]:
    return (site.m, site.n) if site.slices == 1 else (site.slices, site.m, site.n)


def _labels(nodes: Sequence[ir.Node]) -> dict[ir.Node, str]:
    """Node -> its name, or where an earlier one has that, with the smallest number it has not."""
    taken: set[str] = set()
    labels = {}
    for node in nodes:
        name = label = node_name(node)
        number = 1
        while label in taken:
            number += 1
            label = f"{name}#{number}"
        taken.add(label)
        labels[node] = label
    return labels


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
            found[group] = _of_table(group, wanted, where)
            continue
        corrected = layer.rank is None and correctable(group)
        most = min(group.shape[1:]) if corrected else 0
        if not 0 <= wanted.correction <= most:
            raise InputError(
                f"{where}: expected a correction of a rank from 0 to {most}, got "
                f"{wanted.correction}"
            )
        block = wanted.block if layer.rank is not None else suited(wanted.block, group.shape[1])
        if block != wanted.block or block & (block - 1) or block < SMALLEST:
            raise InputError(
                f"{where}: expected a block that is a power of two from {SMALLEST} to "
                f"{suited(1 << 30, group.shape[1])}, got {wanted.block}"
            )
        found[group] = Formats((wanted,), (wanted,))
    return found, floats


def tables_in(recipe: Recipe, finding: Finding, tables: Tables) -> dict[Group, Formats]:
    """The formats that a recipe has for tables of a form that is off.

    Args:
        recipe: the recipe.
        finding: the linear maps of the model.
        tables: of the model.

    Raises:
        InputError: a table cannot have its format.
    """
    labels = _labels([entry.node for entry in finding.entries])
    site_of = {labels[e.node]: e.site for e in finding.entries if isinstance(e, Refused)}
    group_of = {m.site: group for group in tables.groups.values() for m in group.members}
    found: dict[Group, Formats] = {}
    for layer in recipe.layers:
        site = site_of.get(layer.name)
        if layer.format is None or site is None:
            continue
        where = f"{recipe.label}: layer {layer.name!r}: format"
        group = group_of.get(site)
        if group is None:
            why = tables.left.get(
                site.matrix.name, f"{named('weights')} is not among the settings of the recipe"
            )
            raise InputError(f"{where}: {why}")
        found[group] = _of_table(group, layer.format, where)
    return found


def _of_table(group: Group, form: Format, where: str) -> Formats:
    expected = table_format(group.shape[2], form.bits)
    if form != expected:
        raise InputError(f"{where}: expected {expected} of a table, got {form}")
    return Formats((form,))


def _found(recipe: Recipe, finding: Finding) -> Iterator[_Found]:
    """Every layer of the recipe with the group that it is."""
    group_of = {member.site: group for group in finding.groups for member in group.members}
    labels = _labels([entry.node for entry in finding.entries])
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
            if layer.kept or (layer.format is not None and layer.format.table):
                continue  # of a table see `tables_in`
            raise InputError(
                f"{where}: expected a layer that can be factored; {entry.refusal.reason}"
            )
        yield _Found(layer, group_of[_site(layer, entry, where)])


def _site(layer: RecipeLayer, entry: Factorable, where: str) -> Site:
    site = next((site for site in entry.sites if site.form.name == layer.form), None)
    if site is None:
        forms = " or ".join(site.form.name for site in entry.sites)
        raise InputError(f"{where}: the recipe has form {layer.form!r}, the model has {forms}")
    if _shape(site) != layer.shape:
        raise InputError(
            f"{where}: the recipe has shape {_times(layer.shape)}, the model has "
            f"{_times(_shape(site))}"
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
        return Plan(formatted(settled, prepared.formats, prepared.floats))

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
