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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_lowrank.data.joining import APART, Joining
from onnx_lowrank.data.mask import kept_rows, spread_mask
from onnx_lowrank.data.samples import Lazy
from onnx_lowrank.fitting.refit_pairs import gain, moved, refit_memory, ridge_pairs
from onnx_lowrank.fitting.refit_stages import (
    RefitLayer,
    RefitStage,
    refit_layers,
    refit_stages,
)
from onnx_lowrank.fitting.segments import OpenProto, Walk
from onnx_lowrank.fitting.statistics import Statistics
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.graph.fingerprint import fingerprint
from onnx_lowrank.graph.walk import node_name
from onnx_lowrank.maps.find import Group
from onnx_lowrank.maps.pair import Factors
from onnx_lowrank.numerics.arrays import Feed
from onnx_lowrank.numerics.ridge import Regression
from onnx_lowrank.progress import Advance
from onnx_lowrank.runtime.memory import Memory
from onnx_lowrank.runtime.pieces import Pieces
from onnx_lowrank.runtime.shelf import Shelf, Values

__all__ = ["Refitted", "refit"]


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
    joining: Joining = APART,
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
        joining: how samples go together in one run.
    """
    current = dict(factors)
    positions = {node: index for index, node in enumerate(model.graph)}
    layers, left = refit_layers(model, constants, factors, statistics)
    advance(sum(group.matrix.size for group in factors if group not in {x.group for x in layers}))
    if not layers:
        return Refitted(current, left, 0)
    stages = refit_stages(layers, positions)
    known = _known(pieces, model, layers, current, feeds, mask, joining)
    done = [None if known is None else known.load(n) for n in range(len(stages))]
    if all(found is not None for found in done):  # nothing has to be run
        for stage, found in zip(stages, done, strict=True):
            for layer, better in zip(stage.layers, found or (), strict=True):
                _took(layer, better, current, left, len(feeds))
                advance(layer.group.matrix.size)
        return Refitted(current, left, 0)
    work = max(sum(refit_memory(layer.group) for layer in stage.layers) for stage in stages)
    shelf = Shelf(memory, work)
    runs, split = _runs(feeds, joining)
    given = Lazy(len(runs), lambda run: joining.joined([feeds[n] for n in runs[run]]))
    original = Walk(model, given, open_model, shelf)
    masks = [kept_rows(values, mask) for values in original.live]
    first = min(positions.get(m.site.node, 0) for group in current for m in group.members)
    original.advance(first, [name for stage in stages for name in stage.compared()])
    compressed = original.fork()  # up to there both are the same
    for group, pair in current.items():
        _put(compressed, group, pair)
    for number, stage in enumerate(stages):
        start, end = stage.places[0]
        compressed.advance(start)
        original.advance(end, [name for later in stages[number:] for name in later.compared()])
        found = done[number]
        if found is None:
            found = _refitted(stage, original, compressed, masks, split, current, memory)
            if known is not None:
                known.save(number, found)
        for layer, better in zip(stage.layers, found, strict=True):
            _took(layer, better, current, left, len(feeds))
            if better is not None:
                _put(compressed, layer.group, better)
            advance(layer.group.matrix.size)
    return Refitted(current, left, shelf.spilled)


@dataclass(frozen=True)
class _Split:
    """Numbers of the runs that are fitted to, and of those that are kept aside."""

    fit: tuple[int, ...]
    aside: tuple[int, ...]


def _runs(feeds: Sequence[Feed], joining: Joining) -> tuple[list[tuple[int, ...]], _Split]:
    """Which samples go into each run; those kept aside are in runs of their own."""
    count = len(feeds)
    aside = range(_ASIDE - 1, count, _ASIDE)
    if not aside and count > 1:
        aside = range(count - 1, count)
    fit = [index for index in range(count) if index not in aside]
    runs = _runs_of(feeds, fit, joining)
    fitting = len(runs)
    runs += _runs_of(feeds, aside, joining)
    return runs, _Split(tuple(range(fitting)), tuple(range(fitting, len(runs))))


def _runs_of(feeds: Sequence[Feed], part: Sequence[int], joining: Joining) -> list[tuple[int, ...]]:
    """The runs of some of the samples, which are looked at one after the other."""
    runs = joining.runs(Lazy(len(part), lambda place: feeds[part[place]]))
    return [tuple(part[place] for place in run) for run in runs]


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
    joining: Joining,
) -> _Known | None:
    """Where the stages of an earlier run are that had the same models and samples."""
    if pieces is None:
        return None
    start = [(group.matrix.name, pair) for group, pair in pairs.items()]
    fishers = [layer.fisher for layer in layers]
    whole = fingerprint(model, whole=True)
    ways = joining.size > 1, joining.cuts
    return _Known(pieces, pieces.key("refitted", whole, start, fishers, feeds, mask, *ways))


def _refitted(
    stage: RefitStage,
    original: Walk,
    compressed: Walk,
    masks: Sequence[npt.NDArray[np.bool_] | None],
    split: _Split,
    current: Mapping[Group, Factors],
    memory: Memory | None,
) -> tuple[Factors | None, ...]:
    """The best new pair of each layer of a stage; None where the old one is as good."""
    parts = [(compressed, split.fit), (compressed, split.aside)]
    sums, judging = _sums(stage, original, parts, masks)
    room = None if memory is None else memory.planned()
    found = ridge_pairs(current, sums, judging, room)
    if len(stage.places) > 1:
        walks = original.fork(split.aside), compressed.fork(split.aside)
        found = _in_place(stage, found, judging, *walks, [masks[run] for run in split.aside])
    best = []
    for layer in stage.layers:
        better = [pair for pair in found[layer.group] if gain(pair) > 0.0]
        best.append(max(better, key=gain, default=None))
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
        found: for each layer several refits, or none; those of one place go together.
        judging: of the same samples, with the old pairs in place.
        original: where the targets come from.
        compressed: with the old pairs.
        masks: for each run the rows that count.
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
            moved(own[group], judging[group], others[group])
            for own, others in zip(tried, there, strict=True)
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
        parts: for each regression where the inputs come from, and the runs that it has.
        masks: for each run the rows that count.
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
        for (walk, runs), sums in zip(parts, found, strict=True):
            live = walks[id(walk)].live
            keeps = _fitting(stage.layers[0].readers[index].value, live, masks)
            for run in runs:
                before, after = original.live[run], live[run]
                for layer in stage.layers:
                    rows = layer.readers[index].rows(before, after, keeps[run])
                    sums[layer.group].add(*rows)
    return found


def _fitting(
    name: str, live: Sequence[Values], masks: Sequence[npt.NDArray[np.bool_] | None]
) -> Sequence[npt.NDArray[np.bool_] | None]:
    """The masks, or none of them: of runs of several lengths one may fit a value by chance."""
    for mask, values in zip(masks, live, strict=True):
        if mask is not None and spread_mask(mask, values.shape(name)) is None:
            return [None] * len(masks)
    return masks


def _put(walk: Walk, group: Group, pair: Factors) -> None:
    """Let a walk use the product of a pair in place of its weight."""
    for name, array in pair.constants(group).items():
        walk.replace(name, array)
