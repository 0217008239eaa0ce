"""Calibrate: second moments of what every linear map really multiplies.

The model is run on the samples with the activations of its linear maps as outputs; activations
that several maps read in the same way (Q, K and V) are gathered once.  The result is two sets of
moments: those that the factors are fitted to, and those of held-out samples that judge the fit.
Activations that only ever meet the same weights, as the steps of an unrolled loop do, are added up
in one place.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from onnx_lowrank.data.mask import kept_rows, spread_mask
from onnx_lowrank.data.samples import largest
from onnx_lowrank.errors import InputError, named
from onnx_lowrank.graph.spool import Spool
from onnx_lowrank.graph.walk import node_name
from onnx_lowrank.maps.find import Group
from onnx_lowrank.maps.forms import Site
from onnx_lowrank.numerics.arrays import Array, Feed
from onnx_lowrank.numerics.components import Basis
from onnx_lowrank.numerics.felt import Weigh, plainly
from onnx_lowrank.numerics.fisher import PLAIN, Fisher
from onnx_lowrank.numerics.moments import BLOCK, Accumulator, Moments
from onnx_lowrank.phrases import listed
from onnx_lowrank.progress import Advance
from onnx_lowrank.runtime.memory import Memory, gigabytes
from onnx_lowrank.runtime.taps import OpenModel, look, tapped

__all__ = [
    "MEMORY",
    "Gathered",
    "MomentsKey",
    "Statistics",
    "gather",
    "statistics_of",
]

MomentsKey = tuple[str, str, int]
"""Whose moments: the names of activations, how they are read, and the slices."""

# Accumulators of one pass over the samples; moments above this wait in a file.
MEMORY = 1 << 30
# Rows that wait to be multiplied take at most this share of what may be held.
_WAITING = 0.25
# With fewer rows than this many times m the moments are uncertain: they are shrunk, with a note.
_FEW = 1.0


@dataclass(frozen=True, eq=False)
class Gathered:
    """Moments of a stream of activations, one for each slice, None where there was no row.

    Attributes:
        fit: of the samples to fit to.
        held: of held-out samples.
    """

    fit: tuple[Moments | None, ...]
    held: tuple[Moments | None, ...]

    def joined(self, other: Gathered) -> Gathered:
        """With the samples of another gathering to fit to as well."""
        both = zip(self.fit, other.fit, strict=True)
        return Gathered(tuple(Moments.combined(parts) for parts in both), self.held)


@dataclass(frozen=True, eq=False)
class Statistics:
    """Moments of the activations of groups, one for each slice of their matrix.

    Attributes:
        fit: what the factors are fitted to.
        held: of held-out samples; empty where there were none.
        missing: why a group has none: it is factored by its weight alone.
        notes: what else the user should know.
        fisher: how errors of the groups' outputs change the model's outputs, where factors are
            fitted to that.
        felt: the same where it is known, whatever factors are fitted to.
        bases: leading components of groups, one basis for each slice, where they were found with
            these moments already.
    """

    fit: Mapping[Group, tuple[Moments, ...]] = field(default_factory=dict)
    held: Mapping[Group, tuple[Moments, ...]] = field(default_factory=dict)
    missing: Mapping[Group, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    fisher: Mapping[Group, Fisher] = field(default_factory=dict)
    felt: Mapping[Group, Fisher] = field(default_factory=dict)
    bases: Mapping[Group, tuple[Basis, ...]] = field(default_factory=dict)

    def inputs(self, group: Group) -> tuple[Moments, ...] | None:
        """What a group's factors are fitted to; None fits them to the weight alone.

        The second map of a pair reads ``X·A``: without samples it is fitted for inputs X that are
        all alike, whose products have the moments ``AᵀA``.  That is the best for ``A·B`` as a whole
        (the singular values of ``A·B`` are those of ``R·B``, ``A = Q·R``), and never makes it.
        """
        known = self.fit.get(group)
        if known is not None or group.head is None:
            return known
        a = group.head.matrix.numpy()[0].astype(np.float64)
        return (Moments(a.T @ a, np.zeros(a.shape[1]), 0),)

    def coordinates(self, group: Group) -> Fisher:
        """In what coordinates of its outputs a group's errors count alike."""
        return self.fisher.get(group, PLAIN) if group in self.fit else PLAIN

    def weigh(self, group: Group) -> Weigh:
        """Multiplies with what is felt of a group's outputs, in its coordinates."""
        if self.coordinates(group).known:  # where every error is felt alike
            return plainly
        return self.felt.get(group, PLAIN).weighed


