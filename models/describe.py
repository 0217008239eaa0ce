"""What is in a model file: counts of its parameters and of its constant matrices."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx

__all__ = ["Contents", "describe"]


@dataclass(frozen=True)
class Contents:
    """What is in a model file.

    Attributes:
        bytes: its size.
        producer: who wrote it, with the version.
        opset: version of the default operator set.
        matmul: MatMul nodes with a constant matrix.
        gemm: Gemm nodes with a constant matrix.
        parameters: elements of all floating-point constants.
        linear_parameters: elements of those that the MatMul and Gemm nodes multiply with; a
            constant that several nodes read counts once.
    """

    bytes: int
    producer: str
    opset: int
    matmul: int
    gemm: int
    parameters: int
    linear_parameters: int


def describe(path: Path) -> Contents:
    """Count what is in a model file, its subgraphs included."""
    model = onnx.load(path)
    constants = {name: size for graph in _graphs(model.graph) for name, size in _constants(graph)}
    linear: dict[str, int] = {}
    counts = {"MatMul": 0, "Gemm": 0}
    for graph in _graphs(model.graph):
        for node in graph.node:
            if node.op_type in counts:
                matrices = [name for name in node.input[:2] if name in constants]
                counts[node.op_type] += bool(matrices)
                linear.update((name, constants[name]) for name in matrices)
    return Contents(
        bytes=path.stat().st_size,
        producer=f"{model.producer_name} {model.producer_version}".strip() or "not stated",
        opset=next(used.version for used in model.opset_import if used.domain in ("", "ai.onnx")),
        matmul=counts["MatMul"],
        gemm=counts["Gemm"],
        parameters=sum(constants.values()),
        linear_parameters=sum(linear.values()),
    )


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node:
                    yield from _graphs(inner)


def _constants(graph: onnx.GraphProto) -> Iterator[tuple[str, int]]:
    """Name and number of elements of each floating-point initializer and Constant node."""
    floating = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)
    tensors = [(tensor.name, tensor) for tensor in graph.initializer]
    tensors += [
        (node.output[0], node.attribute[0].t)
        for node in graph.node
        if node.op_type == "Constant" and node.attribute[0].name == "value"
    ]
    for name, tensor in tensors:
        if tensor.data_type in floating:
            yield name, math.prod(tensor.dims)
