"""Refit: each layer to what the compressed model really gives it.

Layers are taken in topological order.  A factored layer reads inputs X̂ that the layers before it
have already changed; it is fitted by ridge regression to the outputs Y of the original,

    W* = (X̂ᵀX̂ + λI)⁻¹ (X̂ᵀY + λW),

and then cut to its rank by output PCA on X̂.  Where the layer has a bias of its own, the means of X̂
and Y are subtracted first, and the bias is fitted to them.  Where its output is added to a residual
stream, Y is the original *sum* less the compressed model's other operand, so that the layer also
corrects the errors of the layers before it.  A fifth of the samples is held out and chooses λ; a
refit whose error there is not below that of the pair is dropped.

A weight that several nodes read (the steps of an unrolled loop, layers that share theirs) is fitted
to the rows of all of them.  The inputs of the later nodes depend on the weight itself, so the refit
must also be better on the inputs that these nodes read with the new weight in place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_lowrank.data.mask import kept_rows, spread_mask
from onnx_lowrank.fitting.segments import OpenProto, Walk
from onnx_lowrank.fitting.spectra import group_memory
from onnx_lowrank.fitting.statistics import Statistics
from onnx_lowrank.graph.constants import Constant, Constants
from onnx_lowrank.graph.walk import node_name, only_sum
from onnx_lowrank.maps.find import Group
from onnx_lowrank.maps.forms import Site
from onnx_lowrank.maps.pair import Factors
from onnx_lowrank.numerics.arrays import Array, Feed
from onnx_lowrank.numerics.fisher import Fisher
from onnx_lowrank.numerics.output_pca import output_pair
from onnx_lowrank.numerics.parallel import map_layers
from onnx_lowrank.numerics.ridge import Regression
from onnx_lowrank.progress import Advance
from onnx_lowrank.runtime.memory import Memory
from onnx_lowrank.runtime.shelf import Shelf

__all__ = ["Refitted", "refit"]


# Ridges to try, as shares of the mean eigenvalue of X̂ᵀX̂.
_RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
# One sample of so many is kept aside.
_ASIDE = 5


@dataclass(frozen=True, eq=False)
class Refitted:
    """What the refit reached.

    Attributes:
        factors: a pair for every group that has a rank, new or as it was.
        left: name of a layer -> why it was not refitted.
        spilled: bytes of values that waited in files.
    """

    factors: dict[Group, Factors]
    left: Mapping[str, str]
    spilled: int


@dataclass(frozen=True, eq=False)
class _Reader:
    """A node of the main graph that multiplies with a weight to refit."""

    site: Site
    value: str
    residual: str | None
    read: Callable[[Array], Array]

    @property
    def output(self) -> str:
        return self.site.node.outputs[0].name or ""

    def rows(
        self, before: Feed, after: Feed, mask: npt.NDArray[np.bool_] | None
    ) -> tuple[Array, Array]:
        """One sample's rows: what the compressed model multiplies, and what it should get."""
        wanted, stream = before[self.output], self.residual
        if stream is not None and stream in after:
            aimed = before[stream]
            # The target is the original sum: the layer compensates the drift of the stream.
            if aimed.shape == wanted.shape:
                wanted = wanted + (aimed - after[stream])
        activation = after[self.value]
        rows = self.site.form.vectors(self.site, activation)[0]
        target = self.read(wanted)
        spread = None if mask is None else spread_mask(mask, activation.shape)
        if spread is not None:
            chosen = self.site.form.vectors(self.site, spread)[0].any(axis=-1)
            rows, target = rows[chosen], target[chosen]
        return rows, target


@dataclass(frozen=True, eq=False)
class _Layer:
    """A group that can be refitted, and what reads its weight, in the order of the nodes."""

    group: Group
    readers: tuple[_Reader, ...]
    fisher: Fisher

    @property
    def key(self) -> tuple[str, ...]:
        """Layers with the same inputs are refitted together."""
        return tuple(reader.value for reader in self.readers)

    def regression(self) -> Regression:
        """Without rows yet."""
        _, m, n = self.group.shape
        return Regression(m, n, biased=self.group.bias is not None, fisher=self.fisher)


@dataclass(frozen=True, eq=False)
class _Stage:
    """Layers that read the same inputs.

    Attributes:
        layers: the layers, with equally many readers each.
        places: for each reader, where the first layer's stands in the graph, and where the last
            one's ends.
    """

    layers: tuple[_Layer, ...]
    places: tuple[tuple[int, int], ...]

    def compared(self, start: int = 0) -> list[str]:
        """Values of the original that readers from one on compare with."""
        readers = [reader for layer in self.layers for reader in layer.readers[start:]]
        return [r.output for r in readers] + [r.residual for r in readers if r.residual]


