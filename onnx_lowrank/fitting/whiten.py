"""Whiten: train factors in coordinates in which their inputs are white.

In place of a factor ``A[m, k]`` that is read as ``x·A`` the graph gets
``D^-½·Ã = Ã + S·(Qᵀ·Ã)`` with Ã trained (`onnx_lowrank.numerics.whitening`): the graph gives its
gradient as that of any other input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnx_lowrank.data.mask import kept_rows, spread_mask
from onnx_lowrank.fitting.batches import wide
from onnx_lowrank.graph.walk import attribute
from onnx_lowrank.numerics.arrays import Array, Feed
from onnx_lowrank.numerics.moments import Accumulator, Moments, passes
from onnx_lowrank.numerics.whitening import Whitening
from onnx_lowrank.runtime.memory import Memory
from onnx_lowrank.runtime.taps import OpenModel, tapped

__all__ = ["Whitened", "whiten"]


# Rows for each element of an input, after which its moments are known well enough.
_ENOUGH = 10


@dataclass(frozen=True, eq=False)
class Whitened:
    """A model whose trained inputs are in white coordinates.

    Attributes:
        model: the model.
        by: for each trained input that is in such coordinates, the coordinates, and whether its
            elements are stored transposed, [k, m].
    """

    model: ir.Model
    by: Mapping[str, tuple[Whitening, bool]]

    def into(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Trained arrays in these coordinates, in float32: ``Ã = D^½·A``."""
        return {
            name: self._product(name, array.astype(np.float32), 0.5)
            for name, array in arrays.items()
        }

    def back(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Trained arrays as the model stores them: ``A = D^-½·Ã``."""
        return {name: self._product(name, array, -0.5) for name, array in arrays.items()}

    def _product(self, name: str, array: Array, power: float) -> Array:
        if name not in self.by:
            return array
        whitening, transposed = self.by[name]
        if transposed:
            return whitening.applied(array.T, power).T
        return whitening.applied(array, power)


@dataclass(frozen=True, eq=False)
class _Use:
    """Where a trained matrix is read."""

    rows: ir.Value
    matrix: ir.Value
    transposed: bool

    @property
    def size(self) -> int:
        """The number m of elements of a row."""
        shape = self.matrix.shape
        assert shape is not None
        size = shape[1 if self.transposed else 0]
        assert isinstance(size, int)
        return size


def whiten(
    model: ir.Model,
    arrays: Mapping[str, Array],
    feeds: Sequence[Feed],
    mask: str | None,
    open_model: OpenModel,
    memory: Memory | None = None,
) -> Whitened:
    """White coordinates for what MatMul and Gemm multiply with.

    Other trained inputs, and matrices that several nodes read, stay as they are.

    Args:
        model: its inputs include what is trained; it is not changed.
        arrays: what is trained, name -> start, in float32.
        feeds: samples of the other inputs; no more are read than moments ask for.
        mask: input whose zeros mark rows that do not count, where its shape fits.
        open_model: makes a runner of a model that gives its outputs by name.
        memory: what may be held; default: without a limit.
    """
    copy = model.clone()
    room = None if memory is None else memory.planned()
    uses = _uses(copy, arrays)
    known: dict[str, Whitening | None] = {}
    for sizes in passes({use.rows.name or "": use.size for use in uses}, room):
        moments = _moments(model, arrays, sizes, feeds, mask, open_model)
        known |= {name: Whitening.of(found) for name, found in moments.items()}
    by: dict[str, tuple[Whitening, bool]] = {}
    for use in uses:
        whitening = known.get(use.rows.name or "")
        if whitening is not None:
            _put(copy, use, whitening)
            by[use.matrix.name or ""] = (whitening, use.transposed)
    return Whitened(copy, by)


def _uses(model: ir.Model, arrays: Mapping[str, Array]) -> list[_Use]:
    uses = []
    for value in model.graph.inputs:
        readers = list(value.uses())
        if value.name not in arrays or len(readers) != 1 or len(value.shape or ()) != 2:
            continue
        node, index = readers[0].node, readers[0].idx
        if node.graph is not model.graph or index != 1 or node.op_type not in ("MatMul", "Gemm"):
            continue
        gemm = node.op_type == "Gemm"
        rows = node.inputs[0]
        if rows is None or (gemm and attribute(node, "transA", 0)):
            continue
        uses.append(_Use(rows, value, gemm and bool(attribute(node, "transB", 0))))
    return uses


def _moments(
    model: ir.Model,
    arrays: Mapping[str, Array],
    sizes: Mapping[str, int],
    feeds: Sequence[Feed],
    mask: str | None,
    open_model: OpenModel,
) -> dict[str, Moments]:
    """Moments of the rows of values, by their name."""
    run = tapped(model, sizes, open_model)
    adding = {name: Accumulator(size) for name, size in sizes.items()}
    count = dict.fromkeys(sizes, 0)
    for feed in feeds:
        if all(count[name] >= _ENOUGH * size for name, size in sizes.items()):
            break
        keep = kept_rows(feed, mask)
        found = run({**wide(feed), **arrays})
        for name, size in sizes.items():
            array = found[name]
            rows = array.reshape(-1, size)
            spread = None if keep is None else spread_mask(keep, array.shape[:-1])
            if spread is not None:
                rows = rows[spread.reshape(-1)]
            if np.isfinite(rows).all():
                adding[name].add(rows)
                count[name] += len(rows)
    known = {name: accumulator.moments() for name, accumulator in adding.items()}
    return {name: moments for name, moments in known.items() if moments is not None}


def _put(model: ir.Model, use: _Use, whitening: Whitening) -> None:
    """Let the graph make the matrix of its white coordinates, which take its name."""
    matrix, reader = use.matrix, next(iter(use.matrix.uses()))
    basis = _constant(model, f"{matrix.name}/basis", whitening.basis, use.transposed)
    step = _constant(model, f"{matrix.name}/step", whitening.step(-0.5), not use.transposed)
    if use.transposed:  # Aᵀ = Ãᵀ + (Ãᵀ·Q)·Sᵀ
        inner = _node("MatMul", matrix, basis)
        outer = _node("MatMul", inner.outputs[0], step)
    else:  # A = Ã + S·(Qᵀ·Ã)
        inner = _node("MatMul", basis, matrix)
        outer = _node("MatMul", step, inner.outputs[0])
    plain = _node("Add", matrix, outer.outputs[0])
    rank = whitening.basis.shape[1]
    assert matrix.shape is not None
    one, other = matrix.shape
    inner.outputs[0].shape = ir.Shape([one, rank] if use.transposed else [rank, other])
    outer.outputs[0].shape = plain.outputs[0].shape = ir.Shape([one, other])
    reader.node.replace_input_with(reader.idx, plain.outputs[0])
    model.graph.insert_before(next(iter(model.graph)), [inner, outer, plain])


def _node(op_type: str, *inputs: ir.Value) -> ir.Node:
    node = ir.Node("", op_type, inputs)
    node.outputs[0].dtype = ir.DataType.FLOAT
    return node


def _constant(model: ir.Model, name: str, array: Array, straight: bool) -> ir.Value:
    """An initializer with an array, or with its transpose."""
    tensor = ir.Tensor(np.ascontiguousarray(array if straight else array.T), name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape)
    value.const_value = tensor
    model.graph.register_initializer(value)
    return value
