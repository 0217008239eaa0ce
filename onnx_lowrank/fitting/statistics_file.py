"""Moments in a file, so that runs with other budgets need no samples to fit to.

An ``.npz`` without pickles: ``header``, JSON as bytes, and for every stream of vectors, slice and
part ("fit", "held") the arrays ``second`` (of a full matrix its upper triangle, row by row) and
``mean``; where it was measured also the roots of the Fisher information, lower triangles; after
a budget also the damage of the layers by rank.  A
stream is known by the name of its activation and how it is read, a root by the name and size of
its weight; the file as a whole by a fingerprint of the model.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from onnx_lowrank.errors import InputError, named
from onnx_lowrank.files import atomic, is_file
from onnx_lowrank.fitting.statistics import Gathered
from onnx_lowrank.fitting.streams import MomentsKey
from onnx_lowrank.maps.find import Group
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.numerics.fisher import Fisher
from onnx_lowrank.numerics.moments import Moments

__all__ = ["SavedCurve", "SavedStatistics", "Weight", "fingerprint", "load", "save", "weight_of"]


# 2: the fingerprint is of the graph too.
_VERSION = 2
# Elements of a constant that enter the fingerprint: enough to tell two trainings apart.
_PROBED = 64
_PARTS = ("fit", "held")


class _Digest(Protocol):
    def update(self, data: bytes, /) -> None: ...


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


def fingerprint(model: ir.Model) -> str:
    """A hash of what a model computes: its graph, and some elements of each constant.

    That is the operators with their attributes, what each of them reads and gives, inputs, outputs,
    functions and opsets; of constants the names, types, shapes and at most 64 elements.  Names of
    nodes, descriptions, metadata and the sizes of inputs have no part in it.
    """
    digest = hashlib.sha256()
    opsets = sorted(model.opset_imports.items())
    _add(digest, "opsets", *(f"{domain}={version}" for domain, version in opsets))
    _add_graph(digest, model.graph)
    for name, function in sorted(model.functions.items()):
        defaults = sorted(function.attributes.values(), key=lambda item: item.name)
        _add(digest, "function", *name)
        for attribute in defaults:
            _add_attribute(digest, attribute)
        _add_body(digest, function)
    return digest.hexdigest()


def _add(digest: _Digest, *words: object) -> None:
    digest.update(json.dumps([str(word) for word in words]).encode())


def _add_graph(digest: _Digest, graph: ir.Graph) -> None:
    for name, value in sorted(graph.initializers.items()):
        if value.const_value is not None:
            _add(digest, "constant", name)
            _add_tensor(digest, value.const_value)
    _add_body(digest, graph)


def _add_body(digest: _Digest, body: ir.Graph | ir.Function) -> None:
    _add(digest, "inputs", *(value.name for value in body.inputs))
    _add(digest, "outputs", *(value.name for value in body.outputs))
    for node in body:
        _add(digest, "node", node.domain, node.op_type, node.overload)
        _add(digest, *("" if value is None else value.name for value in node.inputs))
        _add(digest, *(value.name for value in node.outputs))
        for _, attribute in sorted(node.attributes.items()):
            _add_attribute(digest, attribute)


def _add_attribute(digest: _Digest, attribute: ir.Attr) -> None:
    _add(digest, "attribute", attribute.name, attribute.type.name, attribute.ref_attr_name)
    if attribute.is_ref():
        return
    match attribute.type:
        case ir.AttributeType.GRAPH:
            _add_graph(digest, attribute.as_graph())
        case ir.AttributeType.GRAPHS:
            for graph in attribute.as_graphs():
                _add_graph(digest, graph)
        case ir.AttributeType.TENSOR:
            _add_tensor(digest, attribute.as_tensor())
        case ir.AttributeType.TENSORS:
            for tensor in attribute.as_tensors():
                _add_tensor(digest, tensor)
        case _:
            _add(digest, repr(attribute.value))


def _add_tensor(digest: _Digest, tensor: ir.TensorProtocol) -> None:
    _add(digest, tensor.dtype.name, *tensor.shape.numpy())
    if tensor.dtype == ir.DataType.STRING:
        _add(digest, *tensor.numpy().reshape(-1)[:_PROBED])
    elif tensor.size:
        flat = tensor.numpy().reshape(-1)
        digest.update(flat[:: max(1, flat.size // _PROBED)][:_PROBED].tobytes())
        del flat
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()


def save(path: Path, saved: SavedStatistics) -> None:
    """Write the statistics, whole or not at all.

    Raises:
        InputError: the place cannot be written.
    """
    header: dict[str, Any] = {
        "version": _VERSION,
        **{
            field: getattr(saved, field)
            for field in ("model", "name", "data", "samples", "held_out", "mask")
        },
        "streams": [
            {
                "activation": activation,
                "reading": reading,
                "slices": slices,
                **{part: [_described(one) for one in getattr(moments, part)] for part in _PARTS},
            }
            for (activation, reading, slices), moments in saved.gathered.items()
        ],
        "fisher": None if saved.fisher is None else [list(weight) for weight in saved.fisher],
        "curves": [
            {"weight": list(weight), "points": curve.points, "known_from": curve.known_from}
            for weight, curve in saved.curves.items()
        ],
        "curves_fisher": saved.curves_fisher,
        "judged_at": list(saved.judged_at),
        "damage_of": saved.damage_of,
    }
    try:
        with (
            atomic(path) as file,
            zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
        ):
            _put(archive, "header", np.frombuffer(json.dumps(header).encode(), np.uint8))
            for index, moments in enumerate(saved.gathered.values()):
                for part in _PARTS:
                    for slot, one in enumerate(getattr(moments, part)):
                        if one is not None:
                            stem = f"{index}.{part}.{slot}"
                            _put(archive, f"{stem}.second", _packed(one))
                            _put(archive, f"{stem}.mean", one.mean)
            for index, curve in enumerate(saved.curves.values()):
                _put(archive, f"{index}.curve", curve.tails)
            for index, fisher in enumerate((saved.fisher or {}).values()):
                if fisher.root is not None:
                    lower = np.tril_indices(len(fisher.root))
                    _put(archive, f"{index}.fisher", fisher.root[lower])
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
        with np.load(path, allow_pickle=False) as archive:
            header = json.loads(archive["header"].tobytes())
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
            return SavedStatistics(
                model=header["model"],
                name=header["name"],
                data=header["data"],
                samples=header["samples"],
                held_out=header["held_out"],
                mask=header["mask"],
                gathered=dict(
                    _stream(archive, index, item) for index, item in enumerate(header["streams"])
                ),
                fisher=_fisher(archive, header.get("fisher")),
                curves=dict(
                    _curve(archive, index, item)
                    for index, item in enumerate(header.get("curves", ()))
                ),
                curves_fisher=bool(header.get("curves_fisher", False)),
                judged_at=tuple(header.get("judged_at", ())),
                damage_of=str(header.get("damage_of", "outputs")),
            )
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{option}: expected statistics that {named('save_stats')} wrote: {error}"
        ) from error


def _described(moments: Moments | None) -> dict[str, Any] | None:
    return None if moments is None else {"rows": moments.rows, "diagonal": moments.diagonal}


def _packed(moments: Moments) -> Array:
    """The diagonal, or the upper triangle row by row."""
    if moments.diagonal:
        return moments.second
    return moments.second[np.triu_indices(len(moments.mean))]


def _put(archive: zipfile.ZipFile, name: str, array: Array) -> None:
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)


def _stream(archive: Any, index: int, item: Mapping[str, Any]) -> tuple[MomentsKey, Gathered]:
    parts = [
        tuple(
            None if one is None else _read(archive, f"{index}.{part}.{slot}", one)
            for slot, one in enumerate(item[part])
        )
        for part in _PARTS
    ]
    return (item["activation"], item["reading"], item["slices"]), Gathered(*parts)


def _fisher(archive: Any, weights: list[list[Any]] | None) -> dict[Weight, Fisher] | None:
    if weights is None:
        return None
    found = {}
    for index, (name, m, n) in enumerate(weights):
        if f"{index}.fisher" in archive:
            root = np.zeros((n, n))
            root[np.tril_indices(n)] = archive[f"{index}.fisher"]
            found[name, m, n] = Fisher(root)
    return found


def _curve(archive: Any, index: int, item: Mapping[str, Any]) -> tuple[Weight, SavedCurve]:
    name, m, n = item["weight"]
    points = tuple((int(rank), float(damage)) for rank, damage in item["points"])
    return (name, m, n), SavedCurve(points, archive[f"{index}.curve"], str(item["known_from"]))


def _read(archive: Any, stem: str, described: Mapping[str, Any]) -> Moments:
    second, mean = archive[f"{stem}.second"], archive[f"{stem}.mean"]
    if not described["diagonal"]:
        size = len(mean)
        full = np.empty((size, size))
        upper = np.triu_indices(size)
        full[upper] = second
        full.T[upper] = second
        second = full
    return Moments(second, mean, described["rows"])
