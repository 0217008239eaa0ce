"""Fisher: how each layer's errors change the model's outputs, by derivatives.

Of every sample a random direction of the outputs is taken back through the model; the second
moments of what arrives at a layer's output say which of its errors matter
(`onnx_lowrank.numerics.fisher`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnx_lowrank.autodiff.gradient import (
    Gradients,
    Loss,
    depends,
    differentiable,
    gradient_model,
    read_ranks,
)
from onnx_lowrank.data.cache import cache_outputs, output_shares
from onnx_lowrank.data.joining import APART, Joining
from onnx_lowrank.data.samples import Lazy, largest
from onnx_lowrank.errors import DerivativeError
from onnx_lowrank.fitting.batches import Batches, batch_size, joined, wide
from onnx_lowrank.graph.constant import FLOATS
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.graph.spool import Spool
from onnx_lowrank.graph.walk import node_name
from onnx_lowrank.maps.find import Group
from onnx_lowrank.numerics.arrays import Array, Feed
from onnx_lowrank.numerics.fisher import Fisher, folded
from onnx_lowrank.numerics.moments import BLOCK, Accumulator, passes
from onnx_lowrank.numerics.parallel import map_layers
from onnx_lowrank.progress import Advance
from onnx_lowrank.runtime.kept import Kept
from onnx_lowrank.runtime.memory import Memory
from onnx_lowrank.runtime.shelf import Shelf
from onnx_lowrank.runtime.taps import OpenModel, Runner

__all__ = ["Felt", "felt"]


# How often directions are drawn from the same samples, at most.
_ROUNDS = 8
# Samples of a batch, where they can be put together.
_BATCH = 16
# Each row of an output (the classes of a position) has a direction of its own; so many of a sample
# count, as rows of one sample are alike.
_ROWS = 16
# The gradients of a direction at all positions are folded into so many rows: what is multiplied is
# fewer rows then, and G is off by 6 % more than so many directions leave it.
_FOLDED = 8
# Moments that are added up at once take at most this share of what may be held.
_SHARE = 0.25
# Bytes of rows that wait to be multiplied; those above which what is found waits in a file.
_WAITING, _LARGE = 1 << 28, 1 << 30


@dataclass(frozen=True, eq=False)
class Felt:
    """The gradients that were gathered.

    Attributes:
        found: the coordinates of each group's outputs.
        left: name of a node -> why there are none for its group.
        draws: how many random directions were taken back.
        notes: what else the user should know.
    """

    found: Mapping[Group, Fisher]
    left: Mapping[str, str]
    draws: int
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class _Tap:
    """Where a group's outputs are."""

    group: Group
    value: str
    read: Callable[[Array], Array]


