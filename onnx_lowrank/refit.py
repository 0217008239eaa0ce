"""Refit: each layer to what the compressed model really gives it.

Layers are taken in topological order.  A factored layer reads inputs X̂ that the layers before it
have already changed; it is fitted by ridge regression to the outputs Y that the original had,

    W* = (X̂ᵀX̂ + λI)⁻¹ (X̂ᵀY + λW),

and then cut to its rank by output PCA on X̂; of a layer with a bias of its own the means of X̂ and
Y are taken off first, and the bias makes up for them.  Where its output is added to a residual
stream, Y is the original *sum* less the compressed model's other operand, so that the layer also
repairs what came before it.  A fifth of the samples is kept aside and chooses λ; a refit that is
not better there than the pair it would replace is dropped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_lowrank.calibrate import Feed, kept_rows, spread_mask
from onnx_lowrank.constants import Constant, Constants
from onnx_lowrank.find import Group
from onnx_lowrank.fit import Factors
from onnx_lowrank.forms.base import node_name
from onnx_lowrank.measure import group_memory
from onnx_lowrank.numerics.output_pca import output_pair
from onnx_lowrank.numerics.parallel import map_layers
from onnx_lowrank.numerics.ridge import Regression
from onnx_lowrank.progress import Advance
from onnx_lowrank.segments import Open, Walk
from onnx_lowrank.walk import only_sum

__all__ = ["Refitted", "refit"]

Array = npt.NDArray[Any]

# Ridges to try, as shares of the mean eigenvalue of X̂ᵀX̂.
_RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
# One sample of so many is kept aside.
_ASIDE = 5
# Values that wait between the pieces of both walks; with more, samples are left out.
_MEMORY = 2 << 30


@dataclass(frozen=True, eq=False)
class Refitted:
    """What came of it.

    Attributes:
        factors: a pair for every group that has a rank, new or as it was.
        left: name of a layer -> why it was not refitted.
        samples: how many samples were used.
    """

    factors: dict[Group, Factors]
    left: Mapping[str, str]
    samples: int


@dataclass(eq=False)
class _Layer:
    """A group that can be refitted: one product of the main graph."""

    group: Group
    value: ir.Value
    residual: str | None
    read: Callable[[Array], Array]
    fit: Regression
    aside: Regression

    @property
    def node(self) -> ir.Node:
        return self.group.members[0].site.node

    @property
    def output(self) -> str:
        return self.node.outputs[0].name or ""

    def add(
        self,
        before: Feed,
        after: Feed,
        mask: npt.NDArray[np.bool_] | None,
        *,
        aside: bool,
    ) -> None:
        """Add one sample's rows of both models."""
        site = self.group.members[0].site
        wanted = before[self.output]
        stream = self.residual
        if stream is not None and stream in after and before[stream].shape == wanted.shape:
            # The sum is to come out as it did: the layer makes up for the stream's drift.
            wanted = wanted + (before[stream] - after[stream])
        activation = after[self.value.name or ""]
        rows = site.form.vectors(site, activation)[0]
        target = self.read(wanted)
        spread = None if mask is None else spread_mask(mask, activation.shape)
        if spread is not None:
            chosen = site.form.vectors(site, spread)[0].any(axis=-1)
            rows, target = rows[chosen], target[chosen]
        (self.aside if aside else self.fit).add(rows, target)


def refit(
    model: ir.Model,
    constants: Constants,
    factors: Mapping[Group, Factors],
    feeds: Sequence[Feed],
    mask: str | None,
    open_model: Open,
    advance: Advance,
) -> Refitted:
    """Refit the pairs of a model that is not rewritten yet.

    Args:
        model: the model; it is not changed.
        constants: resolver of its constants.
        factors: the pairs of every group that has a rank.
        feeds: samples.
        mask: input whose zeros mark rows to leave out.
        open_model: makes a runner of a model.
        advance: called with the number of elements of every group that is done.
    """
    current = dict(factors)
    positions = {node: index for index, node in enumerate(model.graph)}
    layers, left = _layers(model, constants, factors)
    advance(sum(group.matrix.size for group in factors if group not in {x.group for x in layers}))
    if not layers:
        return Refitted(current, left, 0)
    original, compressed = Walk(model, feeds, open_model), Walk(model, feeds, open_model)
    for group, pair in current.items():
        _put(compressed, group, pair)
    stages = _stages(layers, positions)
    masks = [kept_rows(feed, mask) for feed in feeds]
    for number, (place, stage) in enumerate(stages):
        end = max(positions[layer.node] + 1 for layer in stage)
        compressed.advance(place)
        original.advance(end, _compared(stages[number:]))
        _make_room(original, compressed)
        for layer in stage:
            _, m, n = layer.group.shape
            biased = layer.group.bias is not None
            layer.fit, layer.aside = (Regression(m, n, biased=biased) for _ in range(2))
            every = enumerate(zip(original.live, compressed.live, strict=True))
            for index, (before, after) in every:
                aside = len(original.live) > 1 and index % _ASIDE == _ASIDE - 1
                layer.add(before, after, masks[index], aside=aside)
        by_group = {layer.group: layer for layer in stage}

        def solved(group: Group, stage_of: Mapping[Group, _Layer] = by_group) -> Factors | None:
            return _solve(stage_of[group], current[group])

        for group, better in map_layers(solved, list(by_group), group_memory):
            if better is not None:
                current[group] = better
                _put(compressed, group, better)
            else:
                left[node_name(by_group[group].node)] = "no better on samples kept aside"
            by_group[group].fit = by_group[group].aside = Regression(0, 0)
            advance(group.matrix.size)
    return Refitted(current, left, len(original.live))


