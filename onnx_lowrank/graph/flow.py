"""Flow: which values of the main graph depend on others, in their contents and in their sizes."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import onnx_ir as ir

__all__ = ["Flow", "flow_from", "holds_float", "read_by"]

_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
_FLOATS = frozenset(
    {
        ir.DataType.FLOAT,
        ir.DataType.FLOAT16,
        ir.DataType.BFLOAT16,
        ir.DataType.DOUBLE,
    }
)
# The contents of their inputs decide the sizes of their outputs.
_SIZING = frozenset({"Compress", "NonMaxSuppression", "NonZero", "StringSplit", "Unique"})
# Inputs whose contents decide the sizes of the outputs.
_SIZES: dict[str, tuple[int, ...]] = {
    "CenterCropPad": (1,),
    "ConstantOfShape": (0,),
    "Expand": (1,),
    "OneHot": (1,),
    "Pad": (1, 3),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Resize": (2, 3),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Squeeze": (1,),
    "Tile": (1,),
    "TopK": (1,),
    "Unsqueeze": (1,),
    "Upsample": (1,),
}
_INTEGER_OUTPUTS = frozenset({"ArgMax", "ArgMin", "NonMaxSuppression", "NonZero", "Shape", "Size"})
_TRUTHS = frozenset(
    {"And", "Equal", "Greater", "GreaterOrEqual", "IsInf", "IsNaN", "Less", "LessOrEqual", "Not"}
    | {"Or", "Xor"}
)
# What gives a sequence, or an optional value, of its first input; what makes it longer or shorter.
_SEQUENCES = frozenset({"Optional", "SequenceConstruct", "SplitToSequence"})
_SAME_SEQUENCE = frozenset({"Identity", "SequenceErase", "SequenceInsert"})
# What gives tensors of a sequence or of an optional value.
_OF_SEQUENCES = frozenset({"ConcatFromSequence", "OptionalGetElement", "SequenceAt"})
_NO_FLOATS = frozenset(
    {*_INTEGER_OUTPUTS, *_TRUTHS, *_SEQUENCES}
    | {"SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceMap"}
)


@dataclass(frozen=True, eq=False)
class Flow:
    """What depends on some values or nodes.

    Attributes:
        reached: values of the main graph whose contents depend on them.
        loose: those of them whose sizes do.
    """

    reached: frozenset[ir.Value]
    loose: frozenset[ir.Value]

    def sources(self, value: ir.Value) -> list[ir.Value]:
        """The nearest floats of a steady size from which a reached value is computed."""
        found: dict[ir.Value, None] = {}
        seen: set[ir.Value] = set()
        waiting = [value]
        while waiting:
            node = waiting.pop().producer()
            for source in () if node is None else _read_in_order(node):
                if source in seen or source not in self.reached:
                    continue
                seen.add(source)
                if self.comparable(source):
                    found[source] = None
                else:
                    waiting.append(source)
        return list(found)

    def comparable(self, value: ir.Value) -> bool:
        """Whether a value of two models can be compared number by number."""
        return value not in self.loose and holds_float(value)


def flow_from(
    model: ir.Model,
    *,
    values: Collection[ir.Value] = (),
    nodes: Collection[ir.Node] = (),
) -> Flow:
    """What depends on these values, and on what these nodes give.

    Args:
        model: a sorted graph.
        values: inputs, initializers or outputs of nodes.
        nodes: nodes, also those inside subgraphs.
    """
    reached, loose = set(values), set[ir.Value]()
    chosen = set(nodes)
    for node in model.graph:
        read = read_by(node)
        inner = list(_inner(node))
        moved = node in chosen or not chosen.isdisjoint(inner) or not reached.isdisjoint(read)
        varies = not loose.isdisjoint(read)
        if node.op_type in ("Shape", "Size"):
            if varies:
                reached.update(node.outputs)
            continue
        if not moved:
            continue
        reached.update(node.outputs)
        sizing = any(_decides_sizes(one, reached) for one in (node, *inner))
        if node.op_type == "Loop":
            carried = len(node.inputs) - 2
            if varies or sizing:
                loose.update(node.outputs)
            elif node.inputs[0] in reached or _may_stop(node):
                loose.update(node.outputs[carried:])
        elif varies or sizing:
            loose.update(node.outputs)
    return Flow(frozenset(reached), frozenset(loose))


def read_by(node: ir.Node) -> set[ir.Value | None]:
    """What a node reads, also inside of its subgraphs."""
    read = set(node.inputs)
    for graph in _graphs(node):
        for inner in ir.traversal.RecursiveGraphIterator(graph):
            read.update(inner.inputs)
        read.update(graph.outputs)
    return read


def holds_float(value: ir.Value) -> bool:
    """Whether a value is a tensor of floats, as declared or else as its operator tells."""
    while True:
        if value.type is not None and not isinstance(value.type, ir.TensorType):
            return False
        if value.dtype is not None:
            return value.dtype in _FLOATS
        if value.const_value is not None:
            return value.const_value.dtype in _FLOATS
        node = value.producer()
        if node is None or node.op_type in _NO_FLOATS:
            return False
        if node.op_type in _OF_SEQUENCES:
            return _holds_floats(node.inputs[0])
        if node.op_type == "Cast":
            return node.attributes.get_int("to", 0) in {int(kind) for kind in _FLOATS}
        if value is not node.outputs[0] and node.op_type in ("TopK", "Unique", "Dropout"):
            return False
        place = 1 if node.op_type == "Where" else 0
        source = node.inputs[place] if len(node.inputs) > place else None
        if source is None:
            return False
        value = source


def _holds_floats(value: ir.Value | None) -> bool:
    """Whether a sequence or an optional value holds tensors of floats."""
    while value is not None:
        kind = value.type
        while isinstance(kind, ir.SequenceType | ir.OptionalType):
            kind = kind.elem_type
        if kind is not None:
            return kind.dtype in _FLOATS
        node = value.producer()
        if node is None:
            return False
        if node.op_type == "SequenceEmpty":
            return node.attributes.get_int("dtype", ir.DataType.FLOAT) in _FLOATS
        if node.op_type in _SEQUENCES:
            first = node.inputs[0] if node.inputs else None
            return first is not None and (holds_float(first) or _holds_floats(first))
        value = node.inputs[0] if node.op_type in _SAME_SEQUENCE else None
    return False


def _read_in_order(node: ir.Node) -> list[ir.Value]:
    read = [value for value in node.inputs if value is not None]
    for graph in _graphs(node):
        for inner in ir.traversal.RecursiveGraphIterator(graph):
            read += [value for value in inner.inputs if value is not None]
        read.extend(graph.outputs)
    return read


def _graphs(node: ir.Node) -> Iterator[ir.Graph]:
    for given in node.attributes.values():
        if given.type in _GRAPHS and not given.is_ref():
            yield from [given.as_graph()] if given.type == _GRAPHS[0] else given.as_graphs()


def _inner(node: ir.Node) -> Iterator[ir.Node]:
    for graph in _graphs(node):
        yield from ir.traversal.RecursiveGraphIterator(graph)


def _decides_sizes(node: ir.Node, reached: Collection[ir.Value]) -> bool:
    if node.op_type in _SIZING:
        return any(value in reached or value.graph is None for value in node.inputs if value)
    places = _SIZES.get(node.op_type, ())
    given = [node.inputs[place] for place in places if place < len(node.inputs)]
    return any(value in reached for value in given if value is not None)


def _may_stop(loop: ir.Node) -> bool:
    """Whether a Loop's condition may end it: it is not just the one that goes in or a constant."""
    (body,) = _graphs(loop)
    condition: ir.Value | None = body.outputs[0]
    while condition is not None and (node := condition.producer()) is not None:
        if node.op_type == "Constant":
            return False
        if node.op_type not in ("Cast", "Identity"):
            return True
        condition = node.inputs[0]
    return False
