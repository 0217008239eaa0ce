"""The tape on which derivatives are written, and the table of the operators' derivatives.

A derivative is one function: it gets the node and the gradient of the loss by each of the node's
outputs, writes nodes that compute the gradient by each of its inputs, and returns these values.  It
reads the node's own inputs and outputs; nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnx_lowrank.errors import DerivativeError
from onnx_lowrank.graph.elements import constant_value
from onnx_lowrank.graph.names import Names
from onnx_lowrank.graph.walk import node_name, operator, static_shape

__all__ = [
    "Body",
    "Derivative",
    "Tape",
    "ValueGradients",
    "derivative",
    "find_derivative",
    "known_operators",
    "unsupported",
]

Value = ir.Value
ValueGradients = Sequence[Value | None]
"""Gradients of a node's outputs or inputs, in their order; None stands for 0."""
Derivative = Callable[["Tape", ir.Node, ValueGradients], ValueGradients]
"""From a node and the gradients of its outputs to those of its inputs."""

_TABLE: dict[tuple[str, str], Derivative] = {}
Attribute = int | float | str | Sequence[int]


def derivative(*op_types: str, domain: str = "") -> Callable[[Derivative], Derivative]:
    """Enter a function as the derivative of operators."""

    def enter(function: Derivative) -> Derivative:
        for op_type in op_types:
            _TABLE[domain, op_type] = function
        return function

    return enter


def known_operators() -> frozenset[tuple[str, str]]:
    """Domain and name of every operator that has a derivative."""
    return frozenset(_TABLE)


def find_derivative(node: ir.Node) -> Derivative:
    """The derivative of a node's operator.

    Raises:
        DerivativeError: there is none.
    """
    found = _TABLE.get(operator(node))
    if found is None:
        raise unsupported(node, "has no derivative here")
    return found


def unsupported(node: ir.Node, why: str) -> DerivativeError:
    """The error for a node that cannot be differentiated."""
    domain, op_type = operator(node)
    name = f"{domain}.{op_type}" if domain else op_type
    return DerivativeError(f"operator {name} at node {node_name(node)!r} {why}")


class Body:
    """Writes the nodes of one step of a Scan."""

    def __init__(self, tape: Tape) -> None:
        self._tape = tape
        self.nodes: list[ir.Node] = []

    def op(self, op_type: str, *inputs: Value, **attributes: Attribute) -> Value:
        """The output of a new node."""
        node = self._tape.node("", op_type, inputs, _attributes(attributes), 1)
        self.nodes.append(node)
        return node.outputs[0]

    def value(self) -> Value:
        """An input of the step, a matrix."""
        return ir.Value(
            name=self._tape.new_name("item"),
            type=ir.TensorType(ir.DataType.FLOAT),
            shape=ir.Shape([None, None]),
        )


ScanStep = Callable[[Body, Sequence[Value], Sequence[Value]], Sequence[Value]]
"""From the states and the items of one step to the new states and what the step gives."""


