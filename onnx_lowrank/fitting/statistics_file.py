"""Moments in a file, so that runs with other budgets need no samples to fit to.

An archive (`onnx_lowrank.runtime.archive`) of `SavedStatistics`: the moments; where it was measured
also the roots of the Fisher information; after a budget also the damage of the layers by rank.  A
stream is known by the name of its activation and how it is read, a root by the name and size of
its weight; the file as a whole by a fingerprint of the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from onnx_lowrank.errors import InputError, named
from onnx_lowrank.files import atomic, is_file
from onnx_lowrank.fitting.statistics import Gathered
from onnx_lowrank.fitting.streams import MomentsKey
from onnx_lowrank.graph.fingerprint import fingerprint
from onnx_lowrank.maps.find import Group
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.fisher import Fisher
from onnx_lowrank.numerics.moments import Moments
from onnx_lowrank.runtime.archive import BROKEN, read_archive, read_header, write_archive

__all__ = ["SavedCurve", "SavedFisher", "SavedStatistics", "Weight", "load", "save", "weight_of"]


# 2: the fingerprint is of the graph too.  3: an archive.
_VERSION = 3

Weight = tuple[str, int, int]
"""A layer's weight: its name, m and n."""


def weight_of(group: Group) -> Weight:
    """How the file knows a layer."""
    _, m, n = group.shape
    return group.matrix.name, m, n


@dataclass(frozen=True, eq=False)
class SavedCurve:
    """The damage of a layer by rank.

    Attributes:
        points: ranks and the damage that was measured at each.
        tails: energy that is lost at every rank from 0 on, as far as the outputs feel it.
        known_from: what the damage is known from, such as "outputs".
    """

    points: tuple[tuple[int, float], ...]
    tails: Array
    known_from: str


@dataclass(frozen=True, eq=False)
class SavedFisher:
    """The Fisher information of layers.

    Attributes:
        roots: how each layer's errors change the model's outputs, by the layer's weight.
        left: name of a node -> why there is none for its layer.
        notes: what else the user should know.
    """

    roots: Mapping[Weight, Fisher]
    left: Mapping[str, str]
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class SavedStatistics:
    """Moments and their source.

    Attributes:
        model: fingerprint of the model.
        name: the model's name, for messages.
        data: the source of the samples.
        samples: how many the moments to fit to are of.
        held_out: how many the others are of.
        mask: the input whose zeros marked padding, or None.
        gathered: the moments.
        fisher: how each layer's errors change the model's outputs, by the layer's weight; None if
            not asked for.
        curves: damage of the layers, by weight; empty where no budget asked for it.
        curves_fisher: whether the factors of the curves are fitted with ``fisher``.
        judged_at: values inside the model that counted as outputs for ``fisher`` and ``curves``.
        damage_of: what these are of: "outputs", or shares of "classes".
    """

    model: str
    name: str
    data: str
    samples: int
    held_out: int
    mask: str | None
    gathered: Mapping[MomentsKey, Gathered]
    fisher: Mapping[Weight, Fisher] | None = None
    curves: Mapping[Weight, SavedCurve] = field(default_factory=dict)
    curves_fisher: bool = False
    judged_at: tuple[str, ...] = ()
    damage_of: str = "outputs"


_CLASSES = (SavedStatistics, SavedCurve, Gathered, Moments, Fisher)


def save(path: Path, saved: SavedStatistics) -> None:
    """Write the statistics, whole or not at all.

    Raises:
        InputError: the place cannot be written.
    """
    header = {"version": _VERSION, "model": saved.model, "name": saved.name}
    try:
        with atomic(path) as file:
            write_archive(file, header, saved, _CLASSES)
    except OSError as error:
        raise InputError(f"{named('save_stats', path)}: {error.strerror or error}") from error


def load(path: Path, model: ir.Model, name: str) -> SavedStatistics:
    """Read statistics of this model.

    Args:
        path: the file.
        model: the model, as it was loaded.
        name: the model's name, for messages.

    Raises:
        InputError: the file cannot be read, is something else, or belongs to another model.
    """
    option = named("load_stats", path)
    if not is_file(path):
        raise InputError(f"{option}: no such file")
    try:
        header = read_header(path)
        if header["version"] != _VERSION:
            raise InputError(
                f"{option}: expected version {_VERSION} of the format, got "
                f"{header['version']}; write the file again with {named('save_stats')}"
            )
        if header["model"] != fingerprint(model):
            raise InputError(
                f"{option}: belongs to another model, {header['name']}: its operators or "
                f"constants are not those of {name}"
            )
        found: SavedStatistics = read_archive(path, _CLASSES)
    except BROKEN as error:
        raise InputError(
            f"{option}: expected statistics that {named('save_stats')} wrote: {error}"
        ) from error
    return found
