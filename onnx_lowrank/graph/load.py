"""Load: a model from a file, a protobuf or an `onnx_ir.Model`, checked, weights memory-mapped."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sized
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import google.protobuf.message
import onnx
import onnx_ir as ir

from onnx_lowrank.errors import InputError
from onnx_lowrank.files import digest, exists, is_file
from onnx_lowrank.graph.file_kind import other_kind
from onnx_lowrank.graph.proto_checks import check_parts
from onnx_lowrank.graph.references import resolve
from onnx_lowrank.graph.serialize import (
    first_line,
    from_proto,
    mark_declared,
)
from onnx_lowrank.graph.validity import objection
from onnx_lowrank.graph.walk import (
    all_graphs,
    all_nodes,
    elements,
    node_name,
    stored_bytes,
    tensors,
)
from onnx_lowrank.schema.json_report import File

__all__ = ["Exported", "LoadedModel", "ModelLike", "load"]


class Exported(Protocol):
    """What an exporter returns that holds a model, such as `torch.onnx.ONNXProgram`."""

    @property
    def model_proto(self) -> onnx.ModelProto:
        """The model."""
        ...


ModelLike = str | os.PathLike[str] | bytes | onnx.ModelProto | ir.Model | Exported
"""A path, the bytes of a file, a protobuf, an `onnx_ir.Model`, or an exporter's result."""


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model as it was given.

    Attributes:
        model: the model; nothing that the caller holds.
        path: its file; None for a model in memory.
        name: how messages call it.
        bytes: size of its file and its external data; for a model in memory, of its tensors.
        data_files: files with external data, as they are on disk (symbolic links resolved).
        objection: the error of onnx.checker for the model, in one line; None if it has none.
        runs_only: whether the model has its inputs and outputs alone, because its file is in
            ONNX Runtime's own format.
    """

    model: ir.Model
    path: Path | None
    name: str
    bytes: int
    data_files: tuple[Path, ...]
    objection: str | None = None
    runs_only: bool = False

    @property
    def frame_bytes(self) -> int:
        """Bytes of its file that are no weights: the nodes, names and metadata."""
        return max(self.bytes - stored_bytes(self.model), 0)

    @property
    def files(self) -> tuple[Path, ...]:
        """The model's file and its external data."""
        return self.data_files if self.path is None else (self.path, *self.data_files)

    @cached_property
    def described(self) -> File:
        """Path, size, parameters and digest, for reports; made when it is first asked for."""
        path = None if self.path is None else str(self.path)
        known = None if self.path is None else digest(self.files)
        parameters = None if self.runs_only else elements(self.model)
        return File(path, self.bytes, parameters, known)


def load(model: ModelLike) -> LoadedModel:
    """Load a model without reading its external data, and check that it can be read.

    Raises:
        InputError: no such file, no ONNX model, truncated, external data missing or too short,
            or something in it that could not be carried over.
    """
    if not isinstance(model, str | os.PathLike):
        model = _in_memory(model)
    if isinstance(model, ir.Model):
        copy = model.clone()
        resolve(copy)
        data = _check_tensors(copy, "model")
        return LoadedModel(copy, None, "model", stored_bytes(copy), data)
    if isinstance(model, onnx.ModelProto):
        _check_proto(model, "model")
        parsed = _deserialize(model, "model")
        if any(isinstance(tensor, ir.ExternalTensor) for tensor in tensors(parsed)):
            raise InputError(
                "model: expected a ModelProto that holds its weights, got one with external data "
                "and no file; pass its path instead"
            )
        _check_tensors(parsed, "model")
        return LoadedModel(parsed, None, "model", stored_bytes(parsed), (), objection(model))
    path = Path(model)
    proto = _read(path)
    _check_proto(proto, str(path), path)
    parsed = _deserialize(proto, str(path))
    _resolve_external(parsed, path)
    data = _check_tensors(parsed, str(path))
    size = path.stat().st_size + sum(file.stat().st_size for file in data)
    return LoadedModel(parsed, path, str(path), size, data, objection(proto))


