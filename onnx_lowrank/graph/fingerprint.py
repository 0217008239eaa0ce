"""Fingerprint: by what a model is known again."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_ir as ir

__all__ = ["fingerprint"]

# Elements of a constant that enter the fingerprint: enough to tell two trainings apart.
_PROBED = 64


class _Hash(Protocol):
    def update(self, data: bytes | memoryview, /) -> None: ...

    def hexdigest(self) -> str: ...


@dataclass(frozen=True)
class _Digest:
    """A hash, and how many elements of a constant enter it; None for all."""

    hash: _Hash
    probed: int | None

    def update(self, data: bytes | memoryview, /) -> None:
        self.hash.update(data)

    def hexdigest(self) -> str:
        return self.hash.hexdigest()


def fingerprint(model: ir.Model, *, whole: bool = False) -> str:
    """A hash of what a model computes: its graph, and some elements of each constant.

    That is the operators with their attributes, what each of them reads and gives, inputs, outputs,
    functions and opsets; of constants the names, types, shapes and at most 64 elements.  Names of
    nodes, descriptions, metadata and the sizes of inputs have no part in it.

    Args:
        model: the model.
        whole: whether all elements of constants count.
    """
    digest = _Digest(hashlib.sha256(), None if whole else _PROBED)
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
        _add(digest, *tensor.numpy().reshape(-1)[: digest.probed])
    elif tensor.size:
        flat = tensor.numpy().reshape(-1)
        if digest.probed is not None:
            flat = flat[:: max(1, flat.size // digest.probed)][: digest.probed]
        digest.update(np.ascontiguousarray(flat).view(np.uint8).data)
        del flat
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()
