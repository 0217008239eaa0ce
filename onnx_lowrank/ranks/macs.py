"""Multiply-accumulates of one inference, from shapes read off a run.

Counted are the operators that do the bulk of the arithmetic: matrix products, convolutions and
recurrent cells.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnx_lowrank.graph.walk import attribute, operator
from onnx_lowrank.maps.find import Finding
from onnx_lowrank.maps.forms.base import Cost, Site
from onnx_lowrank.runtime.taps import Run, look

__all__ = ["Macs", "count_macs"]

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of one inference.

    Attributes:
        total: of the whole model; None where a subgraph or function does part of the work.
        costs: by linear map: what it costs as it is and as a pair.
    """

    total: int | None
    costs: Mapping[Site, Cost]


def count_macs(model: ir.Model, finding: Finding, run: Run) -> Macs:
    """Count a model's multiply-accumulates.

    Args:
        model: the model; it is not changed.
        finding: its linear maps.
        run: runs a model on one sample and gives its outputs by name.
    """
    wanted = {
        value.name
        for node in model.graph
        if operator(node) in _COUNTED or operator(node) == ("", "Gather")
        for value in (*node.inputs, *node.outputs)
        if value is not None and value.name
    }
    shapes = look(model, wanted, run).shapes

    def dims(value: ir.Value) -> tuple[int, ...] | None:
        return shapes.get(value.name or "")

    costs = {}
    for group in finding.groups:
        for member in group.members:
            site = member.site
            cost = site.form.cost(site, dims) if site.node.graph is model.graph else None
            if group.heads and cost is not None:
                cost = _with_heads(cost, group.heads, group.shape[1], dims)
            if cost is not None:
                costs[site] = cost
    return Macs(_total(model, shapes), costs)


def _with_heads(
    cost: Cost,
    heads: Sequence[Site],
    rank: int,
    dims: Callable[[ir.Value], tuple[int, ...] | None],
) -> Cost | None:
    """What all maps of a pair of a rank cost; a lower one makes each of them smaller."""
    firsts = [head.form.cost(head, dims) for head in heads]
    dense = [first.dense for first in firsts if first is not None]
    if len(dense) < len(firsts):
        return None
    return Cost(sum(dense) + cost.dense, sum(dense) // max(rank, 1), cost.second)


def _total(model: ir.Model, shapes: Shapes) -> int | None:
    total = 0
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if _counts_inside(model, node):
            return None
        hidden = node.graph is not model.graph
        count = _COUNTED.get(operator(node))
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


def _counts_inside(model: ir.Model, node: ir.Node) -> bool:
    """Whether a node calls a function that, in the end, does what is counted."""
    function = model.functions.get(node.op_identifier())
    return function is not None and any(
        operator(inner) in _COUNTED or _counts_inside(model, inner)
        for inner in ir.traversal.RecursiveGraphIterator(function)
    )


Input = tuple[int, ...] | None
Count = Callable[[ir.Node, list[Input], Input], int | None]


def _matmul(_: ir.Node, inputs: list[Input], output: Input) -> int | None:
    if inputs[0] is None or output is None:
        return None
    return math.prod(output) * inputs[0][-1]


def _gemm(node: ir.Node, inputs: list[Input], output: Input) -> int | None:
    if inputs[0] is None or output is None:
        return None
    return math.prod(output) * inputs[0][0 if attribute(node, "transA", 0) else 1]


def _fused_matmul(node: ir.Node, inputs: list[Input], output: Input) -> int | None:
    if inputs[0] is None or output is None:
        return None
    # transBatchA moves the first axis behind the batch axes: [m, …, k] or, transposed, [k, …, m].
    contracted = -1
    if attribute(node, "transA", 0) and len(inputs[0]) > 1:
        contracted = 0 if attribute(node, "transBatchA", 0) else -2
    return math.prod(output) * inputs[0][contracted]


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


def _attention(node: ir.Node, inputs: list[Input], _: Input) -> int | None:
    """The packed projection, the scores and their product with the values."""
    x, w = inputs[0], inputs[1]
    if x is None or w is None or any(value is not None for value in node.inputs[4:5]):
        return None  # a past that is attended to as well
    batch, length, _width = x
    if "qkv_hidden_sizes" in node.attributes:
        queries, _keys, values = node.attributes["qkv_hidden_sizes"].as_ints()
    else:
        queries = values = w[1] // 3
    return batch * length * (math.prod(w) + length * (queries + values))


_COUNTED: dict[tuple[str, str], Count] = {
    ("", "Conv"): _conv,
    ("", "ConvInteger"): _conv,
    ("", "ConvTranspose"): _conv_transpose,
    ("", "Einsum"): _einsum,
    ("", "GRU"): _recurrent,
    ("", "Gemm"): _gemm,
    ("", "LSTM"): _recurrent,
    ("", "MatMul"): _matmul,
    ("", "MatMulInteger"): _matmul,
    ("", "QLinearConv"): _qlinear_conv,
    ("", "QLinearMatMul"): _matmul,
    ("", "RNN"): _recurrent,
    ("com.microsoft", "Attention"): _attention,
    ("com.microsoft", "DynamicQuantizeMatMul"): _matmul,
    ("com.microsoft", "FusedConv"): _conv,
    ("com.microsoft", "FusedGemm"): _gemm,
    ("com.microsoft", "FusedMatMul"): _fused_matmul,
    ("com.microsoft", "MatMulIntegerToFloat"): _matmul,
    ("com.microsoft", "MatMulNBits"): _matmul,
    ("com.microsoft", "QGemm"): _gemm,
    ("com.microsoft", "QLinearConv"): _qlinear_conv,
}
