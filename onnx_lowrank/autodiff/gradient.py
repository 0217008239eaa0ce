"""The gradient of a loss, as another ONNX graph: one run gives the loss and its gradients.

The losses are ``Σ w (y − t)²`` of chosen values y, with targets t and weights w as further inputs;
of logits they may be ``Σ w KL(softmax t ‖ softmax y)`` over the rows.
What is trained becomes inputs, and from the losses back to them every node's derivative
(`onnx_lowrank.autodiff.derivatives`) is written behind the model's own nodes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx.version_converter
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from onnx_lowrank.autodiff.derivatives import Tape, find_derivative
from onnx_lowrank.autodiff.derivatives.base import unsupported
from onnx_lowrank.errors import DerivativeError, InputError, named
from onnx_lowrank.graph.constant import FLOATS
from onnx_lowrank.graph.fixed import infer_shapes
from onnx_lowrank.graph.flow import read_by
from onnx_lowrank.graph.serialize import from_proto, to_proto
from onnx_lowrank.graph.walk import static_shape
from onnx_lowrank.numerics.arrays import Feed
from onnx_lowrank.runtime.taps import OpenModel, look

__all__ = [
    "Gradients",
    "Loss",
    "depends",
    "differentiable",
    "gradient_model",
    "loss_model",
    "read_ranks",
]

# Older operators have other forms of the same nodes; this one has all that derivatives use.
_OLDEST, _CONVERTED = 16, 17
_FLOAT = ir.DataType.FLOAT
_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


@dataclass(frozen=True)
class Loss:
    """Names around the loss of one value y: ``Σ w (y − t)²``, or a divergence of classes.

    Attributes:
        value: y.
        target: input for t, of y's shape.
        weight: input for w, which is repeated to y's shape.
        loss: output, a scalar.
    """

    value: str
    target: str
    weight: str
    loss: str

    @classmethod
    def of(cls, value: str) -> Loss:
        """The names for a value."""
        return cls(value, f"{value}/target", f"{value}/weight", f"{value}/loss")


@dataclass(frozen=True)
class Gradients:
    """A model with gradients as outputs.

    Attributes:
        model: its inputs are the model's own, what is trained, and targets and weights; its outputs
            the losses and the gradients.
        outputs: for what it is differentiated by, the output with its gradient; what no loss
            depends on is not among them.
    """

    model: ir.Model
    outputs: Mapping[str, str]


def differentiable(model: ir.Model, trained: Sequence[str]) -> ir.Model:
    """A copy in which everything is float32 and what is trained is an input.

    Functions are inlined and old operator sets are brought up to date, so that every node has one
    of the forms that derivatives know.

    Args:
        model: the model; it is not changed.
        trained: names of initializers, or of outputs of Constant nodes.

    Raises:
        DerivativeError: the operators cannot be brought up to date.
        InputError: a name is not a constant.
    """
    copy = model.clone()
    InlinePass()(copy)
    copy = _updated(copy)
    _widen(copy)
    _open(copy, trained)
    for node in copy.graph:
        for output in node.outputs:
            output.shape = None  # as declared, it may be too narrow for what is fed
            if not output.is_graph_output():
                output.type = None
    infer_shapes(copy)
    return copy


def _updated(model: ir.Model) -> ir.Model:
    version = model.opset_imports.get("", model.opset_imports.get("ai.onnx", _CONVERTED))
    if version >= _OLDEST:
        return model
    try:
        proto = onnx.version_converter.convert_version(to_proto(model), _CONVERTED)
    except Exception as error:  # the converter's errors have no common base but this
        raise DerivativeError(
            f"the model has operator set {version}, expected {_OLDEST} or newer, and "
            f"cannot be converted: {' '.join(str(error).split())[:200]}"
        ) from error
    return from_proto(proto)


def _widen(model: ir.Model) -> None:
    """Make all floats float32, as gradients of 16 bits vanish and 64 bits are not needed."""
    narrow = FLOATS - {_FLOAT}
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        tensor = value.const_value
        if tensor is not None and tensor.dtype in narrow:
            value.const_value = _float32(tensor, value.name)
        elif value.dtype not in narrow:
            continue
        value.type = ir.TensorType(_FLOAT)  # the old one is that of the other model too
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        for name, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.TENSOR:
                tensor = attribute.as_tensor()
                if tensor.dtype in narrow:
                    node.attributes[name] = ir.AttrTensor(name, _float32(tensor, tensor.name))
            elif (
                name in ("to", "dtype")
                and attribute.type == ir.AttributeType.INT
                and attribute.as_int() in narrow
            ):
                node.attributes[name] = ir.AttrInt64(name, int(_FLOAT))


def _float32(tensor: ir.TensorProtocol, name: str | None) -> ir.Tensor[np.ndarray]:
    return ir.Tensor(tensor.numpy().astype(np.float32), name=name)


def _open(model: ir.Model, trained: Sequence[str]) -> None:
    """Make constants inputs of the graph."""
    graph = model.graph
    constants = {
        node.outputs[0].name: node
        for node in graph
        if node.op_type == "Constant" and "value" in node.attributes
    }
    for name in trained:
        value = graph.initializers.pop(name, None)
        node = constants.get(name)
        if value is not None:
            value.shape = ir.Shape(_sizes(value.const_value))
            value.const_value, value.type = None, ir.TensorType(_FLOAT)
            if value not in graph.inputs:
                graph.inputs.append(value)
        elif node is not None:
            tensor = node.attributes["value"].as_tensor()
            value = ir.Value(name=name, type=ir.TensorType(_FLOAT), shape=ir.Shape(_sizes(tensor)))
            node.outputs[0].replace_all_uses_with(value)
            graph.remove(node, safe=True)
            graph.inputs.append(value)
        else:
            raise InputError(
                f"{named('heal')}: expected {name!r} to be a constant of the main graph"
            )


def _sizes(tensor: ir.TensorProtocol | None) -> tuple[int, ...]:
    assert tensor is not None
    sizes = static_shape(tensor.shape)
    assert sizes is not None
    return sizes


def read_ranks(
    model: ir.Model,
    by: Sequence[str],
    open_model: OpenModel,
    feed: Feed,
) -> dict[str, int]:
    """The number of axes of values that derivatives read, off a run where it is not known.

    Args:
        model: from `differentiable`; it is not changed.
        by: inputs of the model, or outputs of its nodes, to differentiate by.
        open_model: makes a runner of a model that gives its outputs by name.
        feed: of all the model's inputs.
    """
    reached = depends(model, by)
    around = {
        value.name
        for node in model.graph
        if any(output in reached for output in node.outputs)
        for value in (*node.inputs, *node.outputs)
        if value is not None and value.shape is None and value.name
    }
    if not around:
        return {}
    seen = look(model, around, lambda copy: open_model(copy)(feed))
    return {name: len(shape) for name, shape in seen.shapes.items()}


def loss_model(
    model: ir.Model, values: Sequence[str], by_classes: Collection[str] = ()
) -> ir.Model:
    """A copy whose outputs are only the losses of values.

    Args:
        model: from `differentiable`; it is not changed.
        values: what the losses are of (`Loss`).
        by_classes: those of them that are logits, whose loss is the divergence of the classes.

    Raises:
        InputError: the graph has no such value.
    """
    copy = model.clone()
    _losses(copy, Tape(copy, {}, frozenset()), values, by_classes)
    return copy


def gradient_model(
    model: ir.Model,
    values: Sequence[str],
    by: Sequence[str],
    ranks: Mapping[str, int],
    by_classes: Collection[str] = (),
) -> Gradients:
    """A copy whose outputs are the losses of values and their gradients by inputs or other values.

    Args:
        model: from `differentiable`; it is not changed.
        values: what the losses are of.
        by: inputs of the model, or outputs of its nodes, to differentiate by.
        ranks: number of axes of the values that `read_ranks` read.
        by_classes: those of the values that are logits, whose loss is the divergence of classes.

    Raises:
        InputError: the graph has no such value.
        DerivativeError: a node between a loss and what is asked for has no derivative; it is named.
    """
    copy = model.clone()
    graph, nodes = copy.graph, list(copy.graph)
    reached = depends(copy, by)
    tape = Tape(copy, ranks, reached)
    grads: dict[ir.Value, list[ir.Value]] = {}
    for y, slope in _losses(copy, tape, values, by_classes):
        grads[y] = [slope]
    for node in reversed(nodes):
        own = [
            tape.add(grads[output]) if output in grads and output in reached else None
            for output in node.outputs
        ]
        if all(gradient is None for gradient in own) or reached.isdisjoint(read_by(node)):
            continue
        if any(given.type in _GRAPHS for given in node.attributes.values()):
            raise unsupported(node, "has subgraphs: no derivative here")
        found = find_derivative(node)(tape, node, own)
        for value, gradient in zip(node.inputs, found, strict=False):
            if value is not None and gradient is not None and value in reached:
                grads.setdefault(value, []).append(gradient)
    outputs = {}
    for value in (*graph.inputs, *(output for node in nodes for output in node.outputs)):
        if value.name is not None and value.name in by and value in grads:
            outputs[value.name] = f"{value.name}/gradient"
            _output(graph, tape.add(grads[value]), outputs[value.name])
    return Gradients(copy, outputs)


def depends(model: ir.Model, names: Sequence[str]) -> set[ir.Value]:
    """The floats that depend on inputs or other values, these included."""
    wanted = set(names)
    reached = {value for value in model.graph.inputs if value.name in wanted}
    for node in model.graph:
        moved = any(value in reached for value in read_by(node))
        reached.update(
            value
            for value in node.outputs
            if (moved or value.name in wanted) and (value.dtype is None or value.dtype in FLOATS)
        )
    return reached


def _losses(
    model: ir.Model, tape: Tape, values: Sequence[str], by_classes: Collection[str]
) -> list[tuple[ir.Value, ir.Value]]:
    """Make the losses the only outputs; each value y, and its loss's gradient."""
    graph = model.graph
    known = {v.name: v for v in graph.inputs}
    known.update((output.name, output) for node in graph for output in node.outputs)
    del graph.outputs[:]
    found = []
    for name in values:
        if name not in known:
            raise InputError(f"expected {name!r} to be a value of the main graph, found none")
        names, y = Loss.of(name), known[name]
        target, weight = (
            ir.Value(name=given, type=ir.TensorType(_FLOAT), shape=None)
            for given in (names.target, names.weight)
        )
        graph.inputs.extend([target, weight])
        make = _divergence if name in by_classes else _square
        total, slope = make(tape, y, target, weight)
        _output(graph, tape.op("ReduceSum", total, keepdims=0), names.loss)
        found.append((y, slope))
    return found


