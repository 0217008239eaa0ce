"""Narrow: let maps have fewer elements between them; their nodes and names stay.

``g(X·A + a)·B  ->  g(X·(A·S) + a·S)·T`` with S of one block for each head.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_lowrank.graph.constant import Constant
from onnx_lowrank.graph.cuts import cut_elsewhere
from onnx_lowrank.graph.elements import put_elements
from onnx_lowrank.graph.sizes import set_last_size
from onnx_lowrank.graph.spool import Spool
from onnx_lowrank.graph.walk import attribute
from onnx_lowrank.maps.emit import Storage
from onnx_lowrank.maps.find import Group
from onnx_lowrank.maps.forms import Site
from onnx_lowrank.maps.forms.inner import Inner
from onnx_lowrank.maps.pair import Factors, shifted
from onnx_lowrank.numerics.arrays import Array

__all__ = ["kept_units", "mixed", "narrow", "narrowed_names", "narrowed_values"]


def narrow(
    model: ir.Model, group: Group, inner: Inner, pair: Factors, storage: Storage, spool: Spool
) -> None:
    """Narrow the width in front of a group, in place.

    Args:
        model: the model; its graph is changed.
        group: the second map.
        inner: the width.
        pair: ``S[e, m, k]`` and ``T[e, k, n]`` by head.
        storage: of the model.
        spool: where the new weights wait until they are saved.
    """
    heads, _, rank = pair.first.shape
    width = heads * rank
    for site in inner.firsts:
        _put(site, mixed(site.matrix.numpy()[0], pair.first), spool)
    for constant in inner.constants:
        row = mixed(constant.numpy(), pair.first)
        put_elements(constant.root, row, spool)
        constant.root.shape = ir.Shape(row.shape)
    _put(group.members[0].site, pair.second.reshape(width, -1), spool)
    if pair.shift is not None:
        assert group.bias is not None
        put_elements(group.bias.root, shifted(group.bias.tensor.numpy(), pair.shift), spool)
    graph = model.graph
    store = partial(_stored, graph, storage)
    for node in inner.cuts:
        cut_elsewhere(graph, node, group.shape[1], width, store)
    nodes = [*(site.node for site in inner.firsts), *inner.between]
    for value in (value for node in nodes for value in node.outputs):
        value.shape = None  # of the old width
    if inner.reshapes:
        apart, together = inner.reshapes
        for node, size in ((apart, rank), (together, width)):
            set_last_size(graph, node, size, storage.names, store)


def _stored(graph: ir.Graph, storage: Storage, array: Array, name: str) -> ir.Value:
    return storage.store(graph, array, name, in_node=False)


def narrowed_names(group: Group) -> list[str]:
    """Names of the constants that narrowing in front of a group changes."""
    if not group.heads:
        return []
    constants: list[Constant] = [*(head.operand for head in group.heads), group.matrix]
    constants += () if group.inner is None else group.inner.constants
    return [constant.name for constant in constants]


def narrowed_values(group: Group) -> list[str]:
    """Names of the values that have another width where a group has a lower rank."""
    nodes = [head.node for head in group.heads]
    nodes += () if group.inner is None else group.inner.between
    return [value.name or "" for node in nodes for value in node.outputs]


def mixed(array: Array, first: Array) -> Array:
    """``A·S`` along the last axis, in the type of A.

    Args:
        array: ``A[…, c·e·m]``.
        first: ``S[e, m, k]``; the axis gets c·e·k elements.
    """
    heads, size, rank = first.shape
    times = array.shape[-1] // (heads * size)
    shape = (*array.shape[:-1], times * heads * rank)
    if (units := kept_units(first)) is not None:  # no product of many elements with 0
        return np.ascontiguousarray(array.reshape(-1, times, size)[..., units]).reshape(shape)
    by_head = array.reshape(-1, heads, size).transpose(1, 0, 2).astype(np.float64)
    found = np.matmul(by_head, first.astype(np.float64)).transpose(1, 0, 2)
    return np.asarray(found.reshape(shape), array.dtype)


def kept_units(first: Array) -> npt.NDArray[np.intp] | None:
    """Numbers of the elements that ``S[1, m, k]`` keeps as they are; None where it mixes them."""
    heads, _, rank = first.shape
    if heads != 1 or np.count_nonzero(first) != rank or not (first[0].max(axis=0) == 1.0).all():
        return None
    return np.asarray(first[0].argmax(axis=0), np.intp)


def _put(site: Site, matrix: Array, spool: Spool) -> None:
    """Give a map another matrix, ``[m, n]``."""
    root = site.operand.root
    stored = matrix.T if attribute(site.node, "transB", 0) else matrix
    put_elements(root, np.ascontiguousarray(stored), spool)
    root.shape = ir.Shape(stored.shape)
