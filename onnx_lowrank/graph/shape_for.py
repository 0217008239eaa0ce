"""Shape for a target: the graph in the form that one kind of target runs best.

Every step changes only how a linear map with a constant weight stands in the graph, never what it
computes:

* the inputs get fixed sizes, and what was computed from sizes becomes constants;
* ``alpha``, ``beta``, ``transA`` and transposed weights go into the constants;
* ``X[…, m] @ W`` becomes ``Reshape, X[rows, m] @ W, Reshape``, once around a pair;
* a bias behind a product goes into a Gemm, a Gemm without one becomes a MatMul;
* ``W @ X`` becomes a 1×1 convolution, where a constant has to stand on the right.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_lowrank.graph.constant import FLOATS, Constant
from onnx_lowrank.graph.constants import Constants
from onnx_lowrank.graph.edits import node_before
from onnx_lowrank.graph.elements import constant_value
from onnx_lowrank.graph.face import lower_initializers
from onnx_lowrank.graph.fixed import INTEGER_NODES, fix_shapes, new_constants, opset_of
from onnx_lowrank.graph.names import Names
from onnx_lowrank.graph.walk import attribute, float_attribute, node_name, only_sum, static_shape
from onnx_lowrank.graph.wishes import WISHES, Wishes
from onnx_lowrank.phrases import by_reason

__all__ = ["SHAPED", "shape_for"]

SHAPED = "shaped for"
"""How its notes begin."""


# Before, a Gemm and an Add say in an attribute whether and how they broadcast.
_OLDEST = 7
# So much of a scaled constant may be rounding, as a share of its norm: float16 has 3 digits.
_SLACK = 1e-2
# ONNX Runtime has no kernels for others on the CPU, which computes what the target leaves.
_CONV_TYPES = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16})
_GEMM_TYPES = _CONV_TYPES | {ir.DataType.DOUBLE}


def shape_for(model: ir.Model, target: str, sizes: Mapping[str, Sequence[int]]) -> tuple[str, ...]:
    """Shape a model for a target, in place.

    Args:
        model: the model, after its layers were rewritten.
        target: a key of `WISHES`.
        sizes: input -> sizes, used where the target wants them fixed.

    Returns:
        Notes: what was done.
    """
    wishes = WISHES[target]
    notes = []
    if wishes.fixed:
        fix_shapes(model, sizes)
        shown = ", ".join(f"{name} {list(shape)}" for name, shape in sizes.items())
        notes.append(f"{SHAPED} {target}: inputs fixed to {shown}")
    opset, oldest = opset_of(model), _OLDEST if new_constants(model) else INTEGER_NODES
    if opset < oldest:
        if wishes.plain:
            notes.append(
                f"{SHAPED} {target}: products stay as they are: the model is of opset {opset}, "
                f"expected {oldest} or newer"
            )
        return tuple(notes)
    shaper = _Shaper(model, wishes)
    shaper.run()
    lower_initializers(model)
    done = ", ".join(f"{what} ({count})" for what, count in shaper.done.items())
    if done:
        notes.append(f"{SHAPED} {target}: {done}")
    notes.extend(by_reason(shaper.left, f"{SHAPED} {target}, left as it stands"))
    return tuple(notes)


class _Shaper:
    """One pass over the main graph."""

    def __init__(self, model: ir.Model, wishes: Wishes) -> None:
        self.graph, self.wishes = model.graph, wishes
        self.constants, self.names = Constants(model), Names(model)
        self.done: Counter[str] = Counter()
        self.left: dict[str, str] = {}
        # A value -> what it is a Reshape of: a matrix [rows, n], or images [b, m, columns, 1].
        self._matrix: dict[ir.Value, ir.Value] = {}
        self._image: dict[ir.Value, ir.Value] = {}
        self._stored: dict[Hashable, ir.Value] = {}
        self._unread: list[ir.Value] = []

    def run(self) -> None:
        for node in list(self.graph):
            if node.graph is None or node.domain not in ("", "ai.onnx"):
                continue
            if node.op_type in ("MatMul", "Gemm"):
                self._product(node)
        for value in (*self._matrix, *self._image):
            producer = value.producer()
            if producer is not None and not value.uses() and not value.is_graph_output():
                self._unread += [v for v in producer.inputs[1:] if v is not None]
                self.graph.remove(producer, safe=True)
        self._drop_unread()

    def _product(self, node: ir.Node) -> None:
        right = self.constants.resolve(node.inputs[1])
        left = self.constants.resolve(node.inputs[0])
        if isinstance(right, Constant) and not isinstance(left, Constant):
            if right.dtype not in FLOATS:
                return
            if self.wishes.plain and not self._plain(node, right):
                return
            if self.wishes.matrices or self.wishes.bias:
                self._matrices(node, right)
        elif isinstance(left, Constant) and self.wishes.right and node.op_type == "MatMul":
            self._convolution(node, left)

    # Gemm without scales and transposes

    def _plain(self, node: ir.Node, weight: Constant) -> bool:
        """Weights that are initializers, and for a Gemm no scales and no transA; whether so."""
        if node.op_type == "MatMul":
            if not self._initializer(node.inputs[1]):
                self._set_constant(node, 1, weight, weight.read())
                self.done["weights stored as they are read"] += 1
            return True
        alpha, beta = float_attribute(node, "alpha", 1.0), float_attribute(node, "beta", 1.0)
        third = _third(node)
        bias = self.constants.resolve(third)
        if beta != 1.0 and third is not None and not isinstance(bias, Constant):
            return self._leave(node, "its scaled C is no constant")
        matrix = _scaled(weight.read(), alpha)
        vector = _scaled(bias.read(), beta) if isinstance(bias, Constant) else None
        if matrix is None or (vector is None and isinstance(bias, Constant)):
            return self._leave(node, "a scaled constant is beyond its element type")
        before = (alpha, beta, attribute(node, "transA", 0))
        if alpha != 1.0 or not self._initializer(node.inputs[1]):
            self._set_constant(node, 1, weight, matrix, alpha)
        if isinstance(bias, Constant) and vector is not None:
            n = static_shape(node.outputs[0].shape[-1:]) if node.outputs[0].shape else None
            # One row, or one element, for every row of the result.
            row = vector.size in (1, vector.shape[-1] if vector.shape else 1)
            wide = n is not None and vector.shape != n and row and vector.size in (1, n[0])
            if wide and n is not None:
                vector = np.broadcast_to(vector.reshape(-1), n)
            if wide or beta != 1.0:
                self._set_constant(node, 2, bias, np.ascontiguousarray(vector), beta)
        if attribute(node, "transA", 0):
            x = node.inputs[0]
            assert x is not None
            shape = None if x.shape is None else list(reversed(list(x.shape)))
            perm = ir.AttrInt64s("perm", [1, 0])
            node.replace_input_with(0, self._new(node, "Transpose", [x], shape, [perm]))
        for name in ("alpha", "beta", "transA"):
            node.attributes.pop(name, None)
        if before != (1.0, 1.0, 0):
            self.done["Gemm with scales and transA folded"] += 1
        return True

    def _leave(self, node: ir.Node, why: str) -> bool:
        self.left[node_name(node)] = why
        return False

    # Two axes, and a bias or none

    def _matrices(self, node: ir.Node, weight: Constant) -> None:
        x, output = node.inputs[0], node.outputs[0]
        assert x is not None
        if len(weight.shape) != 2 or x.shape is None:
            return
        if node.op_type == "Gemm":
            if self.wishes.bias and _third(node) is None:
                self._to_matmul(node)
            if x in self._matrix:
                node.replace_input_with(0, self._matrix[x])
            return
        add = self._bias(node) if self.wishes.bias and weight.dtype in _GEMM_TYPES else None
        deep = len(x.shape) > 2 and self.wishes.matrices
        if len(x.shape) < 2 or (len(x.shape) > 2 and not deep):
            return
        end = output if add is None else add.outputs[0]
        back = _back(end) if deep else None
        if deep and back is None:
            self._leave(node, "more than one of its sizes is not known, or one is 0")
            return
        if deep:
            flat = self._matrix.get(x)
            if flat is None:
                flat = self._reshape(node, x, [-1, weight.shape[0]])
                self.done["products made 2-D"] += 1
            else:
                self.done["products kept 2-D behind another"] += 1
            node.replace_input_with(0, flat)
        if add is not None:
            vector = next(v for v in add.inputs if v is not output)
            assert vector is not None
            node.op_type = "Gemm"
            node.resize_inputs(3)
            node.replace_input_with(2, vector)
            self._move_output(add, node)
            self.done["biases merged into Gemm"] += 1
        if deep and back is not None:
            self._matrix[self._unflatten(node, back)] = node.outputs[0]

    def _to_matmul(self, node: ir.Node) -> None:
        """``Gemm(X, W)`` -> ``X @ W``."""
        if float_attribute(node, "alpha", 1.0) != 1.0 or attribute(node, "transA", 0):
            return
        if attribute(node, "transB", 0):
            weight = self.constants.resolve(node.inputs[1])
            assert isinstance(weight, Constant)
            turned = weight.transpose(1, 0)
            self._set_constant(node, 1, turned, turned.read())
        node.op_type = "MatMul"
        node.attributes.clear()
        node.resize_inputs(2)
        self.done["Gemm without bias made MatMul"] += 1

    def _bias(self, node: ir.Node) -> ir.Node | None:
        """The Add of a constant vector that alone reads a product's output."""
        output = node.outputs[0]
        behind = only_sum(output)
        if behind is None or behind[0].graph is not self.graph or output.shape is None:
            return None
        add, other = behind
        if not self._initializer(other) or other.shape is None:
            return None
        n = _dim(output.shape[-1])
        return add if static_shape(other.shape) == (n,) else None

    def _move_output(self, source: ir.Node, target: ir.Node) -> None:
        """Let one node make the output of the one behind it, which goes."""
        old, new = source.outputs[0], target.outputs[0]
        name, shape = old.name, old.shape
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        self.graph.remove(source, safe=True)
        new.name, new.shape = name, shape

    def _unflatten(self, node: ir.Node, back: Sequence[int]) -> ir.Value:
        """Put a Reshape behind a node whose output is a matrix now; its output has the old name."""
        output = node.outputs[0]
        assert output.shape is not None
        full, name = ir.Shape(list(output.shape)), output.name
        inner = [full[axis] for axis in range(len(full) - 1)]
        rows = math.prod(d for d in inner if isinstance(d, int))
        known = all(isinstance(d, int) for d in inner)
        users = list(output.uses())
        output.name = self.names.new(f"{name}.2d")
        output.shape = ir.Shape([rows if known else None, full[-1]])
        shape = self._store(np.array(back, np.int64), f"{node_name(node)}.shape")
        reshape = ir.Node("", "Reshape", [output, shape], name=self.names.new(f"{name}.reshape"))
        result = reshape.outputs[0]
        result.name, result.type, result.shape = name, output.type, full
        self.graph.insert_after(node, reshape)
        for use in users:
            use.node.replace_input_with(use.idx, result)
        for index, value in enumerate(self.graph.outputs):
            if value is output:
                self.graph.outputs[index] = result
        return result

    # The constant on the left

    def _convolution(self, node: ir.Node, weight: Constant) -> None:
        """``W[n, m] @ X[…, m, c]`` -> ``Conv1×1`` over ``X[b, m, c, 1]``."""
        x, output = node.inputs[1], node.outputs[0]
        assert x is not None
        shape = static_shape(x.shape)
        if len(weight.shape) != 2 or len(shape or ()) == 1:
            return
        if shape is None or output.shape is None or 0 in shape:
            self._leave(node, "its constant stands on the left, and sizes are not known or 0")
            return
        if weight.dtype not in _CONV_TYPES:
            kind = weight.dtype.name.lower()
            self._leave(node, f"its constant stands on the left, and is {kind}: no Conv takes it")
            return
        *lead, m, columns = shape
        n = weight.shape[0]
        source = self._image.get(x)
        if source is None:
            source = self._reshape(node, x, [math.prod(lead), m, columns, 1])
        kernel = weight.reshape(n, m, 1, 1)
        old = node.inputs[0]
        assert old is not None
        node.op_type = "Conv"
        node.replace_input_with(0, source)
        node.replace_input_with(1, self._constant(kernel, kernel.read(), f"{old.name}.kernel"))
        self._unread.append(old)
        self._image[self._unflatten(node, [*lead, n, columns])] = node.outputs[0]
        node.outputs[0].shape = ir.Shape([math.prod(lead), n, columns, 1])
        self.done["products with the constant on the left made 1×1 convolutions"] += 1

    # Small things

    def _initializer(self, value: ir.Value | None) -> bool:
        return value is not None and value.is_initializer() and not value.is_graph_input()

    def _set_constant(
        self,
        node: ir.Node,
        index: int,
        source: Constant,
        array: npt.NDArray[np.generic],
        scale: float = 1.0,
    ) -> None:
        """Let a node read what was made of a constant."""
        old = node.inputs[index]
        assert old is not None
        value = self._constant(source, array, f"{old.name}.shaped", scale)
        node.replace_input_with(index, value)
        self._unread.append(old)

    def _constant(
        self, source: Constant, array: npt.NDArray[np.generic], name: str, scale: float = 1.0
    ) -> ir.Value:
        """An array that was made of a constant, stored once for all nodes that read it so."""
        key = (source.root, source.layout.key, source.dtype, scale, array.shape)
        if key not in self._stored:
            self._stored[key] = self._store(np.ascontiguousarray(array), name)
        return self._stored[key]

    def _store(self, array: npt.NDArray[np.generic], name: str) -> ir.Value:
        value = constant_value(ir.tensor(array, name=self.names.new(name)))
        self.graph.register_initializer(value)
        return value

    def _reshape(self, node: ir.Node, x: ir.Value, shape: Sequence[int]) -> ir.Value:
        static = static_shape(x.shape)
        sizes: list[int | None] = [None if size < 0 else size for size in shape]
        if static is not None and None in sizes:
            known = math.prod(size for size in sizes if size is not None)
            sizes[sizes.index(None)] = math.prod(static) // max(known, 1)
        constant = self._store(np.array(shape, np.int64), f"{node_name(node)}.shape")
        return self._new(node, "Reshape", [x, constant], sizes)

    def _new(
        self,
        node: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value],
        shape: Sequence[object] | None,
        attributes: Sequence[ir.Attr] = (),
    ) -> ir.Value:
        """A node before another one; its output."""
        new = node_before(node, op_type, inputs, self.names.new, attributes=attributes, metadata={})
        output = new.outputs[0]
        output.type = inputs[0].type
        output.shape = None if shape is None else ir.Shape(list(shape))  # type: ignore[arg-type]
        return output

    def _drop_unread(self) -> None:
        """Remove constants that nothing reads any more, and the nodes that made them."""
        waiting = self._unread
        while waiting:
            value = waiting.pop()
            if value.uses() or value.is_graph_output() or value.is_graph_input():
                continue
            producer = value.producer()
            if producer is None:
                if value.is_initializer() and value.name is not None:
                    self.graph.initializers.pop(value.name, None)
            elif producer.graph is self.graph and not any(v.uses() for v in producer.outputs):
                waiting += [v for v in producer.inputs if v is not None]
                self.graph.remove(producer, safe=True)


def _third(node: ir.Node) -> ir.Value | None:
    """C of a Gemm, if it has one."""
    return node.inputs[2] if len(node.inputs) > 2 else None


def _scaled(array: npt.NDArray[np.generic], scale: float) -> npt.NDArray[np.generic] | None:
    """A constant times a scale, in its own type; None where its range or its digits end."""
    if scale == 1.0:
        return array
    exact = array.astype(np.float64) * scale
    with np.errstate(over="ignore"):
        found = exact.astype(array.dtype)
    if not np.isfinite(exact).all():
        return found
    # The smallest numbers of a type have few digits, and below them there is 0.
    lost = np.linalg.norm(found.astype(np.float64) - exact) > _SLACK * np.linalg.norm(exact)
    return found if np.isfinite(found).all() and not lost else None


def _dim(size: object) -> int:
    return size if isinstance(size, int) else -1


def _back(value: ir.Value) -> list[int] | None:
    """The shape for a Reshape back to a value's own; None where it is not determined."""
    if value.shape is None:
        return None
    sizes = [_dim(size) for size in value.shape]
    return sizes if sizes.count(-1) <= 1 and 0 not in sizes else None
