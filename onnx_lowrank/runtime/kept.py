"""Kept: what a model gives for samples, kept as the narrow values that its widest outputs are of.

The logits of a language model are the largest arrays of all: positions × vocabulary for each
sample.  What waits between pieces of work is what its last product multiplies, some eighty times
less; the logits are made of it again where they are compared, by the same nodes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from onnx_lowrank.graph.flow import read_by
from onnx_lowrank.graph.walk import static_shape
from onnx_lowrank.numerics.arrays import Array, Feed
from onnx_lowrank.runtime.taps import OpenModel, Runner, tapped

__all__ = ["TIMES", "WIDE", "Heads", "Kept", "heads_of"]

# A product is undone where it gives at least so many elements a row, and so many times what it
# reads: less than that is kept as it is.
WIDE, TIMES = 4096, 4
_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


@dataclass(frozen=True, eq=False)
class Heads:
    """The last nodes of a model, from narrow values to wide ones.

    Attributes:
        narrow: wide value -> the narrow one that it is made of.
        weights: inputs of the model that stand for weights of these nodes.
        run: from the narrow values and the weights to the wide ones; None without any.
    """

    narrow: Mapping[str, str]
    weights: frozenset[str] = frozenset()
    run: Runner | None = None

    def read(self, names: Collection[str]) -> set[str]:
        """The values that have to be read where these are wanted."""
        return {self.narrow.get(name, name) for name in names}

    def whole(self, values: Feed, weights: Feed | None = None) -> Feed:
        """The values with the wide ones, of which the narrow ones are among them.

        Args:
            values: by name.
            weights: elements of `weights`.
        """
        if self.run is None:
            return values
        read: dict[str, Array] = {name: values[name] for name in self.narrow.values()}
        read |= {name: (weights or {})[name] for name in self.weights}
        return {**values, **self.run(read)}


class Kept:
    """From samples to values of a model, by way of what little they are made of.

    Attributes:
        heads: of the wide ones.
    """

    def __init__(self, model: ir.Model, names: Collection[str], open_model: OpenModel) -> None:
        """Opens no session yet.

        Args:
            model: the model; it is not changed.
            names: inputs, or outputs of nodes; others are left out.
            open_model: makes a runner of a model that gives its outputs by name.
        """
        self.heads = heads_of(model, names, open_model)
        self._read: Runner | None = tapped(model, self.heads.read(names), open_model)

    def read(self, feed: Feed) -> Feed:
        """From a sample to the values that are kept, and what is fed."""
        assert self._read is not None
        return self._read(feed)

    def close(self) -> None:
        """Let the model go: nothing more is read, and what was read still becomes whole."""
        self._read = None

    def whole(self, values: Feed) -> Feed:
        """All that is wanted, of what `read` gives."""
        return self.heads.whole(values)


def heads_of(
    model: ir.Model,
    names: Collection[str],
    open_model: OpenModel,
    weights: Collection[str] = (),
) -> Heads:
    """The heads of those values that are far wider than what they are made of.

    Args:
        model: the model; it is not changed.
        names: of values of the main graph; what is fed, or narrow, has no head.
        open_model: makes a runner of a model that gives its outputs by name.
        weights: inputs that stand for weights: the same in every run that is compared.
    """
    fixed = _fixed(model, frozenset(weights))
    found: dict[str, str] = {}
    for node in model.graph:
        for value in node.outputs:
            before = _narrow(value, fixed) if value.name and value.name in names else None
            if before is not None and before.name and value.name:
                found[value.name] = before.name
    if not found:
        return Heads({})
    copy = model.clone()
    graph = copy.graph
    made = {value.name: value for node in graph for value in node.outputs}
    ends = [made[name] for name in found]
    for value in ends:
        value.shape = None  # a declared shape may be too narrow for what is fed
    graph.outputs[:] = ends
    starts = []
    for name in dict.fromkeys(found.values()):
        old = made[name]
        new = ir.Value(name=name, type=old.type or ir.TensorType(_type(old)), shape=None)
        old.name = f"{name}/before"
        old.replace_all_uses_with(new)
        starts.append(new)
    given = [value for value in graph.inputs if value.name in weights]
    graph.inputs[:] = [*starts, *given]
    RemoveUnusedNodesPass()(copy)
    read = {value for node in graph for value in read_by(node)}
    graph.inputs[:] = [*starts, *(value for value in given if value in read)]
    own = frozenset(value.name or "" for value in given if value in read)
    return Heads(found, own, open_model(copy))


def _fixed(model: ir.Model, weights: frozenset[str]) -> set[ir.Value]:
    """The values of the main graph that are the same in every run."""
    graph = model.graph
    fixed = {value for value in graph.initializers.values() if not value.is_graph_input()}
    fixed |= {value for value in graph.inputs if value.name in weights}
    for node in graph:
        if all(value is None or value in fixed for value in read_by(node)) and not _draws(node):
            fixed.update(node.outputs)
    return fixed


def _draws(node: ir.Node) -> bool:
    return node.op_type.startswith("Random") or node.op_type in ("Bernoulli", "Multinomial")


def _narrow(value: ir.Value, fixed: set[ir.Value]) -> ir.Value | None:
    """What a wide value is made of by nodes that read nothing else; None where it is not wide."""
    found = None
    while (node := value.producer()) is not None:
        moving = [given for given in node.inputs if given is not None and given not in fixed]
        inner = any(own.type in _GRAPHS for own in node.attributes.values())
        if len(moving) != 1 or len(node.outputs) != 1 or inner or _draws(node):
            break
        value = moving[0]
        if node.op_type == "MatMul" and value is node.inputs[0]:
            size = _sizes(node.inputs[1])
            if size is not None and size[1] >= max(WIDE, TIMES * size[0]):
                found = value
    return None if found is None or found.producer() is None else found


def _type(value: ir.Value) -> ir.DataType:
    """The type of what a product with a matrix of a known type reads."""
    for node in value.consumers():
        other: ir.Value | None = node.inputs[1] if node.op_type == "MatMul" else None
        while other is not None:
            tensor, made = other.const_value, other.producer()
            dtype = other.dtype if tensor is None else tensor.dtype
            if dtype is not None:
                return dtype
            other = None if made is None else made.inputs[0]
    return ir.DataType.FLOAT


def _sizes(matrix: ir.Value | None) -> tuple[int, ...] | None:
    """The two sizes of a matrix, also behind a Transpose."""
    if matrix is None:
        return None
    tensor = matrix.const_value
    shape = static_shape(matrix.shape if tensor is None else tensor.shape)
    node = matrix.producer()
    if shape is None and node is not None and node.op_type == "Transpose":
        inner = _sizes(node.inputs[0])
        shape = None if inner is None else inner[::-1]
    return shape if shape is not None and len(shape) == 2 else None
