"""Rewrite: put the pairs in place of the weights, and remove what nothing reads any more."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import onnx.helper
import onnx_ir as ir

from onnx_lowrank.graph.constants import in_chain
from onnx_lowrank.graph.elements import put_elements
from onnx_lowrank.graph.face import lower_initializers
from onnx_lowrank.graph.names import Names
from onnx_lowrank.graph.spool import Spool
from onnx_lowrank.graph.walk import attribute
from onnx_lowrank.maps.emit import (
    Emitter,
    Pair,
    Storage,
    StoredFactor,
)
from onnx_lowrank.maps.find import Group
from onnx_lowrank.maps.forms import Site
from onnx_lowrank.maps.narrow import narrow, narrowed_names
from onnx_lowrank.maps.pair import Errors, Factors, shifted

__all__ = ["put_pair", "remove_unread", "rewrite"]

# Newest opset to import where none is: what every runtime in use knows.
_OPSET = 17


def rewrite(
    model: ir.Model, fitted: Iterable[tuple[Group, Factors]], spool: Spool
) -> dict[Group, Errors]:
    """Rewrite the nodes of groups to read pairs, in place.

    Args:
        model: the model; its graph is changed.
        fitted: the pairs, asked for one at a time.
        spool: where the factors wait until they are saved.

    Returns:
        the errors of every group.
    """
    storage = Storage(model, Names(model), spool)
    errors = {}
    shared: dict[int, tuple[StoredFactor, npt.NDArray[np.generic], list[ir.Node]]] = {}
    for group, pair in fitted:
        errors[group] = pair.errors
        if group.inner is not None:
            narrow(model, group, group.inner, pair, storage, spool)
            continue
        if group.heads:
            _lower(group, group.heads[0], pair, spool)
            continue
        first = StoredFactor(pair.first, pair.first.shape, "lowrank_A")
        if pair.shared:  # the array is kept, so that its id stays its own
            first, _, nodes = shared.setdefault(id(pair.first), (first, pair.first, []))
            nodes.append(group.members[0].site.node)
        put_pair(model, group, first, pair.second, storage)
        if pair.shift is not None:
            assert group.bias is not None
            put_elements(group.bias.root, shifted(group.bias.tensor.numpy(), pair.shift), spool)
    for _, _, nodes in shared.values():
        _merge_first(nodes)
    for group in errors:
        if not group.heads:
            remove_unread(group.matrix.root)
    _close(model, [name for group in errors for name in narrowed_names(group)])
    return errors


def _close(model: ir.Model, names: Iterable[str]) -> None:
    """Let constants that have another shape be no inputs any more, as those of pairs are none."""
    known = set(names)
    for value in [own for own in model.graph.inputs if own.name in known]:
        model.graph.inputs.remove(value)
    lower_initializers(model)


def _lower(group: Group, head: Site, pair: Factors, spool: Spool) -> None:
    """Let a pair have a lower rank: ``(X·A)·B  ->  (X·(A·S))·T``; names stay."""
    a = head.matrix.numpy()[0]
    first = (a.astype(np.float64) @ pair.first[0].astype(np.float64)).astype(a.dtype)
    del a
    for site, matrix in ((head, first), (group.members[0].site, pair.second[0])):
        root = site.operand.root
        stored = matrix.T if attribute(site.node, "transB", 0) else matrix
        put_elements(root, np.ascontiguousarray(stored), spool)
        root.shape = ir.Shape(stored.shape)
    if pair.shift is not None:
        assert group.bias is not None
        put_elements(group.bias.root, shifted(group.bias.tensor.numpy(), pair.shift), spool)
    product = head.node.outputs[0]
    if product.shape is not None:
        product.shape = ir.Shape([*list(product.shape)[:-1], pair.rank])


def _merge_first(nodes: Sequence[ir.Node]) -> None:
    """Let nodes that multiply one activation with one A read one product."""
    graph = nodes[0].graph
    assert graph is not None
    firsts = [value.producer() for node in nodes if (value := node.inputs[0]) is not None]
    order = {node: index for index, node in enumerate(graph)}
    products = sorted((node for node in firsts if node is not None), key=lambda n: order[n])
    kept = products[0]
    for other in products[1:]:
        if other is not kept and list(other.inputs) == list(kept.inputs):
            other.outputs[0].replace_all_uses_with(kept.outputs[0])
            graph.remove(other, safe=True)


def put_pair(
    model: ir.Model,
    group: Group,
    first: StoredFactor,
    second: npt.NDArray[np.generic],
    storage: Storage,
) -> None:
    """Let the nodes of a group read a pair; the weight stays until `remove_unread`.

    Args:
        model: the model; its graph is changed.
        group: whose nodes.
        first: ``A[e, m, k]``, which other groups may share.
        second: ``B[e, k, n]``.
        storage: of the model.
    """
    b = StoredFactor(second, second.shape, "lowrank_B")
    for member in group.members:
        pair = Pair.of(first, b, transposed=member.transposed)
        member.site.form.rewrite(
            member.site, pair, Emitter(member.site.node, member.site.operand, storage)
        )
        _import_default(model, member.site.node)


def _import_default(model: ir.Model, node: ir.Node) -> None:
    """Import ONNX's own operators where only others were, as for a graph of fused ones."""
    body = next((f for f in model.functions.values() if f.graph is node.graph), None)
    imports = model.opset_imports if body is None else body.opset_imports
    if "" not in imports and "ai.onnx" not in imports:
        imports[""] = next(
            version
            for version in range(_OPSET, 0, -1)
            if onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", version)])
            <= max(model.ir_version, 3)
        )


def remove_unread(value: ir.Value) -> None:
    """Remove a constant, and the chains of nodes that only it feeds, where nothing reads them."""
    for use in list(value.uses()):
        if in_chain(use.node, use.idx):
            for output in use.node.outputs:
                remove_unread(output)
    if value.uses() or value.is_graph_output():
        return
    producer, graph = value.producer(), value.graph
    if producer is not None and producer.graph is not None:
        # A chain's other inputs, such as the shape of a Reshape, go with it.
        others = [other for other in producer.inputs[1:] if other is not None]
        producer.graph.remove(producer, safe=True)
        for other in others:
            source = other.producer()
            if other.is_initializer() or (source is not None and source.op_type == "Constant"):
                remove_unread(other)
    elif graph is not None and value.is_initializer() and value.name is not None:
        graph.initializers.pop(value.name)
        if value.is_graph_input():
            graph.inputs.remove(value)