def refit(
    model: ir.Model,
    constants: Constants,
    factors: Mapping[Group, Factors],
    statistics: Statistics,
    feeds: Sequence[Feed],
    mask: str | None,
    open_model: OpenProto,
    advance: Advance,
    memory: Memory | None = None,
) -> Refitted:
    """Refit the pairs of a model that is not rewritten yet.

    Args:
        model: the model; it is not changed.
        constants: resolver of its constants.
        factors: the pairs of every group that has a rank.
        statistics: say in what coordinates the outputs of a group count alike.
        feeds: samples.
        mask: input whose zeros mark rows to leave out.
        open_model: makes a runner of a model.
        advance: called with the number of elements of every group that is done.
        memory: what may be held; values that wait and do not fit are in files.
    """
    current = dict(factors)
    positions = {node: index for index, node in enumerate(model.graph)}
    layers, left = _layers(model, constants, factors, statistics)
    advance(sum(group.matrix.size for group in factors if group not in {x.group for x in layers}))
    if not layers:
        return Refitted(current, left, 0)
    shelf = Shelf(memory)
    original = Walk(model, feeds, open_model, shelf)
    compressed = original.fork()
    for group, pair in current.items():
        _put(compressed, group, pair)
    stages = _stages(layers, positions)
    masks = [kept_rows(feed, mask) for feed in feeds]
    for number, stage in enumerate(stages):
        start, end = stage.places[0]
        compressed.advance(start)
        original.advance(end, [name for later in stages[number:] for name in later.compared()])
        for layer, better in _refitted(stage, original, compressed, masks, current):
            if better is not None:
                current[layer.group] = better
                _put(compressed, layer.group, better)
            else:
                left[node_name(layer.readers[0].site.node)] = _why(len(original.live))
            advance(layer.group.matrix.size)
    return Refitted(current, left, shelf.spilled)


def _refitted(
    stage: _Stage,
    original: Walk,
    compressed: Walk,
    masks: Sequence[npt.NDArray[np.bool_] | None],
    current: Mapping[Group, Factors],
) -> Iterator[tuple[_Layer, Factors | None]]:
    """The layers of a stage with the best of their new pairs; None where the old one is as good."""
    samples = range(len(original.live))
    aside = [index for index in samples if index % _ASIDE == _ASIDE - 1]
    if not aside and len(samples) > 1:
        aside = [samples[-1]]
    fit = [index for index in samples if index not in set(aside)]
    sums, judging = _sums(stage, original, [(compressed, fit), (compressed, aside)], masks)

    def solved(group: Group) -> list[Factors]:
        return _solutions(group, current[group], sums[group], judging[group])

    found = dict(map_layers(solved, list(sums), group_memory))
    if len(stage.places) > 1:
        walks = original.fork(aside), compressed.fork(aside)
        found = _in_place(stage, found, judging, *walks, [masks[index] for index in aside])
    for layer in stage.layers:
        better = [pair for pair in found[layer.group] if _gain(pair) > 0.0]
        yield layer, max(better, key=_gain, default=None)


def _why(samples: int) -> str:
    """Why a refit that was tried is not taken."""
    return "not better on held-out samples" if samples > 1 else "no sample is left to judge it"


def _in_place(
    stage: _Stage,
    found: Mapping[Group, Sequence[Factors]],
    judging: Mapping[Group, Regression],
    original: Walk,
    compressed: Walk,
    masks: Sequence[npt.NDArray[np.bool_] | None],
) -> dict[Group, list[Factors]]:
    """Refits with their errors on what their nodes read with them in place.

    Args:
        stage: the layers; both walks are at its first readers, with the samples kept aside.
        found: for each layer a refit for each ridge, or none; those of a ridge go together.
        judging: of the same samples, with the old pairs in place.
        original: where the targets come from.
        compressed: with the old pairs.
        masks: for each sample the rows that count.
    """
    tried = [
        {group: pairs[index] for group, pairs in found.items() if pairs}
        for index in range(max(len(pairs) for pairs in found.values()))
    ]
    walks = [compressed.fork() for _ in tried]
    for walk, pairs in zip(walks, tried, strict=True):
        for group, pair in pairs.items():
            _put(walk, group, pair)
    there = _sums(stage, original, [(walk, range(len(masks))) for walk in walks], masks)
    return {
        group: [
            _moved(own[group], judging[group], moved[group])
            for own, moved in zip(tried, there, strict=True)
            if group in own
        ]
        for group in found
    }


