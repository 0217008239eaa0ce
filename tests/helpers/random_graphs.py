"""Random small graphs of linear maps as exporters write them, the same for the same seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper

from onnx_lowrank.numerics.arrays import Array
from tests.helpers.models import ROUNDING, known_rank, uniform

__all__ = ["RANK", "Case", "random_graph"]

RANK = 2
"""The rank of every weight matrix."""

_SIZES = (12, 16, 20)
_KINDS = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(np.float64))
_BFLOAT = np.dtype(ml_dtypes.bfloat16)
_OPSETS = {3: 9, 4: 9, 5: 11, 6: 11, 7: 13, 8: 17, 9: 19, 10: 21}


@dataclass(frozen=True)
class Case:
    """A model and one sample for it.

    Attributes:
        model: the model.
        feeds: input -> array.
        kind: the element type that it computes in.
        coarsest: the element type, of that and those of its weights, that rounds most.
    """

    model: onnx.ModelProto
    feeds: dict[str, Array]
    kind: np.dtype[np.generic]
    coarsest: np.dtype[np.generic]


@dataclass
class _Value:
    """A value of the graph with the sizes that it has on the sample."""

    name: str
    shape: tuple[int, ...]


@dataclass
class _Builder:
    """A graph that grows node by node."""

    rng: np.random.Generator
    ir_version: int
    opset: int
    kind: np.dtype[np.generic]
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: list[onnx.TensorProto] = field(default_factory=list)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    feeds: dict[str, Array] = field(default_factory=dict)
    values: list[_Value] = field(default_factory=list)
    matrices: list[tuple[str, tuple[int, int]]] = field(default_factory=list)
    kinds: set[np.dtype[np.generic]] = field(default_factory=set)
    count: int = 0

    @property
    def element(self) -> int:
        return onnx.helper.np_dtype_to_tensor_dtype(self.kind)

    def name(self, base: str) -> str:
        self.count += 1
        return f"{base}{self.count}"

    def chance(self, share: float) -> bool:
        return bool(self.rng.random() < share)

    def node(self, op_type: str, inputs: list[str], shape: tuple[int, ...], **given: Any) -> str:
        out = self.name("v")
        node = onnx.helper.make_node(op_type, inputs, [out], name=self.name(op_type), **given)
        self.nodes.append(node)
        self.values.append(_Value(out, shape))
        return out

    def plain(self, op_type: str, inputs: list[str], **given: Any) -> str:
        """A node whose output no other step takes up."""
        out = self.node(op_type, inputs, (), **given)
        self.values.pop()
        return out

    def constant(self, array: Array, base: str = "W") -> str:
        """An initializer or a Constant node; before IR version 4 a Constant node, mostly."""
        name = self.name(base)
        self.kinds.add(array.dtype)
        tensor = onnx.numpy_helper.from_array(array, name)
        in_node = self.chance(0.9 if self.ir_version < 4 else 0.15)
        in_node = in_node and (self.opset >= 9 or array.dtype == self.kind)
        if in_node:
            self.nodes.append(onnx.helper.make_node("Constant", [], [name], value=tensor))
            return name
        self.weights.append(tensor)
        if self.ir_version < 4:
            info = onnx.helper.make_tensor_value_info(name, tensor.data_type, array.shape)
            self.inputs.append(info)
        return name

    def integers(self, *numbers: int) -> str:
        return self.constant(np.array(numbers, np.int64), "k")

    def matrix(self, m: int, n: int) -> str:
        """A matrix [m, n]: a new one, a shared one, or one behind Cast, Transpose or Reshape."""
        same = [name for name, shape in self.matrices if shape == (m, n)]
        if same and self.chance(0.3):
            return same[0]
        turned = [name for name, shape in self.matrices if shape == (n, m)]
        if turned and self.chance(0.3):
            return self.plain("Transpose", [turned[0]], perm=[1, 0])
        kind = self.kind
        cast = self.kind != _BFLOAT and self.chance(0.25)
        if cast:
            kind = _KINDS[self.rng.integers(len(_KINDS))]
        array = known_rank(m, n, min(RANK, m, n), self.rng, kind, scale=0.125)
        way = self.rng.integers(5)
        if way == 0:
            array = np.ascontiguousarray(array.T)
        elif way == 1:
            array = array.reshape(1, m * n)
        name = self.constant(array)
        if cast:
            name = self.plain("Cast", [name], to=self.element)
        if way == 0:
            name = self.plain("Transpose", [name])
        elif way == 1:
            name = self.plain("Reshape", [name, self.integers(m, n)])
        elif way == 2 and self.chance(0.3):
            name = self.plain("Identity", [name])
        self.matrices.append((name, (m, n)))
        return name

    def bias(self, *shape: int) -> str:
        return self.constant(uniform(shape, self.rng, self.kind), "b")

    def size(self) -> int:
        return int(self.rng.choice(_SIZES))


_Step = Callable[[_Builder, _Value], None]


def _right(build: _Builder, x: _Value) -> None:
    n = build.size()
    build.node("MatMul", [x.name, build.matrix(x.shape[-1], n)], (*x.shape[:-1], n))


def _left(build: _Builder, x: _Value) -> None:
    if len(x.shape) < 2:
        return
    *lead, m, columns = x.shape
    n = build.size()
    build.node("MatMul", [build.matrix(n, m), x.name], (*lead, n, columns))


def _batched(build: _Builder, x: _Value) -> None:
    if len(x.shape) < 3:
        return
    *_, e, _, m = x.shape
    n = build.size()
    array = known_rank(m, n, min(RANK, m, n), build.rng, build.kind, batch=(e,), scale=0.125)
    build.node("MatMul", [x.name, build.constant(array)], (*x.shape[:-1], n))


def _vector(build: _Builder, x: _Value) -> None:
    if len(x.shape) < 2:
        return
    vector = build.constant(uniform((x.shape[-1],), build.rng, build.kind))
    build.node("MatMul", [x.name, vector], x.shape[:-1])


def _gemm(build: _Builder, x: _Value) -> None:
    if len(x.shape) != 2:
        return
    turned = int(build.chance(0.3))
    rows, m = reversed(x.shape) if turned else x.shape
    n = int(build.rng.choice([*_SIZES, rows]))
    trans = int(build.chance(0.4))
    weight = build.matrix(n, m) if trans else build.matrix(m, n)
    ways: list[tuple[int, ...] | None] = [(n,), (n,), (1, n), (rows, 1), (rows, n), (1,), ()]
    if build.opset >= 11:
        ways += [None, None]
    shape = ways[build.rng.integers(len(ways))]
    inputs = [x.name, weight]
    if shape is not None:
        inputs.append(build.bias(*shape))
        if build.chance(0.15):
            inputs[2] = build.plain("Relu", [inputs[2]])
    elif build.chance(0.3):
        inputs.append("")
    scales = {"alpha": 0.5} if build.chance(0.3) else {}
    scales |= {"beta": 2.0} if build.chance(0.3) else {}
    build.node("Gemm", inputs, (rows, n), transA=turned, transB=trans, **scales)


def _add(build: _Builder, x: _Value) -> None:
    n = x.shape[-1] if x.shape else 1
    ways: list[tuple[int, ...]] = [(n,), (n,), (n,), (1,), (), (1, n)]
    if len(x.shape) < 4:
        ways.append((3, 1, 1, n))
    if len(x.shape) == 2:
        ways.append((x.shape[0], 1))
    shape = ways[build.rng.integers(len(ways))]
    sides = [x.name, build.bias(*shape)]
    build.node("Add", sides[:: -1 if build.chance(0.3) else 1], np.broadcast_shapes(x.shape, shape))


def _convolution(build: _Builder, x: _Value) -> None:
    if len(x.shape) not in (3, 4) or build.kind in (np.float64, _BFLOAT):
        return
    channels, n = x.shape[1], build.size()
    array = known_rank(n, channels, min(RANK, n, channels), build.rng, build.kind, scale=0.125)
    kernel = build.constant(array.reshape(n, channels, *[1] * (len(x.shape) - 2)))
    inputs = [x.name, kernel, *([build.bias(n)] if build.chance(0.5) else [])]
    build.node("Conv", inputs, (x.shape[0], n, *x.shape[2:]))


def _transpose(build: _Builder, x: _Value) -> None:
    perm = [int(axis) for axis in build.rng.permutation(len(x.shape))]
    build.node("Transpose", [x.name], tuple(x.shape[axis] for axis in perm), perm=perm)


def _activation(build: _Builder, x: _Value) -> None:
    build.node(str(build.rng.choice(["Tanh", "Relu", "Sigmoid", "Identity"])), [x.name], x.shape)


def _flatten(build: _Builder, x: _Value) -> None:
    """To two axes, with the sizes written down or computed as torch does it."""
    if not x.shape:
        return
    last = x.shape[-1]
    rows = int(np.prod(x.shape[:-1], dtype=int))
    if build.chance(0.5):
        build.node("Reshape", [x.name, build.integers(-1, last)], (rows, last))
        return
    shape = build.plain("Shape", [x.name])
    end = build.plain("Gather", [shape, build.integers(len(x.shape) - 1)], axis=0)
    target = build.plain("Concat", [build.integers(-1), end], axis=0)
    build.node("Reshape", [x.name, target], (rows, last))


def _deepen(build: _Builder, x: _Value) -> None:
    build.node("Reshape", [x.name, build.integers(1, *x.shape)], (1, *x.shape))


def _join(build: _Builder, x: _Value) -> None:
    same = [value for value in build.values if value.shape == x.shape]
    other = same[build.rng.integers(len(same))]
    build.node(str(build.rng.choice(["Add", "Mul"])), [x.name, other.name], x.shape)


def _branch(build: _Builder, x: _Value) -> None:
    """An If whose branches read values and weights of the graph around it."""
    if build.kind == _BFLOAT:
        return
    n = build.size()
    inner = []
    for op_type in ("Tanh", "Relu"):
        out, hidden = build.name("o"), build.name("h")
        weight = build.matrix(x.shape[-1], n) if x.shape else None
        nodes = [onnx.helper.make_node(op_type, [x.name], [hidden if weight else out])]
        if weight is not None:
            nodes.append(onnx.helper.make_node("MatMul", [hidden, weight], [out]))
        info = onnx.helper.make_tensor_value_info(out, build.element, None)
        inner.append(onnx.helper.make_graph(nodes, out, [], [info]))
    way = build.constant(np.array(build.chance(0.5)), "c")
    shape = (*x.shape[:-1], n) if x.shape else ()
    build.node("If", [way], shape, then_branch=inner[0], else_branch=inner[1])


def _sequence(build: _Builder, x: _Value) -> None:
    if build.opset < 11 or build.kind == _BFLOAT:
        return
    both = build.plain("SequenceConstruct", [x.name, x.name])
    build.node("SequenceAt", [both, build.constant(np.array(1, np.int64), "k")], x.shape)


def _cast(build: _Builder, x: _Value) -> None:
    if build.kind == _BFLOAT:
        return
    other = build.plain("Cast", [x.name], to=onnx.TensorProto.FLOAT)
    build.node("Cast", [other], x.shape, to=build.element)


_STEPS: tuple[_Step, ...] = (
    *(_right, _right, _right, _right, _left, _left, _left, _gemm, _gemm, _gemm, _add, _add),
    *(_batched, _vector, _convolution, _transpose, _activation, _activation, _flatten, _deepen),
    *(_join, _branch, _sequence, _cast),
)


def random_graph(seed: int) -> Case:
    """A model of two to eight steps, each of which takes a value of an earlier one."""
    rng = np.random.default_rng(seed)
    ir_version = int(rng.choice([3, 4, 7, 8, 8, 8, 9, 10]))
    kind = _KINDS[rng.choice([0, 0, 0, 0, 1, 2])]
    if ir_version >= 7 and rng.random() < 0.1:
        kind = _BFLOAT
    opset = 8 if ir_version == 3 and rng.random() < 0.5 else _OPSETS[ir_version]
    build = _Builder(rng, ir_version, opset, kind)
    for _ in range(rng.integers(1, 3)):
        shape = tuple(int(n) for n in rng.choice([1, 2, 3, 5, *_SIZES], rng.integers(1, 5)))
        shape = (*shape[:-1], build.size())
        name = build.name("x")
        axes = [n if rng.random() < 0.6 else f"{name}_{axis}" for axis, n in enumerate(shape)]
        build.inputs.append(onnx.helper.make_tensor_value_info(name, build.element, axes))
        build.feeds[name] = uniform(shape, rng, kind)
        build.values.append(_Value(name, shape))
    for _ in range(rng.integers(2, 9)):
        recent = build.values[-1 if rng.random() < 0.7 else rng.integers(len(build.values))]
        _STEPS[rng.integers(len(_STEPS))](build, recent)
    made = [value for value in build.values if value.name not in build.feeds]
    if not made:
        _activation(build, build.values[-1])
        made = build.values[-1:]
    given = [made[-1], *(value for value in made[:-1] if rng.random() < 0.2)]
    outputs = [_declared(build, value) for value in given]
    if rng.random() < 0.25 and build.weights:  # a weight that is given out too
        tensor = build.weights[rng.integers(len(build.weights))]
        info = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        outputs.append(info)
    graph = onnx.helper.make_graph(build.nodes, "random", build.inputs, outputs, build.weights)
    opset = onnx.helper.make_opsetid("", build.opset)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=ir_version)
    coarsest = max({kind, *build.kinds} & set(ROUNDING), key=ROUNDING.__getitem__)
    return Case(model, build.feeds, kind, coarsest)


def _declared(build: _Builder, value: _Value) -> onnx.ValueInfoProto:
    axes = [n if build.chance(0.4) else f"{value.name}_{i}" for i, n in enumerate(value.shape)]
    return onnx.helper.make_tensor_value_info(value.name, build.element, axes)
