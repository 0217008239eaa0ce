"""Random graphs of the forms: result and original agree as far as the factors say.

A layer's output differs by ``|α|·‖x (W − A·B)‖ ≤ |α|·‖x‖·‖W − A·B‖``, and the report says how
large the last is.  Every layer here reads an input of the model and gives an output of it, so
the bound is one layer's; a second test chains layers whose rank is exact.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import onnx
import onnx.checker
import onnx.numpy_helper
import pytest
from onnx import helper

from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.schema.layer import Layer
from tests.helpers.models import (
    all_graph_protos,
    all_node_protos,
    as_proto,
    assert_same,
    factored,
    known_rank,
    parameters,
    run_ort,
    run_reference,
    uniform,
)

T = TypeVar("T")
SEEDS = range(40)
SIZES = (1, 3, 8, 12, 16, 24, 33)


@dataclass
class Weight:
    """An initializer, and the matrix that it holds."""

    name: str
    array: Array


@dataclass
class Linear:
    """One layer: its node, input and output, the factor α, ‖W‖, and whether it is in an If."""

    name: str
    x: str
    y: str
    scale: float
    norm: float
    inside: bool


@dataclass
class Builder:
    """A random model, made piece by piece."""

    rng: np.random.Generator
    dtype: npt.DTypeLike
    exact: bool
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: list[Weight] = field(default_factory=list)
    feeds: dict[str, Array] = field(default_factory=dict)
    outputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    layers: list[Linear] = field(default_factory=list)
    owned: set[str] = field(default_factory=set)
    count: int = 0

    @property
    def kind(self) -> int:
        return helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))

    def name(self, what: str) -> str:
        self.count += 1
        return f"{what}{self.count}"

    def pick(self, *options: T) -> T:
        return options[int(self.rng.integers(len(options)))]

    def weight(self, m: int, n: int, batch: tuple[int, ...] = ()) -> Weight:
        """A new weight of this shape, or one of any shape that is there already."""
        shape = (*batch, m, n)
        same = [weight for weight in self.weights if weight.array.ndim == len(shape)]
        if same and self.rng.random() < 0.5:
            return self.pick(*same)
        if self.exact or self.rng.random() < 0.3:
            array = known_rank(m, n, max(1, min(m, n) // 4), self.rng, self.dtype, batch=batch)
        else:
            array = uniform(shape, self.rng, self.dtype)
            if self.rng.random() < 0.5:  # a spectrum that falls
                array = (array * np.geomspace(1, 1e-3, n)).astype(self.dtype)
        weight = Weight(self.name("W"), array)
        self.weights.append(weight)
        return weight

    def input(self, *shape: int) -> str:
        """An input of the model, sometimes one that is there already."""
        same = [name for name, array in self.feeds.items() if array.shape == shape]
        if same and self.rng.random() < 0.5:
            return str(self.pick(*same))
        name = self.name("x")
        self.feeds[name] = uniform(shape, self.rng, self.dtype)
        return name

    def behind(self, weight: Weight, nodes: list[onnx.NodeProto]) -> tuple[str, tuple[int, ...]]:
        """The weight, or something that a chain of nodes makes of it: its name and shape."""
        name, shape = weight.name, weight.array.shape
        for _ in range(self.pick(0, 0, 1, 2)):
            after = self.name("c")
            if self.rng.random() < 0.5:
                perm = [*range(len(shape) - 2), len(shape) - 1, len(shape) - 2]
                nodes.append(helper.make_node("Transpose", [name], [after], perm=perm))
                shape = (*shape[:-2], shape[-1], shape[-2])
            else:
                nodes.append(helper.make_node("Identity", [name], [after]))
            name = after
        return name, shape

    def layer(self, inside: bool) -> tuple[list[onnx.NodeProto], str, tuple[int, ...]]:
        """The nodes of one more layer, its output and that one's shape."""
        rows, m, n = self.pick(1, 2, 5), self.pick(*SIZES), self.pick(*SIZES)
        form = self.pick("matmul", "matmul 3-D", "left", "gemm", "gemm left", "batch")
        weight = self.weight(m, n, (self.pick(2, 3),) if form == "batch" else ())
        nodes: list[onnx.NodeProto] = []
        w, shape = self.behind(weight, nodes)
        name, y, scale = self.name("node"), self.name("y"), 1.0
        (*batch, first, second) = shape
        if form in ("matmul", "matmul 3-D", "batch"):
            lead = (*batch, rows) if form == "batch" else (3, rows) if "3-D" in form else (rows,)
            x, out = self.input(*lead, first), (*lead, second)
            nodes.append(helper.make_node("MatMul", [x, w], [y], name))
        elif form == "left":
            x, out = self.input(second, rows), (first, rows)
            nodes.append(helper.make_node("MatMul", [w, x], [y], name))
        else:
            trans_a, trans_b, scale = self.pick(0, 1), self.pick(0, 1), self.pick(1.0, -0.5, 2.0)
            if form == "gemm":
                inner, outer = (second, first) if trans_b else (first, second)
                x = self.input(*((inner, rows) if trans_a else (rows, inner)))
                operands, out = [x, w], (rows, outer)
            else:
                inner, outer = (first, second) if trans_a else (second, first)
                x = self.input(*((rows, inner) if trans_b else (inner, rows)))
                operands, out = [w, x], (outer, rows)
            if self.rng.random() < 0.5:
                operands.append(self.input(*self.pick(out, (out[1],), (out[0], 1), (1,))))
            nodes.append(
                helper.make_node(
                    "Gemm",
                    operands,
                    [y],
                    name,
                    transA=trans_a,
                    transB=trans_b,
                    alpha=scale,
                    beta=self.pick(1.0, 0.5),
                )
            )
        norm = float(np.linalg.norm(weight.array.astype(np.float64).ravel()))
        self.layers.append(Linear(name, x, y, abs(scale), norm, inside))
        return nodes, y, out

    def value(self, name: str, shape: tuple[int, ...]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, self.kind, shape)

    def add_layer(self) -> None:
        nodes, y, shape = self.layer(inside=False)
        self.nodes += nodes
        self.outputs.append(self.value(y, shape))

    def add_branch(self) -> None:
        """A layer in an If; the other branch gives zeros of its shape."""
        nodes, y, shape = self.layer(inside=True)
        zero, out = self.name("zero"), self.name("out")
        other = helper.make_node(
            "Constant", [], [zero], value=onnx.numpy_helper.from_array(np.zeros(shape, self.dtype))
        )
        outer = [*nodes[:-1]] if self.rng.random() < 0.5 else []
        own = nodes[len(outer) :]
        initializers = []
        unread = [w for w in self.weights if not self.reads(w.name, [*self.nodes, *outer])]
        for weight in unread:  # only this branch reads it: it may own it
            if self.reads(weight.name, own) and self.rng.random() < 0.5:
                initializers.append(onnx.numpy_helper.from_array(weight.array, weight.name))
                self.owned.add(weight.name)
        self.nodes += outer
        then = helper.make_graph(own, self.name("g"), [], [self.value(y, shape)], initializers)
        els = helper.make_graph([other], self.name("g"), [], [self.value(zero, shape)])
        self.nodes.append(
            helper.make_node(
                "If", ["go"], [out], self.name("if"), then_branch=then, else_branch=els
            )
        )
        self.outputs.append(self.value(out, shape))
        self.layers[-1].y = out

    @staticmethod
    def reads(name: str, nodes: list[onnx.NodeProto]) -> bool:
        wrapper = helper.make_model(helper.make_graph(nodes, "g", [], []))
        return any(name in node.input for node in all_node_protos(wrapper))

    def model(self) -> onnx.ModelProto:
        inputs = [self.value(name, array.shape) for name, array in self.feeds.items()]
        if any(node.op_type == "If" for node in self.nodes):
            inputs.append(helper.make_tensor_value_info("go", onnx.TensorProto.BOOL, ()))
            self.feeds["go"] = np.array(True)
        graph = helper.make_graph(
            self.nodes,
            "fuzz",
            inputs,
            self.outputs,
            [
                onnx.numpy_helper.from_array(weight.array, weight.name)
                for weight in self.weights
                if weight.name not in self.owned
            ],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def build(seed: int, *, exact: bool) -> tuple[Builder, onnx.ModelProto]:
    rng = np.random.default_rng(seed)
    builder = Builder(rng, (np.float32, np.float64)[seed % 2], exact)
    for _ in range(int(rng.integers(1, 7))):
        # A weight that a branch owns cannot be read outside of it.
        shared = [weight for weight in builder.weights if weight.name in builder.owned]
        builder.weights = [weight for weight in builder.weights if weight not in shared]
        if rng.random() < 0.3:
            builder.add_branch()
        else:
            builder.add_layer()
        builder.weights += shared
    model = builder.model()
    onnx.checker.check_model(model, full_check=True)
    return builder, model


def rounding(dtype: npt.DTypeLike) -> float:
    return 2e-5 if np.dtype(dtype) == np.float32 else 1e-13


@pytest.mark.parametrize("seed", SEEDS)
def test_outputs_differ_by_no_more_than_the_factors_imply(seed: int) -> None:
    builder, model = build(seed, exact=False)
    rng = builder.rng
    goal: dict[str, Any] = builder.pick(
        {"energy": float(rng.uniform(0.3, 1.0))},
        {"keep": float(rng.uniform(0.1, 1.0))},
        {"rank": int(rng.integers(1, 8))},
    )
    options = {"min_gain": builder.pick(-1.0, 0.0, 0.1, 0.5), "rank_multiple": builder.pick(1, 4)}
    result = factored(model, **goal, **options)
    after = as_proto(result.model)
    rows: dict[str, Layer] = {row.name: row for row in result.report.layers}
    assert set(rows) == {layer.name for layer in builder.layers}
    if options["min_gain"] >= 0:
        assert parameters(after) <= parameters(model)
    assert result.report.output.parameters == parameters(after, integers=True)
    for run in (run_ort, run_reference):
        before, found = run(model, builder.feeds), run(after, builder.feeds)
        for layer in builder.layers:
            row = rows[layer.name]
            implied = layer.scale * layer.norm * (row.weight_error or 0.0)
            x = float(np.linalg.norm(builder.feeds[layer.x].ravel()))
            slack = rounding(builder.dtype) * (layer.scale * layer.norm * x + 10)
            off = float(np.linalg.norm((found[layer.y] - before[layer.y]).ravel()))
            assert off <= implied * x * (1 + 1e-6) + slack, (layer, row)
            if row.status == "dense":
                assert off <= slack


@pytest.mark.parametrize("seed", SEEDS)
def test_the_right_rank_is_the_same_model(seed: int) -> None:
    builder, model = build(1000 + seed, exact=True)
    result = factored(model, energy=1.0, min_gain=builder.pick(-1.0, 0.0), rank_multiple=1)
    for row in result.report.layers:
        assert row.shape is not None
        m, n = row.shape
        if row.status == "factored":
            assert row.rank == max(1, min(m, n) // 4)
            assert row.weight_error is not None
            assert row.weight_error < 1e-6
    before = run_ort(model, builder.feeds)
    after = run_ort(result.model, builder.feeds)
    for name, array in before.items():
        scale = np.linalg.norm(array.ravel()) + 1
        assert np.linalg.norm((after[name] - array).ravel()) <= 20 * rounding(builder.dtype) * scale


def test_the_random_models_are_of_every_kind() -> None:
    """Otherwise the tests above would not say what they seem to."""
    ops, factored_in, shared, owned = set(), set(), 0, 0
    for seed in SEEDS:
        builder, model = build(seed, exact=True)
        ops |= {node.op_type for node in all_node_protos(model)}
        owned += sum(len(graph.initializer) for graph in list(all_graph_protos(model))[1:])
        report = factored(model, energy=1.0, min_gain=0.0, rank_multiple=1).report
        inside = {layer.name: layer.inside for layer in builder.layers}
        for row in report.layers:
            shared += row.shared > 0
            if row.status == "factored":
                factored_in.add((row.form, inside[row.name]))
    assert ops >= {"MatMul", "Gemm", "Transpose", "Identity", "If", "Constant"}
    assert {form for form, _ in factored_in} == {
        "matmul-left",
        "matmul-right",
        "gemm-left",
        "gemm-right",
    }
    assert {where for _, where in factored_in} == {True, False}
    assert shared > 5
    assert owned > 2


@pytest.mark.parametrize("seed", range(12))
def test_chained_layers_of_exact_rank(seed: int) -> None:
    rng = np.random.default_rng(seed)
    d = int(rng.choice([12, 16, 20]))
    nodes: list[onnx.NodeProto] = []
    weights: dict[str, Array] = {}
    x = "x"
    for index in range(int(rng.integers(2, 6))):
        name = f"W{index}"
        if weights and rng.random() < 0.4:
            name = str(rng.choice(list(weights)))
        else:
            weights[name] = known_rank(d, d, 3, rng, np.float64, scale=0.25)
        kind = str(rng.choice(["MatMul", "Gemm", "left"]))
        h, y = f"h{index}", f"y{index}"
        if kind == "Gemm":
            nodes.append(helper.make_node("Gemm", [x, name], [h], transB=int(rng.integers(2))))
        else:
            operands = [name, x] if kind == "left" else [x, name]
            nodes.append(helper.make_node("MatMul", operands, [h]))
        nodes.append(helper.make_node("Tanh", [h], [y]))
        x = y
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "chain",
        [value("x", onnx.TensorProto.DOUBLE, (d, d))],
        [value(x, onnx.TensorProto.DOUBLE, (d, d))],
        [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    result = factored(model, energy=1.0, rank_multiple=1)
    assert {layer.rank for layer in result.report.layers} == {3}
    assert parameters(result.model) == len(weights) * 6 * d
    assert_same(model, result.model, {"x": uniform((d, d), rng, np.float64)}, within=1e-11)