def _in_memory(model: bytes | onnx.ModelProto | ir.Model | Exported) -> onnx.ModelProto | ir.Model:
    """What holds the model, as one of two types."""
    if isinstance(model, ir.Model | onnx.ModelProto):
        return model
    if isinstance(model, bytes):
        try:
            return onnx.load_from_string(model)
        except (google.protobuf.message.DecodeError, ValueError) as error:
            raise InputError(
                f"model: expected the bytes of an ONNX model, got {len(model)} bytes of something "
                "else"
            ) from error
    # An exporter's own graph needs no protobuf, which ends at 2 GiB.
    held = getattr(model, "model", None)
    found = held if isinstance(held, ir.Model) else getattr(model, "model_proto", None)
    if not isinstance(found, ir.Model | onnx.ModelProto):
        raise InputError(
            "model: expected a path, bytes, a ModelProto, an onnx_ir.Model or an ONNXProgram, got "
            f"{type(model).__name__}"
        )
    return found


def _read(path: Path) -> onnx.ModelProto:
    if not exists(path):
        raise InputError(f"{path}: no such file")
    if not path.is_file():
        raise InputError(f"{path}: expected an ONNX file, got a folder or device")
    try:
        return onnx.load(path, load_external_data=False)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (google.protobuf.message.DecodeError, ValueError, UnicodeDecodeError) as error:
        kind = other_kind(path)
        if kind is not None:
            raise InputError(f"{path}: expected an ONNX model, got {kind}") from error
        raise InputError(
            f"{path}: expected an ONNX model, got something else or a truncated file "
            f"({path.stat().st_size} bytes)"
        ) from error
    except Exception as error:  # text formats have error types of their own
        raise InputError(f"{path}: expected an ONNX model: {first_line(error)}") from error


def _check_proto(proto: onnx.ModelProto, name: str, path: Path | None = None) -> None:
    """Refuse what onnx_ir would drop without a word, and what is no model at all."""
    if not proto.ir_version or not proto.HasField("graph"):
        kind = None if path is None else other_kind(path)
        raise InputError(
            f"{name}: expected an ONNX model, got {kind or 'a protobuf without a graph'}"
        )
    if not proto.opset_import and proto.ir_version >= 3:
        raise InputError(f"{name}: expected an opset import, got none")
    if proto.training_info:
        raise InputError(
            f"{name}: has training_info, which refers to weights by name and would be broken; "
            "expected an inference model"
        )
    check_parts(proto, name)


def _deserialize(proto: onnx.ModelProto, name: str) -> ir.Model:
    try:
        model = from_proto(proto)
    except Exception as error:
        raise InputError(f"{name}: malformed model: {first_line(error)}") from error
    mark_declared(model, proto)
    _check_values(model, name)
    resolve(model)
    return model


def _check_values(model: ir.Model, name: str) -> None:
    """Check that something gives every value that is read, and that there is an order to run."""
    readers = [(f"node {node_name(node)!r}", node.inputs) for node in all_nodes(model)]
    graphs = list(all_graphs(model))
    readers += [(f"graph {graph.name!r}", tuple(graph.outputs)) for graph in graphs]
    for reader, values in readers:
        for value in values:
            if value is None or value.producer() is not None:
                continue
            if not (value.is_graph_input() or value.is_initializer()):
                raise InputError(
                    f"{name}: malformed model: {reader} reads {value.name!r}, which nothing gives"
                )
    bodies: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for body in bodies:
        try:
            body.sort()  # with its subgraphs; changes nothing where the order is as it has to be
        except ValueError as error:
            raise InputError(f"{name}: malformed model: {body.name!r} has a cycle") from error


