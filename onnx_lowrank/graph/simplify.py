"""Simplify: onnxsim before the factoring, guarded, and undone with a reason where it does harm."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx_ir as ir

from onnx_lowrank.errors import InputError
from onnx_lowrank.graph.load import LoadedModel, load
from onnx_lowrank.graph.save import write
from onnx_lowrank.graph.validity import invalid
from onnx_lowrank.graph.walk import all_nodes, stored_bytes

__all__ = ["SIZE_LIMIT", "WORKER", "simplify"]

SIZE_LIMIT = 1_000_000_000
"""Bytes of weights above which a model is not simplified: onnxsim holds it in memory."""

WORKER = Path(__file__).with_name("_onnxsim_worker.py")

# Folding small constants may cost a little; more than this is growth.
_SLACK_SHARE, _SLACK_BYTES = 0.01, 1 << 16


def simplify(
    source: LoadedModel, workspace: Path, compare: Callable[[Path], str | None]
) -> tuple[ir.Model, str | None]:
    """The simplified model, or the model as it was and the reason.

    Args:
        source: the model.
        workspace: a folder for intermediate files.
        compare: runs the simplified file against the original and answers with what is wrong
            with it, or None.

    Returns:
        A model, and None or the sentence that says why it is the unsimplified one.
    """
    size = stored_bytes(source.model)
    if size > SIZE_LIMIT:
        return source.model, (
            f"not simplified: {size / 1e9:.1f} GB of weights is above the limit of "
            f"{SIZE_LIMIT / 1e9:.0f} GB"
        )
    given = source.path
    if given is None or source.data_files:
        given = write(source.model, workspace, "unsimplified.onnx", "never")[-1]
    target = workspace / "simplified.onnx"
    done = subprocess.run(
        # -P: its folder, this package, must not stand before the standard library.
        [sys.executable, "-P", str(WORKER), str(given), str(target)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        why = lines[-1].strip() if lines else f"exit code {done.returncode}"
        if done.returncode < 0:
            why = f"it crashed with signal {-done.returncode}"
        return source.model, f"not simplified: onnxsim failed: {why[:200]}"
    try:
        simplified = load(target).model
    except InputError as error:
        return source.model, f"not simplified: onnxsim made an unusable model: {error}"
    grown = stored_bytes(simplified) - size
    if grown > _SLACK_SHARE * size + _SLACK_BYTES:
        return source.model, f"not simplified: onnxsim made it {grown} bytes larger"
    _restore(simplified, source.model)
    if _interface(simplified) != _interface(source.model):
        return source.model, "not simplified: onnxsim changed the model's inputs or outputs"
    final = write(simplified, workspace, "simplified.onnx", "never")[-1]
    complaint = invalid(simplified)
    if complaint is not None and invalid(source.model) is None:
        return source.model, f"not simplified: onnx.checker rejects what onnxsim made: {complaint}"
    wrong = compare(final)
    if wrong is not None:
        return source.model, f"not simplified: {wrong}"
    return simplified, None


def _interface(model: ir.Model) -> list[str | None]:
    inputs = [value.name for value in model.graph.inputs if not value.is_initializer()]
    return [*inputs, "->", *(value.name for value in model.graph.outputs)]


def _values(model: ir.Model) -> Iterator[ir.Value]:
    """The values of the main graph; those of subgraphs may have the same names."""
    yield from model.graph.inputs
    yield from model.graph.initializers.values()
    for node in model.graph:
        yield from node.outputs


def _restore(simplified: ir.Model, original: ir.Model) -> None:
    """Put back what onnxsim drops: metadata, documentation, and names of nodes."""
    for key in [key for key in simplified.metadata_props if key.startswith("onnxsim.")]:
        del simplified.metadata_props[key]
    old_graph, graph = original.graph, simplified.graph
    graph.metadata_props.update({**old_graph.metadata_props, **graph.metadata_props})
    values = {value.name: value for value in _values(original)}
    for value in _values(simplified):
        if value.name in values:
            same = values[value.name]
            value.metadata_props.update({**same.metadata_props, **value.metadata_props})
            value.doc_string = value.doc_string or same.doc_string
    before: dict[str | None, ir.Node] = {}
    for node in all_nodes(original):
        for value in node.outputs:
            before[value.name] = node
    taken = {node.name for node in all_nodes(simplified)}
    for node in all_nodes(simplified):
        old = next((before[v.name] for v in node.outputs if v.name in before), None)
        if old is None:
            continue
        # A fused node has the output of the last of the nodes that it replaces; the torch scope
        # of the linear map is that of the MatMul, the one before.
        sources = [old]
        if old.op_type == "Add" and node.op_type == "Gemm":
            producers = [v.producer() for v in old.inputs if v is not None]
            sources = [p for p in producers if p is not None and p.op_type == "MatMul"] or sources
        node.metadata_props.update({**sources[0].metadata_props, **node.metadata_props})
        node.doc_string = node.doc_string or sources[0].doc_string
        if sources[0].name and sources[0].name not in taken:
            taken.add(sources[0].name)
            node.name = sources[0].name