def _sums(
    stage: _Stage,
    original: Walk,
    parts: Sequence[tuple[Walk, Sequence[int]]],
    masks: Sequence[npt.NDArray[np.bool_] | None],
) -> list[dict[Group, Regression]]:
    """Regressions over the rows of all readers.

    Args:
        stage: the layers; all walks are at its first readers, and stay there.
        original: where the targets come from.
        parts: for each regression where the inputs come from, and the samples that it has.
        masks: for each sample the rows that count.
    """
    found = [{layer.group: layer.regression() for layer in stage.layers} for _ in parts]
    walks = {id(walk): walk for walk, _ in parts}
    for index, (start, end) in enumerate(stage.places):
        if index == 1:
            original, walks = original.fork(), {key: walk.fork() for key, walk in walks.items()}
        if index:
            original.advance(end, stage.compared(index))
            for walk in walks.values():
                walk.advance(start)
        for (walk, samples), sums in zip(parts, found, strict=True):
            for sample in samples:
                before, after = original.live[sample], walks[id(walk)].live[sample]
                for layer in stage.layers:
                    sums[layer.group].add(*layer.readers[index].rows(before, after, masks[sample]))
    return found


def _layers(
    model: ir.Model,
    constants: Constants,
    factors: Mapping[Group, Factors],
    statistics: Statistics,
) -> tuple[list[_Layer], dict[str, str]]:
    """What can be refitted, and by the name of its first node why something else cannot."""
    layers, left = [], {}
    for group in factors:
        sites = [member.site for member in group.members]
        graphs = {*(site.node.graph for site in sites), group.matrix.root.graph}
        name = node_name(sites[0].node)
        if factors[group].shared:
            left[name] = "it shares its first factor"
        elif group.inner is not None:
            left[name] = "a width is narrowed in front of it"
        elif any(member.transposed for member in group.members):
            left[name] = "its weight is also read transposed"
        elif graphs != {model.graph}:
            left[name] = "it is inside a subgraph or function"
        elif None in (readers := [_reader(site, constants) for site in sites]):
            form = sites[readers.index(None)].form.name
            left[name] = f"form {form} does not tell what its node adds to x·W"
        else:
            own = tuple(reader for reader in readers if reader is not None)
            layers.append(_Layer(group, own, statistics.coordinates(group)))
    return layers, left


def _reader(site: Site, constants: Constants) -> _Reader | None:
    value, read = site.form.activation(site), site.form.mapped(site, constants)
    if value is None or value.name is None or read is None:
        return None
    return _Reader(site, value.name, _residual(site.node.outputs[0], constants), read)


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


def _stages(layers: Sequence[_Layer], positions: Mapping[ir.Node, int]) -> list[_Stage]:
    """Layers by the activations that they read, in the order of the first of these."""
    together: dict[tuple[str, ...], list[_Layer]] = {}
    for layer in layers:
        together.setdefault(layer.key, []).append(layer)
    stages = []
    for stage in together.values():
        steps = zip(*(layer.readers for layer in stage), strict=True)
        places = [[positions[reader.site.node] for reader in step] for step in steps]
        stages.append(_Stage(tuple(stage), tuple((min(own), max(own) + 1) for own in places)))
    return sorted(stages, key=lambda stage: stage.places[0][0])


def _put(walk: Walk, group: Group, pair: Factors) -> None:
    """Let a walk use the product of a pair in place of its weight."""
    for name, array in pair.constants(group).items():
        walk.replace(name, array)


def _solutions(group: Group, pair: Factors, fit: Regression, aside: Regression) -> list[Factors]:
    """Refits, one for each ridge, with their errors on samples kept aside; none without rows."""
    start = aside.error(pair.first[0], pair.second[0], pair.shift)
    if not fit.rows or not aside.rows:
        return []
    found, moments, dtype = [], fit.moments().fitting(), pair.first.dtype
    for solution in fit.solutions(group.matrix.numpy()[0], _RIDGES):
        a, b = output_pair(solution, moments, pair.rank, np.float64)
        first, second = a.astype(dtype), fit.fisher.back(b).astype(dtype)
        shift = fit.shift(first, second)
        errors = dataclasses.replace(pair.errors, refit=(start, aside.error(first, second, shift)))
        found.append(Factors(first[None], second[None], errors, shift=shift))
    return found


def _moved(pair: Factors, aside: Regression, there: Regression) -> Factors:
    """A refit with its error on what its nodes read with it in place.

    Args:
        pair: the refit.
        aside: of the samples kept aside, with the old pair in place.
        there: of the same with the refit in place.
    """
    start, _ = _refit_errors(pair)
    # What should be added to a residual stream has changed as well; what is off of it compares.
    off = there.error(pair.first[0], pair.second[0], pair.shift) * there.energy
    errors = dataclasses.replace(pair.errors, refit=(start, off / aside.energy))
    return dataclasses.replace(pair, errors=errors)


def _gain(pair: Factors) -> float:
    """By how much a refit is better than the pair that it would replace."""
    start, after = _refit_errors(pair)
    return start - after


def _refit_errors(pair: Factors) -> tuple[float, float]:
    assert pair.errors.refit is not None
    return pair.errors.refit