def _resolve_external(model: ir.Model, path: Path) -> None:
    """Let external tensors point at the real files.

    onnx_ir refuses data files behind symbolic links out of the model's folder, which is how
    model hubs lay out their caches, and hard links.  What matters is that the location in the
    model does not lead out of the folder by itself; that is checked here.
    """
    folder = path.parent.resolve()

    def resolved(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        if not isinstance(tensor, ir.ExternalTensor):
            return tensor
        location = os.fspath(tensor.location)
        parts = Path(os.path.normpath(location)).parts
        if Path(location).is_absolute() or parts[:1] == ("..",) or "\0" in location:
            raise InputError(
                f"{path}: initializer {tensor.name!r}: expected external data in the model's "
                f"folder, got {location!r}"
            )
        return ir.ExternalTensor(
            os.path.realpath(folder / location),
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=tensor.shape,
            name=tensor.name,
            doc_string=tensor.doc_string,
            metadata_props=dict(tensor.metadata_props),
            base_dir="",
        )

    for graph in all_graphs(model):
        for value in graph.initializers.values():
            if value.const_value is not None:
                value.const_value = resolved(value.const_value)
    for node in all_nodes(model):
        for name, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                tensor = attribute.as_tensor()
                if isinstance(tensor, ir.ExternalTensor):
                    # Few readers take external data in attributes: into memory with it.
                    array = resolved(tensor).numpy()
                    loaded = ir.Tensor(array, dtype=tensor.dtype, name=tensor.name)
                    node.attributes[name] = ir.AttrTensor(name, loaded)


def _check_tensors(model: ir.Model, name: str) -> tuple[Path, ...]:
    """Check that every tensor has all its data; the external files."""
    files: dict[Path, int] = {}
    for tensor in tensors(model):
        if isinstance(tensor, ir.ExternalTensor):
            _check_external(tensor, name, files)
            continue
        raw = getattr(tensor, "raw", None)
        if isinstance(raw, onnx.TensorProto):
            _check_stored(tensor, raw, name)
    return tuple(files)


def _check_stored(tensor: ir.TensorProtocol, proto: onnx.TensorProto, name: str) -> None:
    """Check a tensor within the model, whose elements are raw bytes or a list of numbers."""
    kind = tensor.dtype
    if kind == ir.DataType.UNDEFINED:
        raise InputError(f"{name}: initializer {tensor.name!r}: expected an element type, got none")
    if proto.HasField("raw_data"):
        if any(map(len, _lists(proto))):
            raise InputError(
                f"{name}: initializer {tensor.name!r}: expected its data once, got raw bytes and "
                "a list of numbers"
            )
        found, expected, unit = len(proto.raw_data), tensor.nbytes, "bytes"
    else:
        if kind.bitwidth < 8:
            return  # several in one number
        parts = 2 if kind in (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128) else 1
        found, expected, unit = sum(map(len, _lists(proto))), parts * tensor.size, "numbers"
    if found != expected:
        raise InputError(
            f"{name}: initializer {tensor.name!r}: expected {expected} {unit} for "
            f"{list(tensor.shape)} of {tensor.dtype.name.lower()}, got {found}"
        )


def _lists(proto: onnx.TensorProto) -> Iterator[Sized]:
    yield from (proto.float_data, proto.int32_data, proto.int64_data)
    yield from (proto.double_data, proto.uint64_data, proto.string_data)


def _check_external(tensor: ir.ExternalTensor, name: str, files: dict[Path, int]) -> None:
    if math.prod(d for d in tensor.shape if isinstance(d, int)) == 0:
        return
    file = Path(tensor.path)
    where = f"{name}: initializer {tensor.name!r}"
    if file not in files:
        if not is_file(file):
            raise InputError(f"{where}: external data file {file} is missing")
        files[file] = file.stat().st_size
    start, length = tensor.offset or 0, tensor.length or tensor.nbytes
    if length != tensor.nbytes:
        raise InputError(
            f"{where}: expected {tensor.nbytes} bytes for {list(tensor.shape)} of "
            f"{tensor.dtype.name.lower()}, the model says {length}"
        )
    if start + length > files[file]:
        raise InputError(
            f"{where}: expected {start + length} bytes in {file}, it has {files[file]}"
        )
