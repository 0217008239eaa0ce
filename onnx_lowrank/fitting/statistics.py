"""Statistics: second moments of what every linear map really multiplies.

They are two sets of moments: those that the factors are fitted to, and those of held-out samples
that judge the fit (see `onnx_lowrank.fitting.gather`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from onnx_lowrank.fitting.parts import Kind
from onnx_lowrank.fitting.streams import MomentsKey, Stream, streams_of
from onnx_lowrank.graph.spool import Spool
from onnx_lowrank.graph.walk import node_name
from onnx_lowrank.maps.find import Group
from onnx_lowrank.numerics.felt import Weigh, plainly
from onnx_lowrank.numerics.fisher import PLAIN, Fisher
from onnx_lowrank.numerics.moments import Moments
from onnx_lowrank.numerics.stacks import Leading
from onnx_lowrank.phrases import listed

__all__ = [
    "ByKind",
    "BySlice",
    "Gathered",
    "Gathering",
    "Statistics",
    "gathering_of",
    "statistics_of",
    "waiting",
]

# With fewer rows than this many times m the moments are uncertain: they are shrunk, with a note.
_FEW = 1.0


BySlice = tuple[Moments | None, ...]
"""Moments of a stream, one for each slice, None where there was no row."""
ByKind = dict[tuple[MomentsKey, Kind], BySlice]
"""Moments of streams by what their samples are for."""


@dataclass(frozen=True, eq=False)
class Gathered:
    """Moments of a stream of activations, one for each slice, None where there was no row.

    Attributes:
        fit: of the samples to fit to.
        held: of held-out samples.
    """

    fit: BySlice
    held: BySlice


@dataclass(frozen=True, eq=False)
class Gathering:
    """Moments of all streams.

    Attributes:
        whole: of all samples to fit to, and of those that are held out.
        apart: the same without the samples that a search keeps aside, and these alone; None where
            none are kept aside.
    """

    whole: Mapping[MomentsKey, Gathered]
    apart: tuple[Mapping[MomentsKey, Gathered], Mapping[MomentsKey, Gathered]] | None = None


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
    bases: Mapping[Group, tuple[Leading, ...]] = field(default_factory=dict)

    def inputs(self, group: Group) -> tuple[Moments, ...] | None:
        """What a group's factors are fitted to; None fits them to the weight alone.

        The second map of a pair reads ``X·A``: without samples it is fitted for inputs X that are
        all alike, whose products have the moments ``AᵀA``.  That is the best for ``A·B`` as a whole
        (the singular values of ``A·B`` are those of ``R·B``, ``A = Q·R``), and never makes it.
        """
        known = self.fit.get(group)
        if known is not None or not group.heads or group.inner is not None:
            return known
        return (Moments.mapped(group.heads[0].matrix.numpy()[0]),)

    def coordinates(self, group: Group) -> Fisher:
        """In what coordinates of its outputs a group's errors count alike."""
        return self.fisher.get(group, PLAIN) if group in self.fit else PLAIN

    def weigh(self, group: Group) -> Weigh:
        """Multiplies with a root of what is felt of a group's outputs, in its coordinates."""
        felt = self.felt.get(group, PLAIN)
        if self.coordinates(group).known or not felt.known:  # where every error is felt alike
            return plainly
        return felt.turned


def gathering_of(
    moments: ByKind, streams: Mapping[MomentsKey, Stream], spool: Spool | None, *, apart: bool
) -> Gathering:
    """The moments of all streams; those of samples that are kept aside are added to the others.

    Args:
        moments: of each stream and kind of samples, as far as there are such samples.
        streams: all of them.
        spool: where sums wait; None for in memory.
        apart: whether samples are kept aside.
    """

    def of(key: MomentsKey, kind: Kind) -> BySlice:
        return moments.get((key, kind), (None,) * streams[key].site.slices)

    alone = {key: Gathered(of(key, "fit"), of(key, "held")) for key in streams}
    if not apart:
        return Gathering(alone)
    aside = {key: Gathered(of(key, "aside"), (None,) * len(own.fit)) for key, own in alone.items()}
    whole = {}
    for key, own in alone.items():
        both = zip(own.fit, aside[key].fit, strict=True)
        whole[key] = Gathered(waiting(map(Moments.combined, both), spool), own.held)
    return Gathering(whole, (alone, aside))


def waiting(moments: Iterable[Moments | None], spool: Spool | None) -> BySlice:
    """Moments, with their matrices in a file where there is one."""

    def stored(part: Moments) -> Moments:
        assert spool is not None
        second = np.asarray(spool.store(part.second, "moments").numpy())
        return Moments(second, part.mean, part.rows)

    return tuple(part and stored(part) if spool is not None else part for part in moments)


def statistics_of(
    model: ir.Model, groups: Sequence[Group], gathered: Mapping[MomentsKey, Gathered]
) -> Statistics:
    """The moments that belong to each group, and why some have none.

    Where all groups that read an activation have a bias of their own, its mean is the centre.
    """
    _, members = streams_of(model, groups)
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
            f"calibration: in {folded} of {len(fitted)} layers the bias corrects what a pair or a "
            "rounding is off by at the mean of the inputs"
        )
    if few:
        notes.append(
            f"calibration: fewer rows than columns at {listed(few, 2)}; the moments are shrunk, "
            "more samples would help"
        )
    return Statistics(fitted, held, missing, tuple(notes))
