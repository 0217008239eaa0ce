"""Recipe: what became of every layer, as values that another run carries out without a search.

A layer is known by its label: the name of its node, and of the second and later nodes of one name
``name#2`` and so on, in the order of the graph.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnx_lowrank.errors import named
from onnx_lowrank.graph.walk import node_name
from onnx_lowrank.maps.choice import Decision
from onnx_lowrank.maps.formats import Format
from onnx_lowrank.maps.forms import Site
from onnx_lowrank.ranks.goals import Goal

__all__ = [
    "Recipe",
    "RecipeLayer",
    "SharedFirst",
    "digest_of_layers",
    "labels_of",
    "recipe_layers",
    "recipe_shared",
    "shape_of",
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
        found = Goal(min_gain=min_gain, budget=True)
        if energy is not None:
            found = Goal(energy=energy, min_gain=min_gain)
        elif rank is not None:
            found = Goal(rank=rank, min_gain=min_gain)
        elif keep is not None and self.goal.get("uniform"):
            found = Goal(keep=keep, min_gain=min_gain)
        multiple = self.goal.get("rank_multiple")
        return replace(found, rank_multiple=multiple) if isinstance(multiple, int) else found


def digest_of_layers(layers: Sequence[RecipeLayer], shared: Sequence[SharedFirst]) -> str:
    """By which changes of the layers are known; those that stay as they are have no part in it."""
    own = [dataclasses.astuple(layer) for layer in layers if not layer.kept]
    text = json.dumps([own, [dataclasses.astuple(group) for group in shared]])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def recipe_layers(decisions: Sequence[Decision]) -> tuple[RecipeLayer, ...]:
    """What became of every layer that could have been factored."""
    labels = labels_of([decision.node for decision in decisions])
    return tuple(
        RecipeLayer(
            labels[decision.node],
            decision.form,
            shape_of(decision.site),
            decision.choice.rank,
            decision.choice.format,
        )
        for decision in decisions
        if decision.group is not None and decision.site is not None
    )


def recipe_shared(decisions: Sequence[Decision]) -> tuple[SharedFirst, ...]:
    """Which of them share their first factor."""
    labels = labels_of([decision.node for decision in decisions])
    joints = dict.fromkeys(d.choice.joint for d in decisions if d.choice.joint is not None)
    return tuple(
        SharedFirst(
            tuple(labels[group.members[0].site.node] for group in joint.groups), joint.scales
        )
        for joint in joints
    )


def shape_of(site: Site) -> tuple[int, ...]:
    """The shape of a site's matrix, ``(m, n)``, or ``(slices, m, n)`` of several."""
    return (site.m, site.n) if site.slices == 1 else (site.slices, site.m, site.n)


def labels_of(nodes: Sequence[ir.Node]) -> dict[ir.Node, str]:
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
