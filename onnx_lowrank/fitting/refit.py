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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_lowrank.data.mask import kept_rows
from onnx_lowrank.fitting.refit_stages import (
    RefitLayer,
    RefitStage,
    refit_layers,
    refit_stages,
)
from onnx_lowrank.fitting.segments import OpenProto, Walk
from onnx_lowrank.fitting.spectra import group_memory
from onnx_lowrank.fitting.statistics import Statistics
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.graph.fingerprint import fingerprint
from onnx_lowrank.graph.walk import node_name
from onnx_lowrank.maps.find import Group
from onnx_lowrank.maps.pair import Factors
from onnx_lowrank.numerics.arrays import Feed
from onnx_lowrank.numerics.output_pca import output_pair
from onnx_lowrank.numerics.parallel import map_layers
from onnx_lowrank.numerics.ridge import Regression
from onnx_lowrank.progress import Advance
from onnx_lowrank.runtime.memory import Memory
from onnx_lowrank.runtime.pieces import Pieces
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
    pieces: Pieces | None = None,
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
        pieces: where layers of an earlier run are; default: nowhere.
    """
    current = dict(factors)
    positions = {node: index for index, node in enumerate(model.graph)}
    layers, left = refit_layers(model, constants, factors, statistics)
    advance(sum(group.matrix.size for group in factors if group not in {x.group for x in layers}))
    if not layers:
        return Refitted(current, left, 0)
    stages = refit_stages(layers, positions)
    known = _known(pieces, model, layers, current, feeds, mask)
    done = [None if known is None else known.load(n) for n in range(len(stages))]
    if all(found is not None for found in done):  # nothing has to be run
        for stage, found in zip(stages, done, strict=True):
            for layer, better in zip(stage.layers, found or (), strict=True):
                _took(layer, better, current, left, len(feeds))
                advance(layer.group.matrix.size)
        return Refitted(current, left, 0)
    shelf = Shelf(memory)
    original = Walk(model, feeds, open_model, shelf)
    compressed = original.fork()
    for group, pair in current.items():
        _put(compressed, group, pair)
    masks = [kept_rows(feed, mask) for feed in feeds]
    for number, stage in enumerate(stages):
        start, end = stage.places[0]
        compressed.advance(start)
        original.advance(end, [name for later in stages[number:] for name in later.compared()])
        found = done[number]
        if found is None:
            found = _refitted(stage, original, compressed, masks, current, memory)
            if known is not None:
                known.save(number, found)
        for layer, better in zip(stage.layers, found, strict=True):
            _took(layer, better, current, left, len(original.live))
            if better is not None:
                _put(compressed, layer.group, better)
            advance(layer.group.matrix.size)
    return Refitted(current, left, shelf.spilled)


def _took(
    layer: RefitLayer,
    better: Factors | None,
    current: dict[Group, Factors],
    left: dict[str, str],
    samples: int,
) -> None:
    """Put the better pair of a layer among the current ones, or say why there is none."""
    if better is not None:
        current[layer.group] = better
    else:
        left[node_name(layer.readers[0].site.node)] = _why(samples)


@dataclass(frozen=True)
class _Known:
    """What an earlier run found for the stages; each depends on all before it."""

    pieces: Pieces
    key: str

    def load(self, number: int) -> tuple[Factors | None, ...] | None:
        found: tuple[Factors | None, ...] | None = self.pieces.load(
            "refitted", self.pieces.key(self.key, number)
        )
        return found

    def save(self, number: int, found: tuple[Factors | None, ...]) -> None:
        self.pieces.save("refitted", self.pieces.key(self.key, number), found)


def _known(
    pieces: Pieces | None,
    model: ir.Model,
    layers: Sequence[RefitLayer],
    pairs: Mapping[Group, Factors],
    feeds: Sequence[Feed],
    mask: str | None,
) -> _Known | None:
    """Where the stages of an earlier run are that had the same models and samples."""
    if pieces is None:
        return None
    start = [(group.matrix.name, pair) for group, pair in pairs.items()]
    fishers = [layer.fisher for layer in layers]
    whole = fingerprint(model, whole=True)
    return _Known(pieces, pieces.key("refitted", whole, start, fishers, feeds, mask))


def _refitted(
    stage: RefitStage,
    original: Walk,
    compressed: Walk,
    masks: Sequence[npt.NDArray[np.bool_] | None],
    current: Mapping[Group, Factors],
    memory: Memory | None,
) -> tuple[Factors | None, ...]:
    """The best new pair of each layer of a stage; None where the old one is as good."""
    samples = range(len(original.live))
    aside = [index for index in samples if index % _ASIDE == _ASIDE - 1]
    if not aside and len(samples) > 1:
        aside = [samples[-1]]
    fit = [index for index in samples if index not in set(aside)]
    sums, judging = _sums(stage, original, [(compressed, fit), (compressed, aside)], masks)

    def solved(group: Group) -> list[Factors]:
        return _solutions(group, current[group], sums[group], judging[group])

    room = None if memory is None else memory.planned()
    found = dict(map_layers(solved, list(sums), group_memory, room=room))
    if len(stage.places) > 1:
        walks = original.fork(aside), compressed.fork(aside)
        found = _in_place(stage, found, judging, *walks, [masks[index] for index in aside])
    best = []
    for layer in stage.layers:
        better = [pair for pair in found[layer.group] if _gain(pair) > 0.0]
        best.append(max(better, key=_gain, default=None))
    return tuple(best)


def _why(samples: int) -> str:
    """Why a refit that was tried is not taken."""
    return "not better on held-out samples" if samples > 1 else "no sample is left to judge it"


def _in_place(
    stage: RefitStage,
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
    stage: RefitStage,
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