class _Stream:
    """The vectors of activations that the same groups multiply, read in one way."""

    def __init__(self, sites: Mapping[str, Site]) -> None:
        """Takes one site for each activation, by the activation's name."""
        self.sites = sites
        self.site = next(iter(sites.values()))
        self.fit: list[Accumulator] = []
        self.held: list[Accumulator] = []

    def open(self, block: int) -> None:
        site = self.site
        for accumulators in (self.fit, self.held):
            accumulators.extend(
                Accumulator(site.m, diagonal=site.form.indices, block=block)
                for _ in range(site.slices)
            )

    def close(self, spool: Spool | None) -> Gathered:
        """The moments, in place of what they were added up in."""
        parts = []
        for accumulators in (self.fit, self.held):
            found = [accumulator.moments() for accumulator in accumulators]
            accumulators.clear()
            if spool is not None:
                found = [part and _spooled(part, spool) for part in found]
            parts.append(tuple(found))
        return Gathered(*parts)

    @property
    def memory(self) -> int:
        site = self.site
        return 16 * site.slices * (site.m if site.form.indices else site.m * site.m)

    def add(
        self,
        array: Array,
        mask: Array | None,
        accumulators: Sequence[Accumulator],
        counted: dict[Hashable, Array | None],
    ) -> bool:
        """Add an activation's vectors; whether the mask fits it.

        Args:
            array: the activation.
            mask: False where rows do not count.
            accumulators: one for each slice.
            counted: of this mask, which vectors count of activations that are read alike.
        """
        form, site = self.site.form, self.site
        rows = form.vectors(site, array)
        key = (type(form), form.reading(site), array.shape)
        if key not in counted:
            spread = None if mask is None else spread_mask(mask, array.shape)
            counts = None if spread is None else form.vectors(site, spread)
            # Read as the activation is; a vector counts if any of its elements does.
            counted[key] = (
                counts if counts is None or form.indices else np.asarray(counts.any(axis=-1))
            )
        counts = counted[key]
        for index, accumulator in enumerate(accumulators):
            accumulator.add(rows[index] if counts is None else rows[index][counts[index]])
        return counts is not None