def _square(
    tape: Tape, y: ir.Value, target: ir.Value, weight: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """``w (y − t)²``, whose sum changes by ``2 w (y − t)``."""
    apart = tape.op("Sub", y, target)
    scaled = tape.op("Mul", apart, weight)
    return tape.op("Mul", apart, scaled), tape.op("Mul", scaled, tape.scalar(2.0))


def _divergence(
    tape: Tape, y: ir.Value, target: ir.Value, weight: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """``w q (log q − log p)`` with ``q = softmax t`` and ``p = softmax y``: ``w (p − q)``."""
    p, q = (tape.op("Softmax", value, axis=-1) for value in (y, target))
    log_p, log_q = (tape.op("LogSoftmax", value, axis=-1) for value in (y, target))
    terms = tape.op("Mul", q, tape.op("Sub", log_q, log_p))
    return tape.op("Mul", terms, weight), tape.op("Mul", tape.op("Sub", p, q), weight)


def _output(graph: ir.Graph, value: ir.Value, name: str) -> None:
    """Give a value out under a name, also one that is given out already."""
    node = ir.Node("", "Identity", [value], name=name)
    output = node.outputs[0]
    output.name, output.dtype, output.shape = name, _FLOAT, None
    graph.append(node)
    graph.outputs.append(output)
