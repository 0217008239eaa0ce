"""Simplify: onnxsim before the factoring, checked, and undone with a reason where it fails.

onnxsim gets a copy in which every node is named by its number, so that the nodes that remain can be
identified, and in which inputs have no default value, so that onnxsim cannot treat the default as a
constant.  The result gets the inputs, outputs, names and annotations of the original back.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from onnx_lowrank.errors import InputError
from onnx_lowrank.errors import named as option
from onnx_lowrank.graph import merged
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.graph.face import FREE_INITIALIZERS, lift_constants, restore
from onnx_lowrank.graph.fixed import infer_shapes
from onnx_lowrank.graph.load import LoadedModel, load
from onnx_lowrank.graph.save import write
from onnx_lowrank.graph.sparse import SparseTensor
from onnx_lowrank.graph.validity import invalid
from onnx_lowrank.graph.walk import all_nodes, node_name, stored_bytes, tensors
from onnx_lowrank.phrases import size

__all__ = ["SIZE_LIMIT", "TIME_LIMIT", "WORKER", "Simplified", "simplify"]

SIZE_LIMIT = 1_000_000_000
"""Bytes of weights above which a model is not simplified: onnxsim holds it in memory."""

TIME_LIMIT = 600.0
"""Seconds that onnxsim may take."""

WORKER = Path(__file__).with_name("_onnxsim_worker.py")

# What onnxsim's process holds: for itself, and for each byte of weights, of which it has three
# copies.  Measured on models of 3 to 90 MB.
_TAKEN, _TAKEN_EACH = 160_000_000, 3.2

# Folding small constants may cost a little; more than this is growth.  In a small model it is a
# copy of a weight.
_SLACK_SHARE, _SLACK_BYTES, _SLACK_SMALL = 0.01, 1 << 16, 1 << 12

# These give a linear map another name, or make one of several.  ONNX Runtime fuses a MatMul with
# its bias by itself, and several maps of one activation share their first factor here.
_SKIPPED = ("fuse_matmul_add_bias_into_gemm", "fuse_matmul_add_bias_into_gemm_batched", "fuse_qkv")
# This one changes the weights of the convolution.
_FOLDS_NORMALIZATION = "fuse_bn_into_conv"

_NUMBER = re.compile(r"^node(\d+):")


@dataclass(frozen=True, eq=False)
class Simplified:
    """The result of simplifying a model.

    Attributes:
        model: simplified; None where the original is to be used.
        notes: why it is not, or what else the user should know.
        merged: node of the original -> node of the model that it was merged into, for those that
            were asked for and are not in the model any more.
    """

    model: ir.Model | None
    notes: tuple[str, ...] = ()
    merged: Mapping[ir.Node, ir.Node] = field(default_factory=dict)


class _UndoneError(Exception):
    """Why the model stays as it was."""


def simplify(
    source: LoadedModel,
    workspace: Path,
    compare: Callable[[Path], str | None],
    *,
    named: Collection[ir.Node] = (),
    constant_inputs: bool = False,
    memory: int | None = None,
) -> Simplified:
    """Simplify a model.

    Args:
        source: the model.
        workspace: a folder for intermediate files.
        compare: runs the simplified file against the original and answers with what is wrong
            with it, or None.
        named: nodes of the model that the user named: their weights stay as they are.
        constant_inputs: whether inputs that have a default value are constants.
        memory: bytes that onnxsim's process may hold; None without a limit.

    Returns:
        The result, which has the face of the original.
    """
    try:
        _check_memory(stored_bytes(source.model), memory)
        return _simplified(source, workspace, compare, named, constant_inputs)
    except _UndoneError as why:
        return Simplified(None, (f"not simplified: {why}",))


def _check_memory(stored: int, memory: int | None) -> None:
    """Do nothing with a model of so many bytes of weights where onnxsim would not fit."""
    taken = _TAKEN + _TAKEN_EACH * stored
    if memory is not None and taken > memory:
        raise _UndoneError(
            f"onnxsim takes about {size(taken)} for it, above the {size(memory)} of "
            f"{option('memory')}"
        )


def _simplified(
    source: LoadedModel,
    workspace: Path,
    compare: Callable[[Path], str | None],
    named: Collection[ir.Node],
    constant_inputs: bool,
) -> Simplified:
    original, weights = source.model, stored_bytes(source.model)
    if weights > SIZE_LIMIT:
        raise _UndoneError(
            f"{weights / 1e9:.1f} GB of weights is above the limit of {SIZE_LIMIT / 1e9:.0f} GB"
        )
    if any(isinstance(tensor, SparseTensor) for tensor in tensors(original)):
        raise _UndoneError("it has constants that are stored sparse, which onnxsim would lose")
    constants = Constants(original)
    muls = (node for node in original.graph if node.op_type == "Mul")
    if any(constants.resolve(node.outputs[0]) is not None for node in muls):
        raise _UndoneError("it has weights of integers, of which onnxsim would make floats")
    given = write(_numbered(original, constant_inputs), workspace, "unsimplified.onnx", "never")[-1]
    model = _run(given, workspace / "simplified.onnx", _skipped(named))
    given.unlink()
    origins = _origins(model, original)
    lifted = 0
    if original.ir_version >= FREE_INITIALIZERS:
        lifted = lift_constants(model)
        origins = {node: old for node, old in origins.items() if node.graph is not None}
    if not _same_interface(model, original):
        raise _UndoneError("onnxsim changed the model's inputs or outputs")
    restore(model, original, origins)
    _name(model, original, origins)
    grown = stored_bytes(model) - weights
    slack = max(min(_SLACK_BYTES, weights // 10), _SLACK_SMALL)
    if grown > _SLACK_SHARE * weights + slack:
        raise _UndoneError(f"onnxsim made it {grown} bytes larger")
    final = write(model, workspace, "simplified.onnx", "never")[-1]
    complaint = invalid(model)
    if complaint is not None and invalid(original) is None:
        raise _UndoneError(f"onnx.checker rejects what onnxsim made: {complaint}")
    wrong = compare(final)
    if wrong is not None:
        raise _UndoneError(wrong)
    found, lost = merged.resolve(named, model, original, origins)
    if lost is not None:
        raise _UndoneError(f"onnxsim changed {node_name(lost)!r}, which a glob names")
    return Simplified(model, _lifted(lifted), found)


def _lifted(count: int) -> tuple[str, ...]:
    if not count:
        return ()
    nodes = (
        "1 Constant node is an initializer"
        if count == 1
        else f"{count} Constant nodes are initializers"
    )
    return (f"{nodes} now, so that quantizers see the weights",)


def _numbered(original: ir.Model, constant_inputs: bool) -> ir.Model:
    """A copy whose nodes are named by their place, and whose inputs have no default values."""
    model = original.clone()
    for number, node in enumerate(all_nodes(model)):
        node.name = f"node{number}:{node.name or ''}"
    if not constant_inputs:
        for value in model.graph.inputs:
            if value.is_initializer() and value.name is not None:
                del model.graph.initializers[value.name]
                value.const_value = None
    if any(value.shape is None for value in model.graph.outputs):
        infer_shapes(model)  # onnxsim refuses an output of which nothing is known
    return model


def _skipped(named: Collection[ir.Node]) -> tuple[str, ...]:
    """The optimizers that may not run."""
    behind = (use.node for node in named for value in node.outputs for use in value.uses())
    if any(node.op_type == "BatchNormalization" for node in behind):
        return (*_SKIPPED, _FOLDS_NORMALIZATION)
    return _SKIPPED


def _run(given: Path, target: Path, skipped: tuple[str, ...]) -> ir.Model:
    try:
        done = subprocess.run(
            # -P: its folder, this package, must not stand before the standard library.
            [sys.executable, "-P", str(WORKER), str(given), str(target), *skipped],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=TIME_LIMIT,
        )
    except subprocess.TimeoutExpired as error:
        raise _UndoneError(f"onnxsim did not end within {TIME_LIMIT:g} s") from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        why = lines[-1].strip() if lines else f"exit code {done.returncode}"
        if done.returncode < 0:
            why = f"it crashed with signal {-done.returncode}"
        raise _UndoneError(f"onnxsim failed: {why[:200]}")
    try:
        return load(target).model
    except InputError as error:
        raise _UndoneError(f"onnxsim made an unusable model: {error}") from error


def _origins(model: ir.Model, original: ir.Model) -> dict[ir.Node, ir.Node]:
    """Nodes of the model -> those of the original that they stand for, by their numbers."""
    by_name = {
        f"node{number}:{node.name or ''}": node for number, node in enumerate(all_nodes(original))
    }
    found = ((node, by_name.get(node.name or "")) for node in all_nodes(model))
    return {node: old for node, old in found if old is not None and old.op_type == node.op_type}


def _same_interface(model: ir.Model, original: ir.Model) -> bool:
    inputs = {value.name for value in original.graph.inputs}
    outputs = [[value.name for value in graph.outputs] for graph in (model.graph, original.graph)]
    return (
        inputs.issuperset(value.name for value in model.graph.inputs)
        and len({tuple(names) for names in outputs}) == 1
    )


def _name(model: ir.Model, original: ir.Model, origins: Mapping[ir.Node, ir.Node]) -> None:
    """Give nodes the names that they had; new ones that of the node whose output they give."""
    for node, old in origins.items():
        node.name = old.name
        if not old.name and node_name(node) != node_name(old):
            node.name = node_name(old)  # onnxsim gave it another output
    kept = set(origins.values())
    gone = {v.name: old for old in all_nodes(original) if old not in kept for v in old.outputs}
    taken = {node.name for node in origins}
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node in origins:
            continue
        node.name = _NUMBER.sub("", node.name or "")
        before = next((gone[v.name] for v in node.outputs if v.name in gone), None)
        if before is not None:
            node.metadata_props.update(before.metadata_props)
            node.doc_string = node.doc_string or before.doc_string
            node.name = before.name or node.name
        wanted, count = node.name, 1
        while node.name and node.name in taken:
            count += 1
            node.name = f"{wanted}_{count}"
        taken.add(node.name)