def _spooled(moments: Moments, spool: Spool) -> Moments:
    second = np.asarray(spool.store(moments.second, "moments").numpy())
    return Moments(second, moments.mean, moments.rows)


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
    must_fit: bool = True,
) -> dict[MomentsKey, Gathered]:
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
        must_fit: whether a mask that fits no activation is an error.

    Raises:
        InputError: an activation holds NaN or Inf, or the mask does not fit or masks everything.
    """
    streams, _ = _streams(model, groups)
    if not streams:
        advance(len(fit) + len(held))
        return {}
    if mask is not None:
        _check_mask(mask, fit)
    memory = memory or Memory()
    passes, block = _planned(model, streams, open_model, (*fit, *held), memory)
    total, done, masked = len(fit) + len(held), 0, False
    gathered: dict[MomentsKey, Gathered] = {}
    with Spool(memory.folder) as spool:
        for chosen in passes:
            for stream in chosen.values():
                stream.open(block)
            names = [name for stream in chosen.values() for name in stream.sites]
            run = tapped(model, names, open_model)
            for samples, kind in ((fit, "fit"), (held, "held-out")):
                for number, feed in enumerate(samples):
                    keep = kept_rows(feed, mask)
                    outputs, counted = run(feed), dict[Hashable, Array | None]()
                    for stream in chosen.values():
                        into = stream.fit if kind == "fit" else stream.held
                        for name, site in stream.sites.items():
                            try:
                                masked |= stream.add(outputs[name], keep, into, counted)
                            except FloatingPointError as error:
                                which = "" if kind == "fit" else "held-out "
                                raise InputError(
                                    f"calibration: the input of {node_name(site.node)!r} "
                                    f"holds {error} in {which}sample {number}"
                                ) from error
                    done += 1
                    advance(done // len(passes) - (done - 1) // len(passes))
            for key, stream in chosen.items():
                gathered[key] = stream.close(spool if len(passes) > 1 else None)
    assert done == total * len(passes)
    if mask is not None and must_fit and not masked:
        shape = list(fit[0][mask].shape)
        raise InputError(
            f"{named('mask', mask)}: its shape {shape} fits no activation to calibrate"
        )
    return gathered


def _streams(
    model: ir.Model, groups: Sequence[Group]
) -> tuple[dict[MomentsKey, _Stream], dict[Group, list[MomentsKey]]]:
    """What has to be gathered, and what each group needs of it; nothing where it cannot be."""
    sites: dict[MomentsKey, Site] = {}
    readers: dict[MomentsKey, list[Group]] = {}
    members: dict[Group, list[MomentsKey]] = {group: [] for group in groups}
    for group in groups:
        for member in group.members:
            site = member.site
            value = site.form.activation(site)
            if member.transposed or value is None or site.node.graph is not model.graph:
                continue
            key = (value.name or "", repr(site.form.reading(site)), site.slices)
            sites.setdefault(key, site)
            readers.setdefault(key, []).append(group)
    # One accumulator holds m² numbers: an unrolled LSTM would otherwise have one for each step.
    together: dict[tuple[tuple[Group, ...], str, int], dict[str, Site]] = {}
    for key, users in readers.items():
        name, reading, slices = key
        together.setdefault((tuple(users), reading, slices), {})[name] = sites[key]
    streams: dict[MomentsKey, _Stream] = {}
    for (by, reading, slices), found in together.items():
        key = (" ".join(found), reading, slices)
        streams[key] = _Stream(found)
        for group in by:
            members[group].append(key)
    return streams, members


def _planned(
    model: ir.Model,
    streams: Mapping[MomentsKey, _Stream],
    open_model: OpenModel,
    feeds: Sequence[Feed],
    memory: Memory,
) -> tuple[list[dict[MomentsKey, _Stream]], int]:
    """The streams in passes over the samples that fit in memory, and the rows that may wait.

    Raises:
        InputError: what one stream takes on one sample does not fit.
    """
    planned = memory.planned()
    given = dict.fromkeys(streams, 0)  # bytes of activations in the largest sample
    block = BLOCK
    if planned is not None:
        number = largest(feeds)
        names = [name for stream in streams.values() for name in stream.sites]
        shapes = look(model, names, lambda copy: open_model(copy)(feeds[number])).shapes
        for key, stream in streams.items():
            given[key] = sum(4 * math.prod(shapes.get(name, ())) for name in stream.sites)
            if given[key] > planned:
                site = stream.site
                raise InputError(
                    f"calibration: the input of {node_name(site.node)!r} in sample {number} takes "
                    f"{gigabytes(given[key])}, expected at most {gigabytes(planned)} "
                    f"({named('memory')})"
                )
        waiting = sum(4 * BLOCK * s.site.m * s.site.slices for s in streams.values())
        block = max(1, min(BLOCK, int(BLOCK * _WAITING * planned / max(waiting, 1))))
        planned -= int(_WAITING * planned)
    return list(_passes(list(streams.items()), given, planned)), block


def _passes(
    streams: Sequence[tuple[MomentsKey, _Stream]],
    given: Mapping[MomentsKey, int],
    planned: int | None,
) -> Iterator[dict[MomentsKey, _Stream]]:
    """The streams in groups whose accumulators fit in the working memory.

    Args:
        streams: all of them.
        given: bytes of the activations that a stream reads at once.
        planned: bytes that accumulators and activations may take; None if that is not known.
    """
    chosen: dict[MomentsKey, _Stream] = {}
    used = whole = 0
    for key, stream in streams:
        own = stream.memory
        full = planned is not None and whole + own + given[key] > planned
        if chosen and (full or used + own > MEMORY):
            yield chosen
            chosen, used, whole = {}, 0, 0
        chosen[key] = stream
        used += own
        whole += own + given[key]
    if chosen:
        yield chosen


def _check_mask(mask: str, samples: Sequence[Feed]) -> None:
    if mask not in samples[0]:
        raise InputError(
            f"{named('mask', mask)}: expected one of the inputs {', '.join(samples[0])}"
        )
    if not any(np.any(feed[mask] != 0) for feed in samples):
        raise InputError(f"{named('mask', mask)}: masks all rows of all {len(samples)} samples")


def statistics_of(
    model: ir.Model, groups: Sequence[Group], gathered: Mapping[MomentsKey, Gathered]
) -> Statistics:
    """The moments that belong to each group, and why some have none.

    Where all groups that read an activation have a bias of their own, its mean is the centre.
    """
    _, members = _streams(model, groups)
    # Groups with one activation may share their first factor, and so want the same moments.
    fixed = {key for group, keys in members.items() if group.bias is None for key in keys}
    fitted: dict[Group, tuple[Moments, ...]] = {}
    held: dict[Group, tuple[Moments, ...]] = {}
    missing: dict[Group, str] = {}
    few: list[str] = []
    for group, keys in members.items():
        if not keys:
            missing[group] = "its activation is inside a subgraph or function"
            continue
        known = [gathered[key] for key in keys if key in gathered]
        if len(known) < len(keys):
            missing[group] = "the statistics that were loaded do not hold its activation"
            continue
        slices = range(group.shape[0])
        own = [Moments.combined([part.fit[e] for part in known]) for e in slices]
        judged = [Moments.combined([part.held[e] for part in known]) for e in slices]
        fit = tuple(moments for moments in own if moments is not None)
        if len(fit) < len(own):
            missing[group] = "no sample reaches it"
            continue
        if not all(moments.trace > 0.0 for moments in fit):
            missing[group] = "its input is zero on every sample"
            continue
        if min(moments.rows for moments in fit) < _FEW * group.shape[1] and not fit[0].diagonal:
            few.append(node_name(group.members[0].site.node))
        if not fixed.intersection(keys):
            fit = tuple(replace(moments, centre=moments.mean) for moments in fit)
        fitted[group] = fit
        if all(moments is not None and moments.trace > 0.0 for moments in judged):
            held[group] = tuple(moments for moments in judged if moments is not None)
    notes = []
    folded = sum(own[0].centre is not None for own in fitted.values())
    if folded:
        notes.append(
            f"calibration: in {folded} of {len(fitted)} layers, where they are factored, the bias "
            "corrects the error of the pair at the mean of its inputs"
        )
    if few:
        notes.append(
            f"calibration: fewer rows than columns at {listed(few, 2)}; the moments are shrunk, "
            "more samples would help"
        )
    return Statistics(fitted, held, missing, tuple(notes))
