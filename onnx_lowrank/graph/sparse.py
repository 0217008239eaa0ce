"""Constants that are stored sparse, kept as they are while a model is in onnx_ir's hands.

onnx_ir drops sparse initializers and cannot read sparse attributes.  They are made dense for as
long as it reads the protobuf; the tensor that comes of each remembers the sparse one, which is
written again in its place, unless something else stands there by then.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnx_ir as ir

from onnx_lowrank.errors import InputError
from onnx_lowrank.graph.presence import graph_pairs, node_pairs
from onnx_lowrank.graph.walk import all_graphs
from onnx_lowrank.numerics.arrays import Array

__all__ = ["SparseTensor", "check_sparse", "dense", "keep", "made_dense", "put_back", "set_aside"]

_ATTRIBUTE, _DENSE = "sparse_value", "value"
_MARK = "onnx_lowrank.sparse."
_LARGEST = 1 << 31


class SparseTensor(ir.Tensor[Any]):
    """The elements of a constant that is stored sparse.

    Attributes:
        stored: as it stands in the model.
    """

    def __init__(self, array: Array, stored: onnx.SparseTensorProto, name: str | None) -> None:
        super().__init__(array, name=name)
        self.stored = stored

    @property
    def nbytes(self) -> int:
        """Bytes of the elements and their places as they are stored."""
        return int(self.stored.ByteSize())

    @property
    def kept(self) -> int:
        """How many elements are stored."""
        return math.prod(self.stored.values.dims)


def check_sparse(sparse: onnx.SparseTensorProto, where: str) -> None:
    """Refuse a sparse tensor whose elements or places are not what they should be.

    Args:
        sparse: the tensor.
        where: what it is in messages.

    Raises:
        InputError: it does not hold as many places as elements, or a place is outside.
    """
    size = math.prod(sparse.dims)
    if any(dim < 0 for dim in sparse.dims) or size * 8 > _LARGEST:
        raise InputError(
            f"{where}: expected a sparse tensor of at most {_LARGEST >> 3} elements, got one of "
            f"shape {list(sparse.dims)}"
        )
    for part, tensor in (("elements", sparse.values), ("places", sparse.indices)):
        if tensor.data_location == tensor.EXTERNAL:
            raise InputError(f"{where}: expected its {part} in the model, got external data")
    try:
        values = onnx.numpy_helper.to_array(sparse.values)
        places = _places(sparse)
    except (ValueError, TypeError, KeyError, IndexError) as error:
        text = " ".join(str(error).split())
        raise InputError(f"{where}: expected a sparse tensor, got a damaged one: {text}") from error
    if values.dtype.kind in "OSU":
        raise InputError(f"{where}: expected a sparse tensor of numbers, got one of strings")
    if values.shape != places.shape:
        raise InputError(
            f"{where}: expected a place for each of {values.size} elements, got {places.size}"
        )
    if places.size and not (places.min() >= 0 and places.max() < size):
        raise InputError(f"{where}: expected places within shape {list(sparse.dims)}")


def _places(sparse: onnx.SparseTensorProto) -> Array:
    """Where the elements are in the flattened tensor, shape [elements]."""
    indices = onnx.numpy_helper.to_array(sparse.indices)
    if indices.ndim == 1:
        return indices
    return np.asarray(np.ravel_multi_index(tuple(indices.T), tuple(sparse.dims)))


def _array(sparse: onnx.SparseTensorProto) -> Array:
    values = onnx.numpy_helper.to_array(sparse.values)
    array = np.zeros(math.prod(sparse.dims), values.dtype)
    array[_places(sparse)] = values
    return array.reshape(tuple(sparse.dims))


def dense(sparse: onnx.SparseTensorProto) -> onnx.TensorProto:
    """The same tensor with all its elements, under the same name."""
    return onnx.numpy_helper.from_array(_array(sparse), sparse.values.name)


@contextmanager
def made_dense(
    graphs: Iterable[onnx.GraphProto], nodes: Iterable[onnx.NodeProto]
) -> Iterator[dict[str, onnx.SparseTensorProto]]:
    """A protobuf with dense constants in place of the sparse ones, as long as the context lasts.

    Args:
        graphs: all graphs of a model.
        nodes: all nodes of it.

    Yields:
        The sparse ones by the name of what they give.
    """
    found: dict[str, onnx.SparseTensorProto] = {}
    grown: list[tuple[onnx.GraphProto, int]] = []
    changed: list[tuple[onnx.AttributeProto, onnx.AttributeProto]] = []
    for graph in graphs:
        if graph.sparse_initializer:
            grown.append((graph, len(graph.initializer)))
        for sparse in graph.sparse_initializer:
            found[sparse.values.name] = sparse
            graph.initializer.append(dense(sparse))
    for node in nodes:
        for attribute in node.attribute if node.op_type == "Constant" else ():
            if attribute.name == _ATTRIBUTE and attribute.HasField("sparse_tensor"):
                before = onnx.AttributeProto()
                before.CopyFrom(attribute)
                changed.append((attribute, before))
                tensor = dense(before.sparse_tensor)
                tensor.name = f"{_MARK}{len(changed)}"  # values of other graphs may share its name
                found[tensor.name] = before.sparse_tensor
                attribute.CopyFrom(onnx.helper.make_attribute(_DENSE, tensor))
    try:
        yield found
    finally:
        for graph, count in grown:
            del graph.initializer[count:]
        for attribute, before in changed:
            attribute.CopyFrom(before)


def keep(model: ir.Model, proto: onnx.ModelProto, found: dict[str, onnx.SparseTensorProto]) -> None:
    """Let the constants of a model remember how they are stored.

    Args:
        model: as it was read from the protobuf.
        proto: the protobuf, within `made_dense`.
        found: what `made_dense` gave.
    """
    for graph, message in graph_pairs(model, proto):
        for sparse in message.sparse_initializer:
            name = sparse.values.name
            graph.initializers[name].const_value = SparseTensor(_array(sparse), sparse, name)
    for node, message in node_pairs(model, proto):
        named = (item.t.name for item in message.attribute if item.name == _DENSE)
        stored = found.get(next(named, "")) if message.op_type == "Constant" else None
        if stored is not None:
            node.attributes[_DENSE] = ir.AttrTensor(
                _DENSE, SparseTensor(_array(stored), stored, None)
            )


@contextmanager
def set_aside(model: ir.Model) -> Iterator[None]:
    """A model without its sparse initializers, as long as the context lasts."""
    orders: list[tuple[ir.Graph, list[ir.Value]]] = []
    for graph in all_graphs(model):
        values = list(graph.initializers.values())
        sparse = [value for value in values if isinstance(value.const_value, SparseTensor)]
        if sparse:
            orders.append((graph, values))
        for value in sparse:
            assert value.name is not None
            del graph.initializers[value.name]
    try:
        yield
    finally:
        for graph, values in orders:
            graph.initializers.clear()
            for value in values:
                assert value.name is not None
                graph.initializers[value.name] = value


def put_back(model: ir.Model, proto: onnx.ModelProto) -> None:
    """Write what is stored sparse into the protobuf that a model was written to without it."""
    for graph, message in graph_pairs(model, proto):
        for value in graph.initializers.values():
            if isinstance(value.const_value, SparseTensor):
                message.sparse_initializer.append(value.const_value.stored)
    for node, written in node_pairs(model, proto):
        attribute = node.attributes.get(_DENSE) if node.op_type == "Constant" else None
        if attribute is None or attribute.type != ir.AttributeType.TENSOR or attribute.is_ref():
            continue
        tensor = attribute.as_tensor()
        if isinstance(tensor, SparseTensor):
            for own in written.attribute:
                if own.name == _DENSE:
                    own.Clear()
                    own.name, own.type = _ATTRIBUTE, onnx.AttributeProto.SPARSE_TENSOR
                    own.sparse_tensor.CopyFrom(tensor.stored)
