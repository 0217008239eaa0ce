"""Gather: run the samples and add up the moments of what every linear map multiplies.

The model is run with the activations of its linear maps as outputs.  The samples are summed in
parts whose size depends on their number alone, and the parts are added in their order: so the
moments are the same to the last bit whether the parts are summed here or by the workers of an
executor.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import onnx
import onnx_ir as ir

from onnx_lowrank.data.joining import APART, Joining
from onnx_lowrank.data.mask import kept_rows
from onnx_lowrank.data.samples import Lazy
from onnx_lowrank.errors import InputError, named
from onnx_lowrank.fitting.parts import Kind, Part, parts_of
from onnx_lowrank.fitting.passes import planned_passes, too_large
from onnx_lowrank.fitting.statistics import (
    ByKind,
    BySlice,
    Gathering,
    gathering_of,
    waiting,
)
from onnx_lowrank.fitting.streams import (
    MomentsKey,
    Stream,
    masked_names,
    streams_by_key,
    streams_of,
)
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.graph.fingerprint import fingerprint
from onnx_lowrank.graph.spool import Spool
from onnx_lowrank.graph.walk import node_name
from onnx_lowrank.maps.find import Group, find
from onnx_lowrank.maps.forms import Site, all_forms, chosen_forms
from onnx_lowrank.numerics.arrays import Array, Feed
from onnx_lowrank.numerics.crew import Crew
from onnx_lowrank.numerics.moments import Accumulator, Sums
from onnx_lowrank.numerics.parallel import map_layers
from onnx_lowrank.progress import Advance
from onnx_lowrank.runtime.log import OrtLog
from onnx_lowrank.runtime.memory import Memory
from onnx_lowrank.runtime.pieces import Bookmark, Pieces
from onnx_lowrank.runtime.session import open_session
from onnx_lowrank.runtime.session import run as run_session
from onnx_lowrank.runtime.taps import OpenModel, Runner, tapped, tapped_model

__all__ = ["Away", "GatheringState", "gather"]


@dataclass(frozen=True, eq=False)
class Away:
    """How parts of the samples are summed elsewhere.

    Attributes:
        crew: whose executor does it.
        packed: a model as the bytes of a file; None where it cannot be sent.
        threads: of a session.
        ops: the forms that were looked for, as the user names them.
        constant_inputs: whether weights that are also inputs are constants.
    """

    crew: Crew
    packed: Callable[[ir.Model], bytes | None]
    threads: int
    ops: tuple[str, ...] | None = None
    constant_inputs: bool = False


@dataclass(frozen=True, eq=False)
class GatheringState:
    """How far the samples were run.

    Attributes:
        passes: that are done.
        parts: of the pass after them that are done.
        moments: of kinds of samples that are done.
        totals: sums over the parts that are done, of the kind that is not, by stream.
        masked: whether the mask fitted an activation.
    """

    passes: int
    parts: int
    moments: Mapping[tuple[MomentsKey, Kind], BySlice]
    totals: Mapping[MomentsKey, tuple[Sums | None, ...]]
    masked: bool


@dataclass(frozen=True, eq=False)
class _Summed:
    """What a part adds.

    Attributes:
        sums: of each stream, by slice.
        masked: whether the mask fitted an activation.
    """

    sums: Mapping[MomentsKey, tuple[Sums | None, ...]]
    masked: bool


@dataclass(frozen=True, eq=False)
class _Errand:
    """A part that is summed by a worker, with all that it takes.

    Attributes:
        model: gives the activations out.
        part: the samples, all in memory.
        keys: the streams.
        mask: input whose zeros mark rows to leave out.
        block: rows that are multiplied at a time.
        threads: of the session.
        ops: as in `Away`.
        constant_inputs: as in `Away`.
        joining: how samples go together in one run.
    """

    model: bytes
    part: Part
    keys: tuple[MomentsKey, ...]
    mask: str | None
    block: int
    threads: int
    ops: tuple[str, ...] | None
    constant_inputs: bool
    joining: Joining


def gather(
    model: ir.Model,
    groups: Sequence[Group],
    open_model: OpenModel,
    fit: Sequence[Feed],
    held: Sequence[Feed],
    mask: str | None,
    advance: Advance,
    memory: Memory | None = None,
    *,
    aside: Collection[int] = (),
    must_fit: bool = True,
    away: Away | None = None,
    pieces: Pieces | None = None,
    joining: Joining = APART,
) -> Gathering:
    """Run the samples and add up the moments.

    Args:
        model: the model; it is not changed.
        groups: whose activations are wanted.
        open_model: makes a runner of a model that gives its outputs by name.
        fit: samples to fit to.
        held: samples to judge with.
        mask: input whose zeros mark rows to leave out.
        advance: called so that the numbers add up to one for each sample.
        memory: what may be held, and where moments wait that do not fit; default: no limit.
        aside: numbers of samples to fit to that a search judges with, whose moments are wanted
            apart as well.
        must_fit: whether a mask that fits no activation is an error.
        away: how parts are summed elsewhere; default: all are summed here.
        pieces: where an earlier run keeps moments, of all samples or of the first ones; None for
            no such place.
        joining: how samples go together in one run.

    Raises:
        InputError: an activation holds NaN or Inf, the mask does not fit or masks everything, one
            sample does not fit in memory, or a part was lost.
    """
    streams, _ = streams_of(model, groups)
    total, memory, key = len(fit) + len(held), memory or Memory(), ""
    if not streams:
        advance(total)
        return Gathering({})
    if mask is not None:
        _check_mask(mask, fit)
    if pieces is not None:
        known = fingerprint(model, whole=True), list(streams), fit, held, mask, must_fit
        ways = joining.size > 1, joining.cuts, sorted(aside)
        key = pieces.key("moments", *known, *ways)
        earlier: ByKind | None = pieces.load("moments", key)
        if earlier is not None:
            advance(total)
            size = sum(one.second.nbytes for own in earlier.values() for one in own if one)
            with Spool(memory.folder) as spool:
                place = spool if too_large(2 * size, memory) else None
                kept = {of: waiting(own, place) for of, own in earlier.items()}
                return gathering_of(kept, streams, place, apart=bool(aside))
    parts = parts_of(fit, held, aside)
    kinds = len({part.kind for part in parts}) + bool(aside)
    every = Lazy(total, lambda index: held[index - len(fit)] if index >= len(fit) else fit[index])
    plan = planned_passes(model, streams, open_model, every, memory, joining.size, kinds)
    joining, bookmark = replace(joining, size=plan.size), None
    begun: GatheringState | None = None
    if pieces is not None:  # passes and blocks are planned by the memory there is
        planned = [list(chosen) for chosen in plan.passes]
        digest = pieces.key("gathering", key, planned, plan.block, plan.size)
        bookmark = Bookmark(pieces, "gathering", digest)
        begun = bookmark.load()
    moments, masked, done = ByKind(), False, 0
    with Spool(memory.folder) as spool:
        place = spool if plan.waits else None
        if begun is not None:
            masked = begun.masked
            moments |= {of: waiting(own, place) for of, own in begun.moments.items()}
        for number, chosen in enumerate(plan.passes):
            first, adding = 0, _Adding(chosen, plan.block)
            if begun is not None and number <= begun.passes:
                first = begun.parts if number == begun.passes else len(parts)
                if number == begun.passes:
                    adding.add(begun.totals)
            for part in parts[:first]:
                done = _advanced(advance, done, len(part.feeds), len(plan.passes))
            left = parts[first:]
            summed = _summed(model, chosen, open_model, left, mask, plan.block, away, joining)
            for index, (part, found) in enumerate(summed, first + 1):
                masked |= found.masked
                adding.add(found.sums)
                if index == len(parts) or parts[index].kind != part.kind:
                    for stream_key, own in adding.closed():
                        moments[stream_key, part.kind] = waiting(own, place)
                done = _advanced(advance, done, len(part.feeds), len(plan.passes))
                if bookmark is not None:
                    bookmark.save(partial(_state, number, index, moments, adding, masked))
        assert done == total * len(plan.passes)
        if mask is not None and must_fit and not masked:
            shape = list(fit[0][mask].shape)
            raise InputError(
                f"{named('mask', mask)}: its shape {shape} fits no activation to calibrate"
            )
        if pieces is not None and bookmark is not None:
            pieces.save("moments", key, moments)
            bookmark.drop()
        return gathering_of(moments, streams, place, apart=bool(aside))


class _Adding:
    """Adds up the moments of one kind of samples after the other."""

    def __init__(self, streams: Mapping[MomentsKey, Stream], block: int) -> None:
        """Nothing yet.

        Args:
            streams: of one pass.
            block: rows that are multiplied at a time.
        """
        self._streams, self._block = streams, block
        self._adding: dict[MomentsKey, list[Accumulator]] = {}

    def add(self, sums: Mapping[MomentsKey, tuple[Sums | None, ...]]) -> None:
        """Add the sums over some rows, by stream and slice."""
        for key, own in sums.items():
            if key not in self._adding:
                self._adding[key] = self._streams[key].accumulators(self._block)
            for accumulator, part in zip(self._adding[key], own, strict=True):
                accumulator.merge(part)

    def closed(self) -> Iterator[tuple[MomentsKey, BySlice]]:
        """The moments, in place of what they were added up in; then the next kind may come."""
        for key in list(self._adding):
            yield key, tuple(accumulator.moments() for accumulator in self._adding.pop(key))

    def totals(self) -> dict[MomentsKey, tuple[Sums | None, ...]]:
        """What is added up so far."""
        return {key: tuple(one.total for one in own) for key, own in self._adding.items()}


def _advanced(advance: Advance, done: int, samples: int, passes: int) -> int:
    """Say that samples of one of several passes are done, and how many are now."""
    advance((done + samples) // passes - done // passes)
    return done + samples


def _state(
    passes: int, parts: int, moments: ByKind, adding: _Adding, masked: bool
) -> GatheringState:
    return GatheringState(passes, parts, dict(moments), adding.totals(), masked)


def _summed(
    model: ir.Model,
    streams: Mapping[MomentsKey, Stream],
    open_model: OpenModel,
    parts: Sequence[Part],
    mask: str | None,
    block: int,
    away: Away | None,
    joining: Joining,
) -> Iterator[tuple[Part, _Summed]]:
    """What every part adds, in their order."""
    if not parts:
        return
    names = [name for stream in streams.values() for name in stream.sites]
    copy = None if away is None else tapped_model(model, names)
    packed = None if away is None or copy is None else away.packed(copy)
    if away is None or packed is None:
        run = tapped(model, names, open_model)
        for part in parts:
            yield part, _sums(run, streams, part, mask, block, joining)
        return
    whole = packed

    def given(part: Part) -> _Errand:
        there = replace(part, feeds=[dict(feed) for feed in part.feeds])
        own = away.threads, away.ops, away.constant_inputs, joining
        return _Errand(whole, there, tuple(streams), mask, block, *own)

    size = len(whole) + sum(stream.memory // 2 for stream in streams.values())
    yield from away.crew.map(summed_elsewhere, parts, given, lambda _: size)


def summed_elsewhere(errand: _Errand) -> _Summed:
    """What a part adds, by a worker that has nothing but the errand."""
    model = ir.from_proto(onnx.load_from_string(errand.model))
    constants = Constants(model, errand.constant_inputs)
    groups = find(model, constants, all_forms(), chosen_forms(errand.ops)).groups
    each = [own for group in groups for own in dict.fromkeys((group, *group.maps))]
    streams = streams_by_key(model, each, errand.keys)
    session = open_session(errand.model, threads=errand.threads, planned=False, log=OrtLog())
    wanted = {item.name for item in session.get_inputs()}

    def run(feed: Feed) -> Feed:
        given = {name: array for name, array in feed.items() if name in wanted}
        return {**feed, **run_session(session, given, "the model with its activations as outputs")}

    return _sums(run, streams, errand.part, errand.mask, errand.block, errand.joining)


def _sums(
    run: Runner,
    streams: Mapping[MomentsKey, Stream],
    part: Part,
    mask: str | None,
    block: int,
    joining: Joining,
) -> _Summed:
    """What a part adds.

    Raises:
        InputError: an activation holds NaN or Inf.
    """
    adding = {key: stream.accumulators(block) for key, stream in streams.items()}
    masked = False
    fits = None
    if joining.cuts:  # a mask may fit a short sample by chance
        whole = part.feeds[0]
        fits = masked_names(streams.values(), run(whole), kept_rows(whole, mask))
    for numbers in joining.runs(part.feeds):
        feed = joining.joined([part.feeds[number] for number in numbers])
        keep = kept_rows(feed, mask)
        outputs, counted = run(feed), dict[Hashable, Array | None]()
        for key, stream in streams.items():
            for name, site in stream.sites.items():
                counts = keep if fits is None or name in fits else None
                try:
                    masked |= stream.add(outputs[name], counts, adding[key], counted)
                except FloatingPointError as error:
                    for number in sorted(numbers) if len(numbers) > 1 else ():
                        own = (part.numbers[number],), [part.feeds[number]]
                        one = Part(part.kind, *own)
                        _sums(run, streams, one, mask, block, replace(joining, size=1))
                    raise _not_finite(site, error, part.where(numbers[:1])) from error

    def multiplied(key: MomentsKey) -> tuple[Sums | None, ...]:
        try:
            return tuple(accumulator.part() for accumulator in adding.pop(key))
        except FloatingPointError as error:
            where = part.where(range(len(part.feeds)))
            raise _not_finite(streams[key].site, error, where) from error

    # One thread a stream: the threads of one product would wait for each other.
    sums = dict(map_layers(multiplied, list(streams), lambda _: 0))
    return _Summed(sums, masked)


def _not_finite(site: Site, error: FloatingPointError, where: str) -> InputError:
    return InputError(
        f"calibration: the input of {node_name(site.node)!r} holds {error} in {where}"
    )


def _check_mask(mask: str, samples: Sequence[Feed]) -> None:
    if mask not in samples[0]:
        raise InputError(
            f"{named('mask', mask)}: expected one of the inputs {', '.join(samples[0])}"
        )
    if not any(np.any(feed[mask] != 0) for feed in samples):
        raise InputError(f"{named('mask', mask)}: masks all rows of all {len(samples)} samples")
