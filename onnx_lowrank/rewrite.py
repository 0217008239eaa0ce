"""Rewrite: put the pairs in place of the weights, and remove what nothing reads any more."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx.helper
import onnx_ir as ir

from onnx_lowrank.calibrate import Statistics
from onnx_lowrank.choose import Choice
from onnx_lowrank.constants import in_chain
from onnx_lowrank.emit import Emitter, Pair, Storage, StoredFactor
from onnx_lowrank.find import Group
from onnx_lowrank.measure import group_memory, largest_first
from onnx_lowrank.names import Names
from onnx_lowrank.numerics.factors import relative_error
from onnx_lowrank.numerics.fit import achieved_error, fitted_pair
from onnx_lowrank.numerics.parallel import map_layers
from onnx_lowrank.spool import Spool

__all__ = ["Errors", "put_pair", "remove_unread", "rewrite"]

# Newest opset to import where none is: what every runtime in use knows.
_OPSET = 17


@dataclass(frozen=True)
class Errors:
    """How far a pair, as stored, is from its weight.

    Attributes:
        weight: ``‖W − A·B‖ / ‖W‖`` (Frobenius).
        output: ``√(E‖x(W − A·B)‖² / E‖x W‖²)`` over held-out samples; None without them.
    """

    weight: float
    output: float | None = None


@dataclass(frozen=True, eq=False)
class _Factored:
    first: npt.NDArray[np.generic]
    second: npt.NDArray[np.generic]
    errors: Errors


def rewrite(
    model: ir.Model,
    choices: Mapping[Group, Choice],
    statistics: Statistics,
    spool: Spool,
    advance: Callable[[int], None],
) -> dict[Group, Errors]:
    """Factor the groups that have a rank and rewrite their nodes, in place.

    Args:
        model: the model; its graph is changed.
        choices: the rank of every group.
        statistics: what the factors are fitted to and judged with.
        spool: where the factors wait until they are saved.
        advance: called with the number of elements of every group that is done.

    Returns:
        the errors of every group that was factored, from the factors as stored.
    """
    ranked = [group for group, choice in choices.items() if choice.rank is not None]
    storage = Storage(model, Names(model), spool)

    def work(group: Group) -> _Factored:
        rank = choices[group].rank
        assert rank is not None
        stack = group.matrix.numpy()
        first, second = fitted_pair(stack, statistics.fit.get(group), rank, stack.dtype)
        held = statistics.held.get(group) if group in statistics.fit else None
        errors = Errors(
            weight=relative_error(stack, first, second),
            output=None if held is None else achieved_error(stack, first, second, held),
        )
        del stack
        return _Factored(first, second, errors)

    errors = {}
    for group, result in map_layers(work, largest_first(ranked), group_memory):
        errors[group] = result.errors
        put_pair(model, group, result.first, result.second, storage)
        # A view may still be alive elsewhere, as in a model that the caller holds.
        with contextlib.suppress(BufferError):
            group.matrix.release()
        advance(group.matrix.size)
    for group in ranked:
        remove_unread(group.matrix.root)
    return errors


def put_pair(
    model: ir.Model,
    group: Group,
    first: npt.NDArray[np.generic],
    second: npt.NDArray[np.generic],
    storage: Storage,
) -> None:
    """Let the nodes of a group read a pair; the weight stays until `remove_unread`.

    Args:
        model: the model; its graph is changed.
        group: whose nodes.
        first: ``A[e, m, k]``.
        second: ``B[e, k, n]``.
        storage: of the model.
    """
    a = StoredFactor(first, first.shape, "lowrank_A")
    b = StoredFactor(second, second.shape, "lowrank_B")
    for member in group.members:
        pair = Pair.of(a, b, transposed=member.transposed)
        member.site.form.rewrite(member.site, pair, Emitter(member.site, storage))
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
