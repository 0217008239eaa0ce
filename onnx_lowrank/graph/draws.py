"""Draws: nodes that give other numbers in each run, and models with their mean in their place.

What a node draws says nothing of the layers before it, whose factors it would be blamed on.  A seed
does not help: a session that has run once goes on from where it is.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from onnx_lowrank.graph.walk import all_nodes, node_name

__all__ = ["drawing", "steady"]

_FLOAT = int(ir.DataType.FLOAT)


def drawing(model: ir.Model) -> tuple[str, ...]:
    """The nodes that draw, as "operator 'name'", also in subgraphs and functions."""
    return tuple(f"{node.op_type} {node_name(node)!r}" for node in all_nodes(model) if _draws(node))


def steady(model: ir.Model) -> None:
    """Put means in place of what is drawn, in place; of a Multinomial the likeliest class.

    Args:
        model: a copy that is only run.
    """
    for node in [node for node in all_nodes(model) if _draws(node)]:
        if node.op_type == "Dropout":
            node.replace_input_with(2, None)  # without training it gives its mean
            continue
        made = _MEANS[node.op_type](node)
        assert node.graph is not None
        ir.convenience.replace_nodes_and_values(
            node.graph, node, [node], made, node.outputs, made[-1].outputs
        )


def _draws(node: ir.Node) -> bool:
    if node.domain not in ("", "ai.onnx"):
        return False
    if node.op_type == "Dropout":
        mode = node.inputs[2] if len(node.inputs) > 2 else None
        tensor = None if mode is None else ir.convenience.get_const_tensor(mode)
        return mode is not None and (tensor is None or bool(tensor.numpy().any()))
    return node.op_type in _MEANS


def _like(node: ir.Node) -> list[ir.Node]:
    source = node.inputs[0]
    assert source is not None
    kind = node.attributes.get_int("dtype", int(source.dtype or _FLOAT))
    shape = ir.node("Shape", [source])
    return [shape, _filled(node, shape.outputs[0], kind)]


def _free(node: ir.Node) -> list[ir.Node]:
    sizes = np.array(node.attributes.get_ints("shape"), np.int64)
    shape = ir.node("Constant", [], {"value": ir.tensor(sizes)})
    return [shape, _filled(node, shape.outputs[0], node.attributes.get_int("dtype", _FLOAT))]


def _filled(node: ir.Node, shape: ir.Value, kind: int) -> ir.Node:
    if node.op_type.startswith("RandomNormal"):
        mean = node.attributes.get_float("mean", 0.0)
    else:
        low, high = (node.attributes.get_float(*pair) for pair in (("low", 0.0), ("high", 1.0)))
        mean = (low + high) / 2.0
    value = ir.tensor(np.array([mean], ir.DataType(kind).numpy()), dtype=ir.DataType(kind))
    return ir.node("ConstantOfShape", [shape], {"value": value})


def _bernoulli(node: ir.Node) -> list[ir.Node]:
    source = node.inputs[0]
    if "dtype" not in node.attributes:
        return [ir.node("Identity", [source])]
    kind = node.attributes.get_int("dtype")
    if ir.DataType(kind).is_floating_point():
        return [ir.node("Cast", [source], {"to": kind})]
    likely = ir.node("Round", [source])
    return [likely, ir.node("Cast", [likely.outputs[0]], {"to": kind})]


def _multinomial(node: ir.Node) -> list[ir.Node]:
    count = np.array([1, node.attributes.get_int("sample_size", 1)], np.int64)
    likely = ir.node("ArgMax", [node.inputs[0]], {"axis": 1, "keepdims": 1})
    kind = node.attributes.get_int("dtype", int(ir.DataType.INT32))
    cast = ir.node("Cast", [likely.outputs[0]], {"to": kind})
    repeats = ir.node("Constant", [], {"value": ir.tensor(count)})
    return [likely, cast, repeats, ir.node("Tile", [cast.outputs[0], repeats.outputs[0]])]


_MEANS: dict[str, Callable[[ir.Node], list[ir.Node]]] = {
    "Bernoulli": _bernoulli,
    "Multinomial": _multinomial,
    "RandomNormal": _free,
    "RandomNormalLike": _like,
    "RandomUniform": _free,
    "RandomUniformLike": _like,
}