class Tape:
    """Writes nodes at the end of a graph; the same node twice is written once.

    Attributes:
        graph: where the nodes go.
    """

    def __init__(
        self, model: ir.Model, ranks: Mapping[str, int], needed: frozenset[Value] | set[Value]
    ) -> None:
        """A tape at the end of a model's graph.

        Args:
            model: its graph gets the nodes.
            ranks: number of axes of the values that a derivative may ask for, by name.
            needed: values whose gradient is wanted.
        """
        self.graph = model.graph
        self._names = Names(model)
        self._ranks = dict(ranks)
        self._needed = needed
        self._written: dict[object, tuple[Value, ...]] = {}
        self._constants: dict[object, Value] = {}

    def needs(self, value: Value | None) -> bool:
        """Whether the gradient of a value is wanted."""
        return value is not None and value in self._needed

    def op(
        self,
        op_type: str,
        *inputs: Value | None,
        domain: str = "",
        **attributes: Attribute,
    ) -> Value:
        """The output of a new node; of the old one if there is one like it."""
        return self.ops(op_type, *inputs, outputs=1, domain=domain, **attributes)[0]

    def ops(
        self,
        op_type: str,
        *inputs: Value | None,
        outputs: int,
        domain: str = "",
        **attributes: Attribute,
    ) -> tuple[Value, ...]:
        """All outputs of a new node."""
        key = (
            domain,
            op_type,
            tuple(None if value is None else id(value) for value in inputs),
            tuple((name, _hashable(given)) for name, given in sorted(attributes.items())),
        )
        if key not in self._written:
            node = self.node(domain, op_type, inputs, _attributes(attributes), outputs)
            self.graph.append(node)
            self._written[key] = tuple(node.outputs)
        return self._written[key]

    def further_outputs(self, node: ir.Node, count: int) -> Sequence[Value]:
        """The outputs of a node of the model, at least so many, optional ones among them."""
        if len(node.outputs) < count:
            node.resize_outputs(count)
        for output in node.outputs:
            if not output.name:
                output.name = self._names.new(f"{node_name(node)}:further")
        return node.outputs

    def scan(
        self,
        states: Sequence[Value],
        items: Sequence[Value],
        step: ScanStep,
        *,
        backwards: bool,
    ) -> tuple[Value, ...]:
        """One step for each element of axis 0 of the items.

        Args:
            states: before the first step, matrices.
            items: what the steps read, one matrix each.
            step: writes a step; it may read values from outside.
            backwards: whether the steps go from the last element to the first.

        Returns:
            the states behind the last step, then what the steps gave, in the order of the items.
        """
        body = Body(self)
        own, parts = [body.value() for _ in states], [body.value() for _ in items]
        made = list(step(body, own, parts))
        for value in made:
            # ONNX Runtime asks for the number of axes.
            value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([None, None])
        graph = ir.Graph([*own, *parts], made, nodes=body.nodes, name=self.new_name("step"))
        order = [int(backwards)]
        attributes = [
            ir.AttrGraph("body", graph),
            ir.AttrInt64("num_scan_inputs", len(items)),
            ir.AttrInt64s("scan_input_directions", order * len(items)),
            ir.AttrInt64s("scan_output_directions", order * (len(made) - len(states))),
        ]
        node = self.node("", "Scan", [*states, *items], attributes, len(made))
        self.graph.append(node)
        return tuple(node.outputs)

    def node(
        self,
        domain: str,
        op_type: str,
        inputs: Sequence[Value | None],
        attributes: Sequence[ir.Attr],
        outputs: int,
    ) -> ir.Node:
        """A node of the gradient, which is in no graph yet, and names for its outputs."""
        name = self.new_name(op_type)
        node = ir.Node(domain, op_type, inputs, attributes, num_outputs=outputs, name=name)
        for output in node.outputs:
            output.name = self._names.new(f"{name}:0")
        return node

    def new_name(self, wanted: str) -> str:
        """A name of the gradient that nothing has yet."""
        return self._names.new(f"gradient/{wanted}")

    def integers(self, *values: int) -> Value:
        """A constant vector of int64."""
        return self._constant(np.array(values, np.int64))

    def scalar(self, value: float) -> Value:
        """A constant scalar of float32, in which everything is computed."""
        return self._constant(np.array(value, np.float32))

    def whole(self, value: int) -> Value:
        """A constant scalar of int64."""
        return self._constant(np.array(value, np.int64))

    def again(self, node: ir.Node, first: Value) -> Value:
        """The output of the same operator with another first input."""
        inputs, attributes = [first, *node.inputs[1:]], list(node.attributes.values())
        copy = self.node(node.domain, node.op_type, inputs, attributes, 1)
        self.graph.append(copy)
        return copy.outputs[0]

    def scaled(self, node: ir.Node, scale: Value) -> Value:
        """The output of a DequantizeLinear with other scales."""
        inputs, attributes = [node.inputs[0], scale, *node.inputs[2:]], node.attributes.values()
        copy = self.node(node.domain, node.op_type, inputs, list(attributes), 1)
        self.graph.append(copy)
        return copy.outputs[0]

    def _constant(self, array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> Value:
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            tensor = ir.Tensor(array, name=self.new_name("constant"))
            value = constant_value(tensor)
            self.graph.register_initializer(value)
            self._constants[key] = value
        return self._constants[key]

    def rank(self, value: Value) -> int:
        """Number of axes of a value of the model."""
        if value.shape is not None:
            return len(value.shape)
        return self._ranks[value.name or ""]

    def shape(self, value: Value) -> Value:
        """The shape of a value, as the model runs."""
        sizes = static_shape(value.shape)
        return self.op("Shape", value) if sizes is None else self.integers(*sizes)

    def size_of(self, value: Value, axis: int) -> Value:
        """The size of one axis, a vector of one element."""
        return self.op("Gather", self.shape(value), self.integers(axis % self.rank(value)))

    def reshaped(self, value: Value, like: Value) -> Value:
        """A value in another's shape, which has as many elements."""
        return self.op("Reshape", value, self.shape(like))

    def zeros(self, like: Value) -> Value:
        """Zeros in the shape of a value."""
        return self.op("Expand", self.scalar(0.0), self.shape(like))

    def summed(self, value: Value, axes: Sequence[int], *, keep: bool = True) -> Value:
        """Sums over axes."""
        return self.op("ReduceSum", value, self.integers(*axes), keepdims=int(keep))

    def add(self, parts: Sequence[Value]) -> Value:
        """The sum of values of one shape."""
        total = parts[0]
        for part in parts[1:]:
            total = self.op("Add", total, part)
        return total

    def narrowed(self, gradient: Value, value: Value, result: Value) -> Value:
        """Sum a gradient of ``result``'s shape over the axes along which ``value`` was repeated.

        Axes of which it is not known whether they were are compared as the model runs.
        """
        own, other = self.rank(value), self.rank(result)
        extra = other - own
        sizes = [None] * own if value.shape is None else list(value.shape)
        wide = [None] * other if result.shape is None else list(result.shape)
        repeated, uncertain = list(range(extra)), False
        for axis, size in enumerate(sizes):
            if size == 1:
                if wide[extra + axis] != 1:
                    repeated.append(extra + axis)
            elif not isinstance(size, int):
                uncertain |= not _same(size, wide[extra + axis])
        if uncertain:
            sizes_before = self.shape(value)
            if extra:
                sizes_before = self.op("Concat", self.integers(*[1] * extra), sizes_before, axis=0)
            differs = self.op("Not", self.op("Equal", sizes_before, self.shape(result)))
            axes = self.op("Reshape", self.op("NonZero", differs), self.integers(-1))
            gradient = self.op("ReduceSum", gradient, axes, keepdims=1, noop_with_empty_axes=1)
            return self.reshaped(gradient, value) if extra else gradient
        if repeated:
            gradient = self.summed(gradient, repeated)
        return self.reshaped(gradient, value) if extra else gradient


def _same(first: object, second: object) -> bool:
    if isinstance(first, ir.SymbolicDim) and isinstance(second, ir.SymbolicDim):
        return first.value is not None and first.value == second.value
    return False


def _hashable(given: Attribute) -> object:
    return given if isinstance(given, int | float | str) else tuple(given)


def _attributes(given: Mapping[str, Attribute]) -> list[ir.Attr]:
    return [_attribute(name, value) for name, value in given.items()]


def _attribute(name: str, given: Attribute) -> ir.Attr:
    if isinstance(given, int):
        return ir.AttrInt64(name, given)
    if isinstance(given, float):
        return ir.AttrFloat32(name, given)
    if isinstance(given, str):
        return ir.AttrString(name, given)
    return ir.AttrInt64s(name, list(given))
