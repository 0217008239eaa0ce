"""Whiten: train factors in coordinates in which their inputs are white.

In place of a factor ``A[m, k]`` that is read as ``x·A`` the graph gets ``D^-½·Ã`` with Ã trained
(`onnx_lowrank.numerics.whitening`): the gradient by Ã then comes out of the graph like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_lowrank.calibrate import Feed, Runner, kept_rows, spread_mask
from onnx_lowrank.derivatives.base import attribute
from onnx_lowrank.numerics.moments import Accumulator, Moments
from onnx_lowrank.numerics.whitening import Whitening

__all__ = ["Whitened", "whiten"]

Array = npt.NDArray[Any]

# Rows for each element of an input, after which its moments are known well enough.
_ENOUGH = 10
# Above this many elements of D the products with it would cost more than the descent saves.
_LARGEST = 4096**2
_GIVEN = "/given"


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
            name: self._product(name, array.astype(np.float32), back=False)
            for name, array in arrays.items()
        }

    def back(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Trained arrays as the model stores them: ``A = D^-½·Ã``."""
        return {name: self._product(name, array, back=True) for name, array in arrays.items()}

    def _product(self, name: str, array: Array, *, back: bool) -> Array:
        if name not in self.by:
            return array
        whitening, transposed = self.by[name]
        square = whitening.inverse if back else whitening.root
        return array @ square if transposed else square @ array


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
    feeds: Iterable[Feed],
    mask: str | None,
    open_model: Callable[[ir.Model], Runner],
) -> Whitened:
    """White coordinates for what MatMul and Gemm multiply with.

    Other trained inputs, and matrices that several nodes read, stay as they are.

    Args:
        model: its inputs include what is trained; it is not changed.
        arrays: what is trained, name -> start, in float32.
        feeds: samples of the other inputs, in float32; no more are read than moments ask for.
        mask: input whose zeros mark rows that do not count, where its shape fits.
        open_model: makes a runner of a model that gives its outputs by name.
    """
    copy = model.clone()
    uses = _uses(copy, arrays)
    moments = _moments(model, arrays, uses, feeds, mask, open_model)
    found: dict[str, tuple[Whitening, bool]] = {}
    known: dict[str, Whitening | None] = {}
    for use in uses:
        name, rows = use.matrix.name or "", use.rows.name or ""
        if rows not in known:
            known[rows] = Whitening.of(moments[rows]) if rows in moments else None
        whitening = known[rows]
        if whitening is not None:
            _put(copy, use, whitening)
            found[name] = (whitening, use.transposed)
    return Whitened(copy, found)


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
        use = _Use(rows, value, gemm and bool(attribute(node, "transB", 0)))
        if use.size**2 <= _LARGEST:
            uses.append(use)
    return uses


def _moments(
    model: ir.Model,
    arrays: Mapping[str, Array],
    uses: Sequence[_Use],
    feeds: Iterable[Feed],
    mask: str | None,
    open_model: Callable[[ir.Model], Runner],
) -> dict[str, Moments]:
    """Moments of the rows that are multiplied, by the name of their value."""
    sizes = {use.rows.name or "": use.size for use in uses}
    if not sizes:
        return {}
    run = open_model(_giving(model, sizes))
    adding = {name: Accumulator(size) for name, size in sizes.items()}
    count = dict.fromkeys(sizes, 0)
    for feed in feeds:
        if all(count[name] >= _ENOUGH * size for name, size in sizes.items()):
            break
        keep = kept_rows(feed, mask)
        for given, array in run({**feed, **arrays}).items():
            name = given.removesuffix(_GIVEN)
            rows = array.reshape(-1, sizes[name])
            spread = None if keep is None else spread_mask(keep, array.shape[:-1])
            if spread is not None:
                rows = rows[spread.reshape(-1)]
            if np.isfinite(rows).all():
                adding[name].add(rows)
                count[name] += len(rows)
    found = {name: accumulator.moments() for name, accumulator in adding.items()}
    return {name: moments for name, moments in found.items() if moments is not None}


def _giving(model: ir.Model, names: Mapping[str, int]) -> ir.Model:
    """The model with values, which may be its inputs, as its only outputs, by other names."""
    copy = model.clone()
    known = {value.name: value for value in copy.graph.inputs}
    known |= {output.name: output for node in copy.graph for output in node.outputs}
    del copy.graph.outputs[:]
    for name in names:
        node = ir.Node("", "Identity", [known[name]])
        output = node.outputs[0]
        output.name, output.dtype = f"{name}{_GIVEN}", ir.DataType.FLOAT
        copy.graph.append(node)
        copy.graph.outputs.append(output)
    return copy


def _put(model: ir.Model, use: _Use, whitening: Whitening) -> None:
    """Let the graph make the matrix of its white coordinates, which take its name."""
    name = f"{use.matrix.name}/inverse"
    inverse = ir.Value(
        name=name,
        type=ir.TensorType(ir.DataType.FLOAT),
        shape=ir.Shape(whitening.inverse.shape),
        const_value=ir.Tensor(whitening.inverse, name=name),
    )
    model.graph.initializers[name] = inverse
    operands = [use.matrix, inverse] if use.transposed else [inverse, use.matrix]
    node = ir.Node("", "MatMul", operands, name=f"{use.matrix.name}/plain")
    output = node.outputs[0]
    output.name, output.dtype, output.shape = node.name, ir.DataType.FLOAT, use.matrix.shape
    reader = next(iter(use.matrix.uses()))
    for other in use.matrix.uses():
        if other.node is not node:
            reader = other
    reader.node.replace_input_with(reader.idx, output)
    model.graph.insert_before(next(iter(model.graph)), node)
