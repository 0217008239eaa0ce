"""The face of a model: what others see of it and what describes it, apart from what it computes.

That is its inputs with their default values, its outputs, the declared types and shapes, names,
opset imports, the IR version, annotations of quantization, denotations, documentation, metadata.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes

from onnx_lowrank.graph.walk import all_graphs, all_nodes, graph_values

__all__ = [
    "FREE_INITIALIZERS",
    "differences",
    "drop_inferred",
    "lift_constants",
    "lower_initializers",
    "restore",
]

T = TypeVar("T")

# Where onnx_ir keeps the names of scale and zero point that a quantization annotation gives.
_ANNOTATION = "quant_parameter_tensor_names"
# Marks a value whose type and shape the original does not declare.
_INFERRED = "onnx_lowrank.inferred"
FREE_INITIALIZERS = 4
"""The IR version before which every initializer is an input."""


def restore(model: ir.Model, original: ir.Model, origins: Mapping[ir.Node, ir.Node]) -> None:
    """Give a model the face of the one that it was made from, in place.

    Args:
        model: computes the same as the original; inputs that have a default value there may be
            inputs without one, or none at all.
        original: the model whose face is wanted; it is not changed.
        origins: node of the model -> node of the original that it stands for.
    """
    model.ir_version = original.ir_version
    model.producer_name, model.producer_version = original.producer_name, original.producer_version
    model.domain, model.model_version = original.domain, original.model_version
    model.doc_string = original.doc_string
    _replace(model.metadata_props, original.metadata_props)
    used = {node.domain for node in all_nodes(model)}
    extra = {d: v for d, v in model.opset_imports.items() if d in used}
    _replace(model.opset_imports, {**extra, **original.opset_imports})
    if original.functions:
        model.functions.clear()
        model.functions.update(original.clone().functions)
    _restore_inputs(model, original)
    for node, old in origins.items():
        _replace(node.metadata_props, old.metadata_props)
        node.doc_string = old.doc_string
        node.meta.update(old.meta)
        tensor, stored = _tensor(node), _tensor(old)
        if tensor is not None and _same(tensor, stored):
            node.attributes["value"] = old.attributes["value"]
    for graph, old_graph in _pairs(model, original, origins):
        graph.name, graph.doc_string = old_graph.name, old_graph.doc_string
        _replace(graph.metadata_props, old_graph.metadata_props)
        _restore_values(graph, old_graph)
    _restore_annotated(model, original)
    lower_initializers(model)


def drop_inferred(model: ir.Model) -> None:
    """Remove types and shapes that the original of a restored model does not declare, in place."""
    for graph in all_graphs(model):
        for value in graph_values(graph):
            if value.meta.get(_INFERRED) and not value.is_graph_output():
                value.type = value.shape = None


def lift_constants(model: ir.Model) -> int:
    """Turn Constant nodes that hold weights into initializers, in place; how many.

    ONNX Runtime's quantizers look at initializers only.
    """
    before = sum(len(graph.initializers) for graph in all_graphs(model))
    passes.LiftConstantsToInitializersPass()(model)
    return sum(len(graph.initializers) for graph in all_graphs(model)) - before


def differences(one: ir.Model, other: ir.Model, *, versions: bool = True) -> list[str]:
    """How the face of the second model that callers see differs from the first's, in sentences.

    Compared are the inputs (names, types, shapes, default values), the outputs (the same without
    values), and the opset imports and the IR version where ``versions`` are known of both.
    """
    found = [*_differing("input", one.graph.inputs, other.graph.inputs)]
    found += _differing("output", one.graph.outputs, other.graph.outputs)
    if not versions:
        return found
    if one.ir_version != other.ir_version:
        found.append(f"IR version {other.ir_version} in place of {one.ir_version}")
    before, after = (_domains(model) for model in (one, other))
    for domain in dict.fromkeys([*before, *after]):
        if before.get(domain) != after.get(domain):
            found.append(
                f"opset import {domain or 'ai.onnx'!r}: {after.get(domain, 'none')} in place of "
                f"{before.get(domain, 'none')}"
            )
    return found


def _domains(model: ir.Model) -> dict[str, int]:
    return {"" if d == "ai.onnx" else d: version for d, version in model.opset_imports.items()}


def _differing(kind: str, before: Iterable[ir.Value], after: Iterable[ir.Value]) -> Iterator[str]:
    old, new = ({value.name: value for value in values} for values in (before, after))
    for name in old:
        if name not in new:
            yield f"{kind} {name!r} is gone"
    for name, value in new.items():
        if name not in old:
            yield f"{kind} {name!r} is new"
            continue
        was, now = _described(old[name]), _described(value)
        if was != now:
            yield f"{kind} {name!r} is {now} in place of {was}"
        defaults = _default(old[name]), _default(value)
        if (defaults[0] is None) != (defaults[1] is None):
            has = "has no default value any more" if defaults[1] is None else "has a default value"
            yield f"{kind} {name!r} {has}"
        elif defaults[0] is not None and not _same(*defaults):
            yield f"{kind} {name!r} has another default value"
    if list(old) != list(new) and sorted(map(str, old)) == sorted(map(str, new)):
        yield f"the {kind}s stand in another order"


def _described(value: ir.Value) -> str:
    kind = "of unknown type" if value.type is None else str(value.type)
    if value.shape is None:
        return f"{kind} of unknown shape"
    axes = ["?" if d is None else str(d) for d in (_size(d) for d in value.shape)]
    return f"{kind} [{', '.join(axes)}]"


def _size(dim: int | ir.SymbolicDim) -> int | str | None:
    return dim if isinstance(dim, int) else dim.value


def _default(value: ir.Value) -> ir.TensorProtocol | None:
    return value.const_value if value.is_graph_input() and value.is_initializer() else None


def _same(one: ir.TensorProtocol | None, other: ir.TensorProtocol | None) -> bool:
    """Whether two tensors hold the same bits."""
    if one is other:
        return True
    if one is None or other is None or one.dtype != other.dtype or one.nbytes != other.nbytes:
        return False
    if tuple(one.shape) != tuple(other.shape):
        return False
    a, b = (np.ascontiguousarray(tensor.numpy()).reshape(-1) for tensor in (one, other))
    if one.dtype == ir.DataType.STRING:
        return np.array_equal(a, b)
    return np.array_equal(a.view(np.uint8), b.view(np.uint8))  # NaN too


def _replace(mapping: dict[str, T], wanted: Mapping[str, T]) -> None:
    mapping.clear()
    mapping.update(wanted)


def _pairs(
    model: ir.Model, original: ir.Model, origins: Mapping[ir.Node, ir.Node]
) -> Iterator[tuple[ir.Graph, ir.Graph]]:
    """Graphs of the model and those of the original that they stand for."""
    yield model.graph, original.graph
    for node, old in origins.items():
        for name, attribute in node.attributes.items():
            then = old.attributes.get(name)
            if then is not None and attribute.type == then.type == ir.AttributeType.GRAPH:
                yield attribute.as_graph(), then.as_graph()


def _restore_inputs(model: ir.Model, original: ir.Model) -> None:
    graph = model.graph
    known = {value.name: value for value in graph.inputs}
    graph.inputs.clear()
    for old in original.graph.inputs:
        assert old.name is not None
        value = known.get(old.name)
        if old.is_initializer() and value is None:
            value = graph.initializers.get(old.name)
            if value is None:
                continue  # folded, or read by nothing: the caller said that it is a constant
        if value is None:
            value = ir.Value(name=old.name)
        if old.is_initializer() and not value.is_initializer():
            value.const_value = old.const_value
            graph.register_initializer(value)
        graph.inputs.append(value)


def _restore_values(graph: ir.Graph, original: ir.Graph) -> None:
    olds = {value.name: value for value in graph_values(original)}
    declares = any(
        value.type is not None or value.shape is not None
        for node in original
        for value in node.outputs
        if not value.is_graph_output()
    )
    for value in list(graph_values(graph)):
        old = olds.get(value.name)
        if old is None:
            if not declares and value.producer() is not None:
                value.meta[_INFERRED] = True
            continue
        _replace(value.metadata_props, old.metadata_props)
        value.doc_string = old.doc_string
        value.meta.update(old.meta)
        if value.is_graph_input() or value.is_graph_output():
            value.type, value.shape = old.type, old.shape
        elif value.producer() is not None:
            if old.type is None and old.shape is None:
                value.meta[_INFERRED] = True
            else:
                value.type, value.shape = old.type or value.type, old.shape
        if value.is_initializer() and old.is_initializer():
            stored = old.const_value  # with its documentation, and without a copy in memory
            if _same(value.const_value, stored):
                value.const_value = stored


def _tensor(node: ir.Node) -> ir.TensorProtocol | None:
    """The tensor of a Constant node."""
    attribute = node.attributes.get("value") if node.op_type == "Constant" else None
    if attribute is None or attribute.is_ref() or attribute.type != ir.AttributeType.TENSOR:
        return None
    return attribute.as_tensor()


def _restore_annotated(model: ir.Model, original: ir.Model) -> None:
    """Keep the initializers that only annotations of quantization name."""
    graph = model.graph
    known = {value.name for value in graph_values(graph)}
    for value in list(graph_values(graph)):
        for name in value.meta.get(_ANNOTATION, {}).values():
            old = original.graph.initializers.get(name)
            if name in known or old is None:
                continue
            kept = ir.Value(name=name, type=old.type, shape=old.shape, const_value=old.const_value)
            graph.register_initializer(kept)
            known.add(name)


def lower_initializers(model: ir.Model) -> None:
    """Before IR version 4, turn initializers that are no inputs into Constant nodes, in place."""
    if model.ir_version >= FREE_INITIALIZERS:
        return
    for graph in all_graphs(model):
        for name, value in list(graph.initializers.items()):
            if value.is_graph_input() or value.const_value is None:
                continue
            node = ir.Node(
                "",
                "Constant",
                [],
                [ir.AttrTensor("value", value.const_value)],
                name=f"{name}_constant",
            )
            output = node.outputs[0]
            output.type, output.shape = value.type, value.shape
            del graph.initializers[name]
            output.name = name
            value.replace_all_uses_with(output, replace_graph_outputs=True)
            graph.insert_before(graph[0], node) if len(graph) else graph.append(node)
