"""Whether a model is valid ONNX, by onnx's own checker."""

from __future__ import annotations

from collections.abc import Collection

import onnx
import onnx.checker
import onnx_ir as ir

from onnx_lowrank.graph.serialize import graph_protos, hollow, tensor_protos
from onnx_lowrank.graph.sparse import dense

__all__ = ["invalid", "objection"]

# Bytes from which an initializer is declared only.
_LARGE = 1 << 16


def invalid(model: ir.Model) -> str | None:
    """The error of onnx.checker, with full shape inference, for a model.

    Large initializers take part as inputs of the same type and shape, so that a model of several
    GB is checked in little memory.

    Returns:
        Its complaint in one line; None if it has none.
    """
    with hollow(model) as (proto, large):
        pass
    inputs = {value.name for value in proto.graph.input}
    kept = []
    for tensor in proto.graph.initializer:
        if tensor.name not in large:
            kept.append(tensor)
        elif tensor.name not in inputs:
            proto.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    _without_sparse(proto, inputs)
    return _complaint(proto, full=True)


def _without_sparse(proto: onnx.ModelProto, inputs: Collection[str]) -> None:
    """Let what is stored sparse be an input, or a dense constant: onnx infers no shape from it."""
    for graph in graph_protos(proto):
        for sparse in graph.sparse_initializer:
            name, kind = sparse.values.name, sparse.values.data_type
            if graph is not proto.graph:
                graph.initializer.append(dense(sparse))
            elif name not in inputs:
                graph.input.append(onnx.helper.make_tensor_value_info(name, kind, sparse.dims))
        del graph.sparse_initializer[:]


def objection(proto: onnx.ModelProto) -> str | None:
    """The error of onnx.checker for a model as its file holds it.

    Large initializers, and those whose data are external, take part as inputs of the same type
    and shape: no weight is read or copied.

    Args:
        proto: the model as it was read, external data not loaded; it is not changed.

    Returns:
        Its complaint in one line; None if it has none, or where weights in subgraphs or nodes
        are external, which it could not look at without their files.
    """
    light = onnx.ModelProto()
    for field, value in proto.ListFields():
        if field.name == "graph":
            continue
        if field.is_repeated:
            getattr(light, field.name).extend(value)
        else:
            setattr(light, field.name, value)
    known = {value.name for value in proto.graph.input}
    for field, value in proto.graph.ListFields():
        if field.name == "initializer":
            for tensor in value:
                if _small(tensor):
                    light.graph.initializer.append(tensor)
                elif tensor.name not in known:
                    light.graph.input.append(
                        onnx.helper.make_tensor_value_info(
                            tensor.name, tensor.data_type, tensor.dims
                        )
                    )
        elif field.is_repeated:
            getattr(light.graph, field.name).extend(value)
        else:
            setattr(light.graph, field.name, value)
    if _has_external(light):
        return None
    return _complaint(light, full=False)


def _small(tensor: onnx.TensorProto) -> bool:
    return tensor.data_location != tensor.EXTERNAL and tensor.ByteSize() < _LARGE


def _has_external(proto: onnx.ModelProto) -> bool:
    return any(tensor.data_location == tensor.EXTERNAL for tensor in tensor_protos(proto))


def _complaint(proto: onnx.ModelProto, *, full: bool) -> str | None:
    try:
        onnx.checker.check_model(proto, full_check=full)
    except Exception as error:  # its exceptions have no common base
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return lines[0] if lines else type(error).__name__
    return None
