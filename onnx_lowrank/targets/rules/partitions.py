"""Partitions: the groups of nodes that a provider would run as one, each a trip to it and back.

The algorithm is that of ONNX Runtime (``CreateSupportedPartitionNodeGroups``): nodes are taken in
topological order; a group is closed when only nodes are left that another processor runs and that
need its outputs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence

import onnx_ir as ir

__all__ = ["partitions"]


def partitions(nodes: Sequence[ir.Node], taken: Collection[ir.Node]) -> list[list[ir.Node]]:
    """The groups in which the taken nodes run.

    Args:
        nodes: all nodes of a graph.
        taken: those that the provider takes.
    """
    here = set(nodes)
    consumers: dict[ir.Node, list[ir.Node]] = {node: [] for node in nodes}
    waiting: dict[ir.Node, int] = {}
    for node in nodes:
        producers = {
            producer
            for value in node.inputs
            if value is not None and (producer := value.producer()) is not None and producer in here
        }
        waiting[node] = len(producers)
        for producer in producers:
            consumers[producer].append(node)
    ready = deque(node for node in nodes if not waiting[node])
    later: deque[ir.Node] = deque()
    groups: list[list[ir.Node]] = []
    group: list[ir.Node] = []
    border: set[ir.Node] = set()
    while ready or later:
        if not ready:
            if group:
                groups.append(group)
            group, border = [], set()
            ready, later = later, deque()
            continue
        node = ready.popleft()
        if node in taken:
            group.append(node)
            border.discard(node)
            border.update(consumers[node])
        elif node in border:
            later.append(node)  # it needs what the group computes
            continue
        for consumer in consumers[node]:
            waiting[consumer] -= 1
            if not waiting[consumer]:
                ready.append(consumer)
    if group:
        groups.append(group)
    return groups
