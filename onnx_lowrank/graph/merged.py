"""Single nodes after a graph was simplified: still there, merged into another, or lost.

A node that computes the same as another one is removed, and its readers read the other.  A reader
that is still there shows which node that is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import onnx_ir as ir

from onnx_lowrank.graph.constant import FLOATS, Constant
from onnx_lowrank.graph.constants import Constants

__all__ = ["resolve"]


def resolve(
    named: Collection[ir.Node],
    model: ir.Model,
    original: ir.Model,
    origins: Mapping[ir.Node, ir.Node],
) -> tuple[dict[ir.Node, ir.Node], ir.Node | None]:
    """Find nodes of the original again.

    Args:
        named: nodes of the original.
        model: what was made of it.
        original: the original.
        origins: node of the model -> node of the original that it stands for.

    Returns:
        Nodes of the original that were merged -> the node of the model that they were merged
        into, and the first node that is lost, or whose float constants changed by any bit.  A node
        that no output depends on is neither.
    """
    if not named:
        return {}, None
    constants, before = Constants(model), Constants(original)
    present = {old: node for node, old in origins.items()}
    needed = _needed(original)
    found: dict[ir.Node, ir.Node] = {}
    for old in named:
        node = present.get(old)
        if node is None and old not in needed:
            continue
        if node is None:
            node = _read_instead(old, present)
            if node is None or node not in origins:
                return found, old
            found[old] = node
        if not _same_constants(old, before, node, constants):
            return found, old
    return found, None


def _needed(model: ir.Model) -> set[ir.Node]:
    """Nodes that the outputs depend on."""
    needed: set[ir.Node] = set()
    bodies: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    waiting = [value.producer() for body in bodies for value in body.outputs]
    while waiting:
        node = waiting.pop()
        if node is None or node in needed:
            continue
        needed.add(node)
        waiting += [value.producer() for value in node.inputs if value is not None]
        for graph in _bodies(node):
            waiting += [value.producer() for value in graph.outputs]
    return needed


def _bodies(node: ir.Node) -> Iterator[ir.Graph]:
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def _read_instead(old: ir.Node, present: Mapping[ir.Node, ir.Node]) -> ir.Node | None:
    """The node whose output is now read where that of the old node was."""
    for value in old.outputs:
        for use in value.uses():
            reader = present.get(use.node)
            if reader is None or use.idx >= len(reader.inputs):
                continue
            now = reader.inputs[use.idx]
            node = None if now is None else now.producer()
            if node is not None and node.op_type == old.op_type:
                return node
    return None


def _read(node: ir.Node, constants: Constants) -> list[Constant]:
    """The float constants that a node reads."""
    found = (constants.resolve(value) for value in node.inputs)
    return [c for c in found if isinstance(c, Constant) and c.dtype in FLOATS]


def _same_constants(old: ir.Node, before: Constants, node: ir.Node, after: Constants) -> bool:
    """Whether a node reads the float constants that it did, bit for bit; a matrix also turned."""
    now = _read(node, after)
    return all(any(_same(one, other) for other in now) for one in _read(old, before))


def _same(one: Constant, other: Constant) -> bool:
    if one.tensor is other.tensor and one.layout.key == other.layout.key:
        return True
    a, b = one.numpy(), other.numpy()
    if a.dtype != b.dtype or a.size != b.size:
        return False
    ways = [b, b.T] if a.ndim == 2 else [b]
    return any(a.shape == way.shape and a.tobytes() == way.tobytes() for way in ways)
