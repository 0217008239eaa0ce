"""Streams: the vectors that linear maps multiply, and which of them are gathered together.

Activations that several maps read in the same way (Q, K and V) are gathered once.  Activations that
only ever meet the same weights, as the steps of an unrolled loop do, are added up in one place.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnx_lowrank.data.mask import spread_mask
from onnx_lowrank.maps.find import Group
from onnx_lowrank.maps.forms import Site
from onnx_lowrank.numerics.arrays import Array, Feed
from onnx_lowrank.numerics.moments import Accumulator

__all__ = ["MomentsKey", "Stream", "masked_names", "streams_by_key", "streams_of"]

MomentsKey = tuple[str, str, int]
"""Whose moments: the names of activations, how they are read, and the slices."""


@dataclass(frozen=True, eq=False)
class Stream:
    """The vectors of activations that the same groups multiply, read in one way.

    Attributes:
        sites: one for each activation, by the activation's name.
    """

    sites: Mapping[str, Site]

    @property
    def site(self) -> Site:
        """One that stands for all."""
        return next(iter(self.sites.values()))

    @property
    def memory(self) -> int:
        """Bytes of the moments of samples of one kind."""
        site = self.site
        return 8 * site.slices * (site.m if site.form.indices else site.m * site.m)

    def accumulators(self, block: int) -> list[Accumulator]:
        """New ones, for each slice one, that multiply so many rows at a time."""
        site = self.site
        return [
            Accumulator(site.m, diagonal=site.form.indices, block=block) for _ in range(site.slices)
        ]

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
        site = self.site
        form = site.form
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


def streams_of(
    model: ir.Model, groups: Sequence[Group]
) -> tuple[dict[MomentsKey, Stream], dict[Group, list[MomentsKey]]]:
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
            key = _key(site, value)
            sites.setdefault(key, site)
            readers.setdefault(key, []).append(group)
    # One accumulator holds m² numbers: an unrolled LSTM would otherwise have one for each step.
    together: dict[tuple[tuple[Group, ...], str, int], dict[str, Site]] = {}
    for key, users in readers.items():
        name, reading, slices = key
        together.setdefault((tuple(users), reading, slices), {})[name] = sites[key]
    streams: dict[MomentsKey, Stream] = {}
    for (by, reading, slices), found in together.items():
        key = (" ".join(found), reading, slices)
        streams[key] = Stream(found)
        for group in by:
            members[group].append(key)
    return streams, members


def streams_by_key(
    model: ir.Model, groups: Iterable[Group], wanted: Collection[MomentsKey]
) -> dict[MomentsKey, Stream]:
    """The streams of some keys in a copy of the model that they were found in.

    Args:
        model: the copy.
        groups: all that are found in it.
        wanted: keys that `streams_of` gave.
    """
    sites: dict[MomentsKey, Site] = {}
    for group in groups:
        for member in group.members:
            value = member.site.form.activation(member.site)
            if value is not None and member.site.node.graph is model.graph:
                sites.setdefault(_key(member.site, value), member.site)
    return {
        (names, reading, slices): Stream(
            {name: sites[name, reading, slices] for name in names.split(" ")}
        )
        for names, reading, slices in wanted
    }


def masked_names(streams: Iterable[Stream], values: Feed, keep: Array | None) -> frozenset[str]:
    """The activations of streams that a mask fits.

    Args:
        streams: which.
        values: one sample's activations by name.
        keep: False where its rows do not count; None where all do.
    """
    names = [name for stream in streams for name in stream.sites]
    fits = {n for n in names if keep is not None and spread_mask(keep, values[n].shape) is not None}
    return frozenset(fits)


def _key(site: Site, value: ir.Value) -> MomentsKey:
    """Of one activation that a site reads."""
    return (value.name or "", repr(site.form.reading(site)), site.slices)