class _Rows:
    """Reads gradients at the rows ``x·W``, but for a scale, from those at nodes' outputs."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng, self._plain = rng, set[_Tap]()

    def of(self, tap: _Tap, gradient: Array, most: int) -> Array:
        """The rows, or at most so many that stand for them."""
        rows = tap.read(gradient)
        if tap not in self._plain:
            # What the node adds to x·W is taken off outputs, and has no part in their gradient.
            added = tap.read(np.zeros_like(gradient))
            if added.any():
                rows = rows - added
            else:
                self._plain.add(tap)
        if len(rows) > most:
            return folded(rows, most, self._rng)
        # Rows of padding are zeros: they would only scale the second moments.
        felt = rows.any(axis=1)
        return rows if felt.all() or not felt.any() else rows[felt]


def felt(
    model: ir.Model,
    constants: Constants,
    groups: Sequence[Group],
    feeds: Sequence[Feed],
    mask: str | None,
    open_model: OpenModel,
    advance: Advance,
    seed: int = 0,
    draws: int = 2048,
    memory: Memory | None = None,
    logits: Sequence[str] = (),
    joining: Joining = APART,
) -> Felt:
    """The Fisher information of the outputs of layers.

    Args:
        model: the model; it is not changed.
        constants: resolver of its constants.
        groups: the layers.
        feeds: samples, each of which counts alike.
        mask: input whose zeros mark what of the outputs does not count, where its shape fits.
        open_model: makes a runner of a model that gives its outputs by name.
        advance: called so that the numbers add up to one for each sample.
        seed: of the random directions.
        draws: how many of them, about, as far as there are samples for it; a sample whose outputs
            have several rows gives some at once.
        memory: what may be held; default: without a limit.
        logits: values whose shares of classes are what is felt, in place of the outputs: then it is
            the Fisher information of the classes, by classes that are drawn from the shares.
        joining: what of the samples is padding that is cut off.

    Raises:
        ShortError: the derivatives of one sample do not fit in memory.
        DerivativeError: an operator behind a layer has no derivative (it is named), or the layers
            do not change an output that is a float.
    """
    taps, left = _taps(model, constants, groups)
    sizes = {tap.group: tap.group.shape[2] for tap in taps}
    memory = memory or Memory()
    room = memory.room()
    parts = passes(sizes, None if room is None else int(_SHARE * room))
    fitting = {group for part in parts for group in part}
    left |= {_name(group): "it has too many outputs" for group in sizes if group not in fitting}
    taps = [tap for tap in taps if tap.group in fitting]
    if not taps:
        advance(len(feeds))
        return Felt({}, left, 0, ())
    base = differentiable(model, ())
    widened = Lazy(len(feeds), lambda index: wide(feeds[index]))  # as the copy reads them
    names = list(dict.fromkeys(tap.value for tap in taps))
    reached = depends(base, names)
    if logits:
        outputs = [name for name in logits if any(v.name == name for v in reached)]
    else:
        outputs = [v.name or "" for v in base.graph.outputs if v in reached and v.dtype in FLOATS]
    if not outputs:
        raise DerivativeError("no output of the model is a float that depends on a layer")
    source = Kept(base, outputs, open_model)
    shares = output_shares(outputs, cache_outputs(base))
    ranks = read_ranks(base, names, open_model, widened[0])

    def opened(part: Mapping[Group, int]) -> tuple[Gradients, Runner]:
        wanted = list(dict.fromkeys(tap.value for tap in taps if tap.group in part))
        gradients = gradient_model(base, outputs, wanted, ranks)
        return gradients, open_model(gradients.model)

    directions = _drawn_classes if logits else _directions
    gradients, run = opened(parts[0])
    first = [widened[largest(feeds)]]
    largest_one = Batches(first, mask, outputs, source, shares).inputs(0)
    # The sums, and what a block of rows adds to them in float32.
    sums = max(sum(12 * n * n for n in part.values()) for part in parts)
    size = batch_size(run, largest_one, _BATCH, memory, beside=sums)
    each = _rows(largest_one, outputs) / _samples(first[0])
    each = min(_ROWS, max(1, int(each)))
    shelf = Shelf(memory)
    (batches,), notes = joined(base, [widened], size, source.read, shelf, joining)
    drawn = each * sum(_samples(feed) for feed in batches)
    rounds = min(_ROUNDS, max(1, round(draws / drawn)))
    chosen = batches[:: max(1, round(drawn / draws))]
    targets = Batches(chosen, mask, outputs, source, shares, shelf)
    targets.compute()
    source.close()  # it holds the weights once more, and moments need the room
    order = list(range(len(chosen))) * rounds
    draws = each * sum(_samples(chosen[index]) for index in order)
    roots = sum(8 * size * size for size in sizes.values())
    planned = memory.planned()
    large = roots > _LARGE or (planned is not None and roots > _SHARE * planned)
    rng, total, done = np.random.default_rng(seed), len(parts) * len(order), 0
    found: dict[Group, Fisher] = {}
    rows = _Rows(np.random.default_rng(seed))
    for number, part in enumerate(parts):
        own = [tap for tap in taps if tap.group in part]
        if number:
            gradients, run = opened(part)
        block = max(1, min(BLOCK, _WAITING // (4 * sum(part.values()))))
        adding = {group: Accumulator(size, block=block) for group, size in part.items()}
        for index in order:
            inputs = targets.inputs(index)
            given = run({**inputs, **directions(inputs, outputs, rng)})
            most = _FOLDED * each * _samples(chosen[index])
            for tap in [tap for tap in own if tap.value in gradients.outputs]:
                try:
                    gradient = given[gradients.outputs[tap.value]]
                    adding[tap.group].add(rows.of(tap, gradient, most))
                except FloatingPointError as error:
                    raise DerivativeError(
                        f"the gradient at the output of {_name(tap.group)!r} holds {error}"
                    ) from error
            done += 1
            advance(len(feeds) * done // total - len(feeds) * (done - 1) // total)

        def rooted(group: Group, adding: dict[Group, Accumulator] = adding) -> Fisher | str:
            moments = adding.pop(group).moments()
            if moments is None:
                return "no output of the model depends on it"
            if not moments.trace > 0.0:
                return "its gradients are zero on every sample"
            return Fisher.of(moments.second, draws)

        with Spool(memory.folder) as spool:
            largest_first = sorted(part, key=part.__getitem__, reverse=True)
            for group, fisher in map_layers(rooted, largest_first, _root_memory, room=room):
                if isinstance(fisher, str):
                    left[_name(group)] = fisher
                else:
                    found[group] = _spooled(fisher, spool) if large else fisher
    return Felt(found, left, draws, notes)


def _root_memory(group: Group) -> int:
    """Bytes that the root of a group's moments takes, with what it is made of."""
    return 3 * 8 * group.shape[2] ** 2


