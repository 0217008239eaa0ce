"""Chains: maps that are a pair already, ``(X·A)·B``, which must not become a chain of four.

A pair that this package wrote is known by the metadata of its first node.  Any other is known by
its shape: the product of a map alone goes into maps whose weights, with its own, are fewer than
those of the products ``A·B``.

Where both maps are products of rows with a matrix that nothing else reads, the pair can have a
lower rank: its second map is factored, ``B ≈ S·T``, and S goes into the first one,
``(X·A)·B  ->  (X·(A·S))·T``.  Any other pair is left.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.graph.walk import float_attribute, node_name
from onnx_lowrank.maps.emit import PAIR
from onnx_lowrank.maps.forms import Site
from onnx_lowrank.maps.forms.inner import owned

__all__ = ["Chains", "chained"]

# Operators whose output is a linear map of the activation, with nothing added.
_LINEAR = frozenset({"Conv", "Einsum", "FusedMatMul", "Gather", "Gemm", "MatMul"})
# Forms whose two maps can be written again with another rank between them.
_ROWS = frozenset({"gemm-right", "matmul-right"})


@dataclass(frozen=True, eq=False)
class Chains:
    """Pairs that a model has already.

    Attributes:
        left: node that is half of a pair and stays as it is -> why.
        heads: second node of a pair that can have a lower rank -> the first map.
    """

    left: Mapping[ir.Node, str] = field(default_factory=dict)
    heads: Mapping[ir.Node, Site] = field(default_factory=dict)


def chained(sites: Iterable[Site], constants: Constants) -> Chains:
    """The pairs of a model.

    Args:
        sites: all constant linear maps of the model that could be factored.
        constants: resolver of its constants.
    """
    by_node: dict[ir.Node, Site] = {}
    for site in sites:
        by_node.setdefault(site.node, site)
    found: dict[ir.Node, str] = {}
    heads: dict[ir.Node, Site] = {}
    for first in by_node.values():
        seconds = _seconds(first, by_node)
        if PAIR not in first.node.metadata_props and not _narrow(first, seconds):
            continue
        if len(seconds) == 1 and _lowerable(first, seconds[0], constants):
            heads[seconds[0].node] = first
            continue
        rank = first.n
        names = ", ".join(repr(node_name(second.node)) for second in seconds[:3])
        if names:
            found[first.node] = _reason(rank, "first", names)
        elif PAIR in first.node.metadata_props:
            found[first.node] = _reason(rank, "first", repr(first.node.metadata_props[PAIR]))
        for second in seconds:
            found[second.node] = _reason(rank, "second", repr(node_name(first.node)))
    # A map between two others is the second of one pair and the first of another.
    between = {first.node for first in heads.values()} & heads.keys()
    for node, first in list(heads.items()):
        if {node, first.node} & (between | found.keys()):
            del heads[node]
            found[node] = _reason(first.n, "second", repr(node_name(first.node)))
            found.setdefault(first.node, _reason(first.n, "first", repr(node_name(node))))
    return Chains(found, heads)


def _lowerable(first: Site, second: Site, constants: Constants) -> bool:
    """Whether both maps are rows times a matrix of their own, with nothing added between."""
    for site in (first, second):
        if site.form.name not in _ROWS or not owned(site, constants):
            return False
    scaled = first.node.op_type == "Gemm" and float_attribute(first.node, "alpha", 1.0) != 1.0
    added = len(first.node.inputs) > 2 and first.node.inputs[2] is not None
    return not (scaled or added) and second.m == first.n


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
