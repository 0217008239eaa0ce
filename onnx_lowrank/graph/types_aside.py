"""Types that onnx_ir cannot read (maps, opaque types), kept aside while a model is in its hands.

scikit-learn's classifiers end in ZipMap, whose output is a sequence of maps.  Nothing here has to
look into such a value: its type is taken out before onnx_ir reads the model, waits at the value,
and is put back where the model is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import onnx
import onnx_ir as ir

__all__ = ["keep", "put_back", "unread", "without"]

_META = "onnx_lowrank.type"


@contextmanager
def without(graphs: Iterable[onnx.GraphProto]) -> Iterator[dict[str, onnx.TypeProto]]:
    """The graphs without the types that onnx_ir cannot read, as long as the context lasts.

    Args:
        graphs: all graphs of a model.

    Yields:
        Name of a value -> the type that was taken out.
    """
    taken: list[tuple[onnx.ValueInfoProto, onnx.TypeProto]] = []
    for graph in graphs:
        for value in (*graph.input, *graph.output, *graph.value_info):
            if _unknown(value.type):
                kind = onnx.TypeProto()
                kind.CopyFrom(value.type)
                taken.append((value, kind))
    for value, _ in taken:
        value.ClearField("type")
    try:
        yield {value.name: kind for value, kind in taken}
    finally:
        for value, kind in taken:
            value.type.CopyFrom(kind)


def unread(value: ir.Value) -> bool:
    """Whether a value has a type that onnx_ir cannot read."""
    return _META in value.meta


def keep(values: Iterable[ir.Value], types: dict[str, onnx.TypeProto]) -> None:
    """Let the types wait at their values.

    Args:
        values: the model's values.
        types: from `without`.
    """
    for value in values:
        if value.name in types:
            value.meta[_META] = types[value.name]


def put_back(values: Iterable[ir.Value], graphs: Iterable[onnx.GraphProto]) -> None:
    """Give the values of a protobuf the types that wait at those of the model.

    Args:
        values: the model's values.
        graphs: all graphs of the protobuf; they are changed.
    """
    types = {value.name: value.meta[_META] for value in values if _META in value.meta}
    if not types:
        return
    for graph in graphs:
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.name in types and not value.HasField("type"):
                value.type.CopyFrom(types[value.name])


def _unknown(kind: onnx.TypeProto) -> bool:
    match kind.WhichOneof("value"):
        case "map_type" | "opaque_type":
            return True
        case "sequence_type":
            return _unknown(kind.sequence_type.elem_type)
        case "optional_type":
            return _unknown(kind.optional_type.elem_type)
    return False
