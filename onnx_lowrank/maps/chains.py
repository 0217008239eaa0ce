"""Chains: maps that are a pair already, ``(X·A)·B``, which must not become a chain of four.

A pair that this package wrote is known by the metadata of its first node.  Any other is known by
its shape: the product of a map alone goes into maps whose weights, with its own, are fewer than
those of the products ``A·B``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import onnx_ir as ir

from onnx_lowrank.graph.walk import node_name
from onnx_lowrank.maps.emit import PAIR
from onnx_lowrank.maps.forms import Site

__all__ = ["chained"]

# Operators whose output is a linear map of the activation, with nothing added.
_LINEAR = frozenset({"Conv", "Einsum", "FusedMatMul", "Gather", "Gemm", "MatMul"})


def chained(sites: Iterable[Site]) -> Mapping[ir.Node, str]:
    """Nodes that are half of a pair, and why they are left.

    Args:
        sites: all constant linear maps of a model that could be factored.
    """
    by_node: dict[ir.Node, Site] = {}
    for site in sites:
        by_node.setdefault(site.node, site)
    found: dict[ir.Node, str] = {}
    for first in by_node.values():
        seconds = _seconds(first, by_node)
        if PAIR not in first.node.metadata_props and not _narrow(first, seconds):
            continue
        rank = first.n
        names = ", ".join(repr(node_name(second.node)) for second in seconds[:3])
        if names:
            found[first.node] = _reason(rank, "first", names)
        elif PAIR in first.node.metadata_props:
            found[first.node] = _reason(rank, "first", repr(first.node.metadata_props[PAIR]))
        for second in seconds:
            found[second.node] = _reason(rank, "second", repr(node_name(first.node)))
    return found


def _reason(rank: int, place: str, other: str) -> str:
    return (
        f"is the {place} map of a pair of rank {rank} already, with {other}; factor the model that "
        "the pair was made from to change its rank"
    )


def _seconds(first: Site, by_node: Mapping[ir.Node, Site]) -> list[Site]:
    """The maps that read the product; none where anything else reads it too."""
    product = first.node.outputs[0]
    if product.is_graph_output():
        return []
    seconds = []
    for use in product.uses():
        site = by_node.get(use.node)
        if site is None or site.form.activation(site) is not product:
            return []
        seconds.append(site)
    return seconds


def _narrow(first: Site, seconds: list[Site]) -> bool:
    """Whether two weights, of the two maps, are fewer than those of their product."""
    added = len(first.node.inputs) > 2 and first.node.inputs[2] is not None
    if not seconds or added or first.node.op_type not in _LINEAR:
        return False
    if any(second.m != first.n or second.slices != first.slices for second in seconds):
        return False
    outputs = sum(second.n for second in seconds)
    return first.n * (first.m + outputs) < first.m * outputs
