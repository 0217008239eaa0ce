"""Multiply-accumulates of one inference, from shapes read off a run.

Static shape inference gives up on the reshapes that exporters write for dynamic shapes, so the
model is run once with a Shape node behind every value that matters.  Counted are the operators
that do the bulk of the arithmetic: matrix products, convolutions and recurrent cells.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_lowrank.find import Finding
from onnx_lowrank.forms import Site

__all__ = ["Macs", "count_macs"]

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of one inference.

    Attributes:
        total: of the whole model; None where a subgraph or function does part of the work.
        rows: by node: how many vectors each linear map maps.
    """

    total: int | None
    rows: Mapping[ir.Node, int]


def count_macs(
    model: ir.Model,
    finding: Finding,
    run: Callable[[ir.Model], Mapping[str, npt.NDArray[np.generic]]],
) -> Macs:
    """Count a model's multiply-accumulates.

    Args:
        model: the model; it is not changed.
        finding: its linear maps.
        run: runs a model on one sample and gives its outputs by name.
    """
    copy = model.clone()
    wanted: dict[str, ir.Value] = {}
    for node in copy.graph:
        if node.op_type in _COUNTED or node.op_type == "Gather":
            for value in (*node.inputs, *node.outputs):
                if value is not None and value.name:
                    wanted[value.name] = value
    shapes: dict[str, tuple[int, ...]] = {}
    probes: dict[str, str] = {}
    del copy.graph.outputs[:]
    for name, value in wanted.items():
        if value.const_value is not None and value.is_initializer():
            shapes[name] = tuple(int(d) for d in value.const_value.shape)  # type: ignore[arg-type]
            continue
        probe = ir.Node("", "Shape", [value], name=f"lowrank_probe_{len(probes)}")
        output = probe.outputs[0]
        output.name = f"lowrank_probe_{len(probes)}_shape"
        output.dtype, output.shape = ir.DataType.INT64, ir.Shape([None])
        copy.graph.append(probe)
        copy.graph.outputs.append(output)
        probes[output.name] = name
    if probes:
        for probe_name, shape in run(copy).items():
            shapes[probes[probe_name]] = tuple(int(d) for d in shape)

    def dims(value: ir.Value) -> tuple[int, ...] | None:
        return shapes.get(value.name or "")

    rows = {}
    for entry in finding.entries:
        if isinstance(entry, Site) and entry.node.graph is model.graph:
            count = entry.form.rows(entry, dims)
            if count is not None:
                rows[entry.node] = count
    return Macs(_total(model, shapes), rows)


def _total(model: ir.Model, shapes: Shapes) -> int | None:
    total = 0
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        hidden = node.graph is not model.graph
        if node.op_identifier() in model.functions:
            body = model.functions[node.op_identifier()]
            if any(inner.op_type in _COUNTED for inner in body):
                return None
        count = _COUNTED.get(node.op_type)
        if count is None:
            continue
        if hidden:
            return None
        inputs = [shapes.get(v.name or "") if v is not None else None for v in node.inputs]
        output = shapes.get(node.outputs[0].name or "")
        macs = count(node, inputs, output)
        if macs is None:
            return None
        total += macs
    return total


Input = tuple[int, ...] | None
Count = Callable[[ir.Node, list[Input], Input], int | None]


def _matmul(_: ir.Node, inputs: list[Input], output: Input) -> int | None:
    if inputs[0] is None or output is None:
        return None
    return math.prod(output) * inputs[0][-1]


def _transposable(node: ir.Node, inputs: list[Input], output: Input) -> int | None:
    if inputs[0] is None or output is None:
        return None
    transposed = "transA" in node.attributes and node.attributes["transA"].as_int()
    return math.prod(output) * inputs[0][-2 if transposed else -1]


def _conv(_: ir.Node, inputs: list[Input], output: Input) -> int | None:
    if inputs[1] is None or output is None:
        return None
    return math.prod(output) * math.prod(inputs[1][1:])


def _qlinear_conv(_: ir.Node, inputs: list[Input], output: Input) -> int | None:
    if inputs[3] is None or output is None:
        return None
    return math.prod(output) * math.prod(inputs[3][1:])


def _conv_transpose(_: ir.Node, inputs: list[Input], __: Input) -> int | None:
    if inputs[0] is None or inputs[1] is None:
        return None
    return math.prod(inputs[0]) * math.prod(inputs[1][1:])


def _recurrent(_: ir.Node, inputs: list[Input], __: Input) -> int | None:
    x, w, r = inputs[0], inputs[1], inputs[2]
    if x is None or w is None or r is None:
        return None
    return x[0] * x[1] * (math.prod(w) + math.prod(r))


def _einsum(node: ir.Node, inputs: list[Input], _: Input) -> int | None:
    equation = node.attributes["equation"].as_string().replace(" ", "")
    sizes: dict[str, int] = {}
    extra = 1
    for term, shape in zip(equation.split("->")[0].split(","), inputs, strict=True):
        if shape is None:
            return None
        head, dots, tail = term.partition("...")
        broadcast = shape[len(head) : len(shape) - len(tail)] if dots else ()
        extra = max(extra, math.prod(broadcast))
        labelled = shape[: len(head)] + shape[len(shape) - len(tail) :] if dots else shape
        for letter, size in zip(head + tail, labelled, strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))
    return extra * math.prod(sizes.values()) if len(inputs) > 1 else 0


_COUNTED: dict[str, Count] = {
    "Conv": _conv,
    "ConvInteger": _conv,
    "ConvTranspose": _conv_transpose,
    "Einsum": _einsum,
    "FusedConv": _conv,
    "FusedGemm": _transposable,
    "FusedMatMul": _transposable,
    "GRU": _recurrent,
    "Gemm": _transposable,
    "LSTM": _recurrent,
    "MatMul": _matmul,
    "MatMulInteger": _matmul,
    "QLinearConv": _qlinear_conv,
    "QLinearMatMul": _matmul,
    "RNN": _recurrent,
}