def _spooled(fisher: Fisher, spool: Spool) -> Fisher:
    if fisher.root is None:
        return fisher
    return Fisher(np.asarray(spool.store(fisher.root, "fisher").numpy()))


def _taps(
    model: ir.Model, constants: Constants, groups: Sequence[Group]
) -> tuple[list[_Tap], dict[str, str]]:
    found: list[_Tap] = []
    left: dict[str, str] = {}
    for group in groups:
        own: list[_Tap] = []
        for member in group.members:
            site = member.site
            read, value = site.form.mapped(site, constants), site.node.outputs[0].name
            if member.transposed:
                left[_name(group)] = "its weight is also read transposed"
            elif site.node.graph is not model.graph:
                left[_name(group)] = "it is inside a subgraph or function"
            elif value is None or read is None:
                left[_name(group)] = f"form {site.form.name} does not tell its rows of x·W"
            else:
                own.append(_Tap(group, value, read))
        if len(own) == len(group.members):
            found += own
    return found, left


def _directions(inputs: Feed, outputs: Sequence[str], rng: np.random.Generator) -> dict[str, Array]:
    """Targets t from which the losses ``Σ w (y − t)²`` change by ``√w r`` with y, r of signs.

    Args:
        inputs: of the model with the losses; its targets are the outputs y themselves.
        outputs: what the losses are of.
        rng: draws r.
    """
    found = {}
    for names in map(Loss.of, outputs):
        y, weight = inputs[names.target], inputs[names.weight]
        signs = rng.integers(0, 2, y.shape, np.int8).astype(np.float32) * 2.0 - 1.0
        half = np.zeros_like(weight)
        np.divide(0.5, np.sqrt(weight), out=half, where=weight > 0.0)
        found[names.target] = y - signs * half
    return found


def _drawn_classes(
    inputs: Feed, outputs: Sequence[str], rng: np.random.Generator
) -> dict[str, Array]:
    """Targets t from which the losses ``Σ w (y − t)²`` change by ``p − e`` with the logits y.

    p is softmax y and e a class that is drawn from it: the second moments of that gradient of log p
    are the Fisher information of the classes, which is what their divergence feels of small errors
    (Martens, "New insights and perspectives on the natural gradient method", JMLR 21, 2020).
    Rows that do not count have none.

    Args:
        inputs: as for `_directions`.
        outputs: the logits.
        rng: draws the classes.
    """
    found = {}
    for names in map(Loss.of, outputs):
        y, weight = inputs[names.target], inputs[names.weight]
        p = np.exp(y - y.max(axis=-1, keepdims=True))
        p /= p.sum(axis=-1, keepdims=True)
        drawn = rng.random((*y.shape[:-1], 1), np.float32)
        # The last class where rounding leaves the sum below what was drawn.
        chosen = np.minimum((np.cumsum(p, axis=-1) < drawn).sum(axis=-1), y.shape[-1] - 1)
        np.put_along_axis(
            p, chosen[..., None], np.take_along_axis(p, chosen[..., None], axis=-1) - 1.0, axis=-1
        )
        half = np.zeros_like(weight)
        np.divide(0.5, weight, out=half, where=weight > 0.0)
        found[names.target] = y - p * half
    return found


def _samples(feed: Feed) -> int:
    """How many samples a batch holds: where all inputs have as many along axis 0."""
    sizes = {array.shape[0] if array.ndim else 1 for array in feed.values()}
    return sizes.pop() if len(sizes) == 1 else 1


def _rows(inputs: Feed, outputs: Sequence[str]) -> int:
    """Rows of the output that has most of them."""
    shapes = [inputs[Loss.of(name).target].shape for name in outputs]
    return max(math.prod(shape[:-1]) for shape in shapes)


def _name(group: Group) -> str:
    return node_name(group.members[0].site.node)
