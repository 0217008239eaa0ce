"""``support``: what each execution provider would take of a model, before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnx_lowrank.data.declared import input_specs
from onnx_lowrank.data.shapes import concrete_shapes
from onnx_lowrank.errors import InputError, named
from onnx_lowrank.files import Output, check_outputs
from onnx_lowrank.graph.fixed import fix_shapes, infer_shapes
from onnx_lowrank.graph.load import LoadedModel, ModelLike, load
from onnx_lowrank.graph.walk import node_name
from onnx_lowrank.schema.json_report import JsonReport, tool_name
from onnx_lowrank.targets.rules import Graph, Rules, all_rules
from onnx_lowrank.targets.rules.partitions import partitions

__all__ = ["Left", "ModelSupport", "Support", "SupportReport", "support_of"]


@dataclass(frozen=True)
class Left:
    """A node that is left to the CPU.

    Attributes:
        name: the node.
        op_type: its operator.
        rule: which rule of the provider it breaks.
    """

    name: str
    op_type: str
    rule: str


@dataclass(frozen=True)
class ModelSupport:
    """One model on one provider.

    Attributes:
        nodes: how many nodes there are.
        taken: how many the provider takes.
        partitions: in how many groups it runs them.
        left: the others.
    """

    nodes: int
    taken: int
    partitions: int
    left: tuple[Left, ...]


@dataclass(frozen=True)
class Support:
    """One provider.

    Attributes:
        provider: its name.
        asked: whether it has rules; without, it took whatever was tried.
        model: what it takes of the model.
        before: what it takes of the one before, or None.
    """

    provider: str
    asked: bool
    model: ModelSupport
    before: ModelSupport | None


@dataclass(frozen=True)
class SupportReport(JsonReport):
    """What `support_of` found; also the schema of the JSON report of ``support``."""

    tool: str
    model: str
    before: str | None
    providers: tuple[Support, ...]
    notes: tuple[str, ...]


def support_of(
    model: ModelLike,
    before: ModelLike | None,
    input_shapes: Mapping[str, tuple[int, ...]],
    dims: Mapping[str, int],
    outputs: Sequence[Output] = (),
) -> SupportReport:
    """Judge a model, and the one that it was made from, by every provider's rules.

    Args:
        model: the model.
        before: the original, or None.
        input_shapes: input -> sizes to fix for the question.
        dims: symbolic dimension -> size to fix for the question.
        outputs: what the caller writes of the result, checked before the work.

    Raises:
        InputError: a model cannot be read, the sizes do not fit it, or a file cannot or must not
            be written.
    """
    notes: dict[str, None] = {}
    sources = [load(one) for one in (model, before) if one is not None]
    check_outputs(outputs, [file for source in sources for file in source.files])
    symbols = {a for one in sources for spec in input_specs(one.model) for a in spec.shape or ()}
    for name, size in dims.items():
        if name not in symbols:
            known = ", ".join(sorted(repr(a) for a in symbols if isinstance(a, str)))
            raise InputError(
                f"{named('dims', f'{name}={size}')}: no input has a dimension {name!r}; "
                f"there {'are ' + known if known else 'are none'}"
            )
    graphs = [_graph(one, input_shapes, dims, notes) for one in sources]
    graph, old = graphs[0], None if before is None else graphs[1]
    found = []
    for rules in all_rules():
        try:
            rules.operators()
        except (FileNotFoundError, ModuleNotFoundError):
            notes[f"{rules.name}: not judged, this onnxruntime brings no list of its operators"] = (
                None
            )
            continue
        found.append(
            Support(
                rules.name,
                rules.asked,
                _judge(rules, graph),
                None if old is None else _judge(rules, old),
            )
        )
    return SupportReport(
        tool=tool_name(),
        model=sources[0].name,
        before=None if before is None else sources[1].name,
        providers=tuple(found),
        notes=tuple(notes),
    )


def _graph(
    loaded: LoadedModel,
    input_shapes: Mapping[str, tuple[int, ...]],
    dims: Mapping[str, int],
    notes: dict[str, None],
) -> Graph:
    model, path = loaded.model, loaded.name
    specs = input_specs(model)
    if input_shapes or dims:
        symbols = {axis for spec in specs for axis in spec.shape or () if isinstance(axis, str)}
        names = {spec.name for spec in specs}
        missing = [name for name in input_shapes if name not in names]
        if missing:
            raise InputError(f"{named('input_shapes', missing[0])}: {path} has no such input")
        # The model after may have fixed what is free in the one before.
        wanted = {name: size for name, size in dims.items() if name in symbols}
        shapes = concrete_shapes(specs, input_shapes, wanted)
        notes.update(dict.fromkeys(shapes.notes))
        fix_shapes(model, shapes.shapes)
    else:
        infer_shapes(model)
    if model.functions:
        notes[f"{path}: nodes inside functions are not judged"] = None
    if any(True for node in model.graph for _ in _subgraphs(node)):
        notes[f"{path}: nodes inside subgraphs are not judged"] = None
    return Graph(model)


def _subgraphs(node: ir.Node) -> list[str]:
    kinds = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    return [name for name, item in node.attributes.items() if item.type in kinds]


def _judge(rules: Rules, graph: Graph) -> ModelSupport:
    left, taken = [], set()
    for node in graph.nodes:
        why = rules.refusal(graph, node)
        if why is None:
            taken.add(node)
        else:
            left.append(Left(node_name(node), node.op_type, why))
    groups = partitions(graph.nodes, taken)
    return ModelSupport(len(graph.nodes), len(taken), len(groups), tuple(left))
