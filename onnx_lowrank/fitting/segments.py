"""Walk a graph piece by piece over many samples, each piece run once.

What later pieces read is kept for every sample between them, so that a walk with any number of
stops costs one forward pass; weights may be replaced on the way.  What does not fit in memory
waits in files.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnx.helper
import onnx_ir as ir

from onnx_lowrank.errors import InputError
from onnx_lowrank.numerics.arrays import Array, Feed
from onnx_lowrank.runtime.shelf import Shelf, Values
from onnx_lowrank.runtime.taps import (
    Runner,
)

__all__ = ["OpenProto", "Walk"]

OpenProto = Callable[[onnx.ModelProto], Runner]

# What these make is no tensor and cannot be handed from one piece to the next.
_NO_TENSORS = frozenset(
    {"Optional", "SequenceConstruct", "SequenceEmpty", "SequenceInsert", "SequenceErase"}
    | {"SequenceMap", "SplitToSequence"}
)


class Walk:
    """A model on its way through its nodes.

    Attributes:
        live: for each sample the values that are known and still needed, by name.
    """

    def __init__(
        self,
        model: ir.Model,
        feeds: Sequence[Feed],
        open_model: OpenProto,
        shelf: Shelf | None = None,
    ) -> None:
        """A walk at its start.

        Args:
            model: the model; it is not changed.
            feeds: samples.
            open_model: makes a runner of a model.
            shelf: where values wait between pieces; default: all of them in memory.

        Raises:
            InputError: the model makes sequences.
        """
        shelf = shelf or Shelf()
        self._model = model
        self._nodes = list(model.graph)
        for node in self._nodes:
            if node.op_type in _NO_TENSORS:
                raise InputError(
                    f"{node.op_type} {node.name!r}: a model with sequences cannot be run piece by "
                    "piece"
                )
        self._constant = _constant_nodes(self._nodes, set(model.graph.initializers))
        self._made_by = frozenset(self._constant.values())
        self._open = open_model
        self._at = 0
        self._replaced: dict[str, Array] = {}
        self._last: dict[str, int] = {}
        for index, node in enumerate(self._nodes):
            for name in _reads(node):
                self._last[name] = index
        self.live: list[Values] = [shelf.values(feed) for feed in feeds]

    def replace(self, name: str, array: Array) -> None:
        """From here on a constant has other elements."""
        self._replaced[name] = array

    def fork(self, samples: Sequence[int] | None = None) -> Walk:
        """Another walk from here on, of all samples or of some; this one stays."""
        other = copy.copy(self)
        other._replaced = dict(self._replaced)
        chosen = range(len(self.live)) if samples is None else samples
        other.live = [self.live[sample].only(self.live[sample]) for sample in chosen]
        return other

    def advance(self, until: int, keep: Sequence[str] = ()) -> None:
        """Run the nodes up to the given place, exclusive.

        Args:
            until: index of the first node that is not run.
            keep: values to keep although no later node reads them.
        """
        nodes = [node for node in self._nodes[self._at : until] if node not in self._made_by]
        self._at = max(self._at, until)
        needed = {name for name, last in self._last.items() if last >= until} | set(keep)
        if nodes:
            made = {value.name for node in nodes for value in node.outputs if value.name}
            read = {name for node in nodes for name in _reads(node)}
            outputs = sorted(made & needed)
            if outputs:
                inputs = sorted((read - made) & set(self.live[0]))
                run = self._open(self._segment(nodes, inputs, outputs))
                for values in self.live:
                    values.update(run({name: values[name] for name in inputs}))
        self.live = [values.only(needed) for values in self.live]

    def _segment(
        self, nodes: Sequence[ir.Node], inputs: Sequence[str], outputs: Sequence[str]
    ) -> onnx.ModelProto:
        read = {name for node in nodes for name in _reads(node)} - set(inputs)
        # Constants, and what nodes make of them alone, belong to every piece that reads them.
        first: list[ir.Node] = []
        waiting = [name for name in read if name in self._constant]
        while waiting:
            name = waiting.pop()
            node = self._constant[name]
            if name not in self._replaced and node not in first:
                first.append(node)
                read |= _reads(node)
                waiting += [other for other in _reads(node) if other in self._constant]
        first.sort(key=self._nodes.index)
        nodes = [*first, *nodes]
        initializers = [
            ir.serde.serialize_tensor(ir.Tensor(array, name=name))
            for name, array in self._replaced.items()
            if name in read
        ]
        for name, value in self._model.graph.initializers.items():
            if name in read and name not in self._replaced and value.const_value is not None:
                tensor = value.const_value
                copy = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=name)
                initializers.append(ir.serde.serialize_tensor(copy))
        graph = onnx.helper.make_graph(
            [ir.serde.serialize_node(node) for node in nodes],
            "segment",
            [_declared(name, self.live[0][name]) for name in inputs],
            [onnx.ValueInfoProto(name=name) for name in outputs],
            initializers,
        )
        return onnx.helper.make_model(
            graph,
            opset_imports=[
                onnx.helper.make_opsetid(domain, version)
                for domain, version in self._model.opset_imports.items()
            ],
            functions=[ir.to_proto(function) for function in self._model.functions.values()],
            ir_version=max(self._model.ir_version, 4),
        )


def _constant_nodes(nodes: Sequence[ir.Node], known: set[str]) -> dict[str, ir.Node]:
    """Nodes that depend on constants only, by what they make."""
    made: dict[str, ir.Node] = {}
    for node in nodes:
        simple = all(
            attribute.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
            for attribute in node.attributes.values()
        )
        alike = simple and not node.op_type.startswith("Random") and node.op_type != "Multinomial"
        if alike and all(name in known or name in made for name in _reads(node)):
            made |= {value.name: node for value in node.outputs if value.name}
    return made


def _declared(name: str, array: Array) -> onnx.ValueInfoProto:
    kind = int(ir.DataType.from_numpy(array.dtype))
    return onnx.helper.make_tensor_value_info(name, kind, [None] * np.ndim(array))


def _reads(node: ir.Node) -> set[str]:
    """Names that a node reads, also from inside its subgraphs."""
    names = {value.name for value in node.inputs if value is not None and value.name}
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        graphs: Sequence[ir.Graph] = ()
        if attribute.type == ir.AttributeType.GRAPH:
            graphs = [attribute.as_graph()]
        elif attribute.type == ir.AttributeType.GRAPHS:
            graphs = attribute.as_graphs()
        for graph in graphs:
            for inner in graph:
                names |= _reads(inner)
            names |= {value.name for value in graph.outputs if value.name}
    return names