def _make_room(*walks: Walk) -> None:
    """Leave samples out, the same in all walks, while what waits between pieces is too much."""
    while sum(walk.memory for walk in walks) > _MEMORY and len(walks[0].live) > 2 * _ASIDE:
        for walk in walks:
            del walk.live[len(walk.live) * 3 // 4 :]


def _layers(
    model: ir.Model, constants: Constants, factors: Mapping[Group, Factors]
) -> tuple[list[_Layer], dict[str, str]]:
    layers, left = [], {}
    for group in factors:
        site = group.members[0].site
        value, output = site.form.activation(site), site.node.outputs[0]
        name = node_name(site.node)
        if factors[group].shared:
            left[name] = "it shares its first factor"
        elif len(group.members) > 1:
            left[name] = f"{len(group.members)} layers share its weight"
        elif site.node.graph is not model.graph or group.matrix.root.graph is not model.graph:
            left[name] = "it is inside a subgraph or function"
        elif value is None or (read := site.form.mapped(site, constants)) is None:
            left[name] = f"form {site.form.name} does not tell what its node adds to x·W"
        else:
            empty = Regression(0, 0)
            residual = _residual(output, constants)
            layers.append(_Layer(group, value, residual, read, empty, empty))
    return layers, left


def _residual(output: ir.Value, constants: Constants) -> str | None:
    """The other operand where an output, perhaps with a bias, is added to a stream."""
    for _ in range(2):
        behind = only_sum(output)
        if behind is None:
            return None
        node, other = behind
        if other.name is None or other.graph is not node.graph:
            return None
        if not isinstance(constants.resolve(other), Constant):
            return other.name
        output = node.outputs[0]
    return None


def _stages(
    layers: Sequence[_Layer], positions: Mapping[ir.Node, int]
) -> list[tuple[int, list[_Layer]]]:
    """Layers by the activation that they read, at the place of the first of them."""
    by_value: dict[ir.Value, list[_Layer]] = {}
    for layer in layers:
        by_value.setdefault(layer.value, []).append(layer)
    stages = [(min(positions[layer.node] for layer in stage), stage) for stage in by_value.values()]
    return sorted(stages, key=lambda stage: stage[0])


def _compared(stages: Sequence[tuple[int, list[_Layer]]]) -> list[str]:
    """Values of the original that these stages compare with; it may have passed them already."""
    layers = [layer for _, stage in stages for layer in stage]
    return [layer.output for layer in layers] + [n for layer in layers if (n := layer.residual)]


def _put(walk: Walk, group: Group, pair: Factors) -> None:
    """Let a walk use the product of a pair in place of its weight."""
    for name, array in pair.constants(group).items():
        walk.replace(name, array)


def _solve(layer: _Layer, pair: Factors) -> Factors | None:
    """The best refit if it beats the pair on the samples kept aside."""
    fit, aside = layer.fit, layer.aside
    own = pair.first[0], pair.second[0], pair.shift
    start = least = aside.error(*own)
    if fit.error(*own) == 0.0 or not fit.rows or not aside.rows:
        return None
    best: Factors | None = None
    moments = fit.moments().fitting()
    for solution in fit.solutions(layer.group.matrix.numpy()[0], _RIDGES):
        first, second = output_pair(solution, moments, pair.rank, pair.first.dtype)
        shift = fit.shift(first, second)
        error = aside.error(first, second, shift)
        if error < least:
            errors = dataclasses.replace(pair.errors, refit=(start, error))
            least, best = error, Factors(first[None], second[None], errors, shift=shift)
    return best
