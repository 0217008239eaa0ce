"""Narrow: let two maps have fewer elements between them; their nodes and names stay.

``g(X·A + a)·B  ->  g(X·(A·S) + a·S)·T`` with S of one block for each head.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_ir as ir

from onnx_lowrank.graph.constant import Constant
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

__all__ = ["narrow", "narrowed_names", "narrowed_values"]


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
    _put(inner.first, _mixed(inner.first.matrix.numpy()[0], pair.first), spool)
    for constant in inner.constants:
        mixed = _mixed(constant.numpy(), pair.first)
        put_elements(constant.root, mixed, spool)
        constant.root.shape = ir.Shape(mixed.shape)
    _put(group.members[0].site, pair.second.reshape(width, -1), spool)
    if pair.shift is not None:
        assert group.bias is not None
        put_elements(group.bias.root, shifted(group.bias.tensor.numpy(), pair.shift), spool)
    for value in (*inner.first.node.outputs, *(v for node in inner.between for v in node.outputs)):
        value.shape = None  # of the old width
    if inner.reshapes:
        apart, together = inner.reshapes
        for node, size in ((apart, rank), (together, width)):
            graph = model.graph
            set_last_size(graph, node, size, storage.names, partial(_stored, graph, storage))


def _stored(graph: ir.Graph, storage: Storage, array: Array, name: str) -> ir.Value:
    return storage.store(graph, array, name, in_node=False)


def narrowed_names(group: Group) -> list[str]:
    """Names of the constants that narrowing in front of a group changes."""
    if group.head is None:
        return []
    constants: list[Constant] = [group.head.operand, group.matrix]
    constants += () if group.inner is None else group.inner.constants
    return [constant.name for constant in constants]


def narrowed_values(group: Group) -> list[str]:
    """Names of the values that have another width where a group has a lower rank."""
    if group.head is None:
        return []
    nodes = (group.head.node, *(() if group.inner is None else group.inner.between))
    return [value.name or "" for node in nodes for value in node.outputs]


def _mixed(array: Array, first: Array) -> Array:
    """``A·S`` along the last axis ``[…, e·m]``, which gets e·k elements."""
    heads, size, rank = first.shape
    parts = array.reshape(-1, heads, size).astype(np.float64)
    mixed = np.einsum("leh,ehk->lek", parts, first.astype(np.float64))
    return np.asarray(mixed.reshape(*array.shape[:-1], heads * rank), array.dtype)


def _put(site: Site, matrix: Array, spool: Spool) -> None:
    """Give a map another matrix, ``[m, n]``."""
    root = site.operand.root
    stored = matrix.T if attribute(site.node, "transB", 0) else matrix
    put_elements(root, np.ascontiguousarray(stored), spool)
    root.shape = ir.Shape(stored.shape)
