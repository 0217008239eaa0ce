"""Models in ONNX Runtime's own format (``.ort``): they run, and nothing of them can be read.

What ``python -m onnxruntime.tools.convert_onnx_models_to_ort`` writes has the same inputs and
outputs as the model it was made from, so that the two can be compared and timed.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import onnx_ir as ir
import onnxruntime as ort

from onnx_lowrank.errors import InputError
from onnx_lowrank.files import is_file
from onnx_lowrank.graph.load import LoadedModel, ModelLike, load
from onnx_lowrank.runtime.log import OrtLog
from onnx_lowrank.runtime.rehearsal import rehearse
from onnx_lowrank.runtime.session import open_session

__all__ = ["load_to_run"]

# The mark of the format stands at the fifth byte, as flatbuffers have it.
_MARK, _SUFFIX = b"ORTM", ".ort"
_TENSOR = re.compile(r"tensor\((\w+)\)")
# A model has to have one; nothing reads it.
_IR_VERSION = 10
# ONNX Runtime's names of types that ONNX calls otherwise.
_OTHERWISE = {"float": "FLOAT", "double": "DOUBLE"}


def load_to_run(model: ModelLike, log: OrtLog) -> LoadedModel:
    """A model that is only run: as `load` gives it, or one in ONNX Runtime's format.

    Args:
        model: the model.
        log: collects ONNX Runtime's messages.

    Raises:
        InputError: as `load`; or ONNX Runtime does not open its own format.
    """
    if isinstance(model, str | os.PathLike) and _is_ort_format(Path(model)):
        return _described(Path(model), log)
    return load(model)


def _is_ort_format(path: Path) -> bool:
    if not is_file(path):
        return False
    try:
        with path.open("rb") as file:
            return file.read(8)[4:] == _MARK
    except OSError:
        return False


def _described(path: Path, log: OrtLog) -> LoadedModel:
    """A model of inputs and outputs alone, as a session tells them."""
    if path.suffix != _SUFFIX:
        raise InputError(
            f"{path}: is in ONNX Runtime's own format, which it reads from files that end in "
            f"{_SUFFIX}; expected that ending"
        )
    rehearse(path, what=str(path), threads=1)
    session = open_session(path, threads=1, log=log)
    inputs, outputs = (
        [_value(path, entry) for entry in entries]
        for entries in (session.get_inputs(), session.get_outputs())
    )
    # Nothing reads the node; outputs need one to come from.
    node = ir.Node("com.microsoft", "OrtFormat", inputs, outputs=outputs, name=path.name)
    graph = ir.Graph(inputs, outputs, nodes=[node], name=path.stem, opset_imports={})
    model = ir.Model(graph, ir_version=_IR_VERSION)
    return LoadedModel(model, path, str(path), path.stat().st_size, (), runs_only=True)


def _value(path: Path, entry: ort.NodeArg) -> ir.Value:
    found = _TENSOR.fullmatch(entry.type)
    if found is None:
        raise InputError(f"{path}: {entry.name!r}: expected tensors, got {entry.type}")
    kind = ir.DataType[_OTHERWISE.get(found.group(1), found.group(1).upper())]
    shape = None if entry.shape is None else ir.Shape(entry.shape)
    return ir.Value(name=entry.name, type=ir.TensorType(kind), shape=shape)
