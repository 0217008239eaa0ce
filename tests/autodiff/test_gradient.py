"""Derivatives against finite differences, operator by operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_lowrank.autodiff.derivatives.base import known_operators
from onnx_lowrank.autodiff.gradient import (
    Loss,
    differentiable,
    gradient_model,
    read_ranks,
)
from onnx_lowrank.errors import InputError
from onnx_lowrank.numerics.arrays import Array
from onnx_lowrank.runtime.session import open_session, run
from tests.helpers.models import parse


@dataclass(frozen=True)
class Case:
    """A body with the input x, the trained constants in `shapes`, and the output y."""

    name: str
    body: str
    shapes: dict[str, tuple[int, ...]] = field(default_factory=lambda: {"W": (3, 4)})
    x: tuple[int, ...] = (2, 3, 4)
    low: float = -1.5
    high: float = 1.5
    opset: int = 17
    symbolic: str | None = None

    def model(self) -> onnx.ModelProto:
        dims = self.symbolic or ",".join(str(size) for size in self.x)
        text = f"""
            <ir_version: 8, opset_import: ["" : {self.opset}, "com.microsoft" : 1]>
            graph (float[{dims}] x) => (float y) {{ {self.body} }}
        """
        rng = np.random.default_rng(len(self.name))
        weights = {
            name: rng.uniform(self.low, self.high, shape).astype(np.float32)
            for name, shape in self.shapes.items()
        }
        model = parse(text, weights)
        model.graph.output[0].type.tensor_type.ClearField("shape")
        return model


def unary(op: str, low: float = -1.5, high: float = 1.5, opset: int = 17) -> Case:
    return Case(op, f"h = {op}(W) y = Mul(x, h)", low=low, high=high, opset=opset)


ONE: dict[str, tuple[int, ...]] = {"W": (4, 5)}
CASES = [
    *(unary(op) for op in ("Neg", "Exp", "Sin", "Cos", "Erf", "Tanh", "Sigmoid", "Softplus")),
    *(unary(op) for op in ("Relu", "LeakyRelu<alpha = 0.2>", "Elu<alpha = 0.7>", "Abs")),
    *(unary(op, -4.5, 4.5) for op in ("HardSigmoid", "HardSwish")),
    *(unary(op, opset=20) for op in ("Gelu", 'Gelu<approximate = "tanh">', "Mish")),
    *(unary(op, 0.5, 2.0) for op in ("Log", "Sqrt", "Reciprocal")),
    unary("com.microsoft.Gelu"),
    unary("com.microsoft.QuickGelu<alpha = 1.7>"),
    *(unary(op) for op in ("Identity", "Dropout")),
    Case("add", "y = Add(x, W)"),
    Case("add a scalar", "y = Add(x, W)", {"W": ()}),
    Case("add, axis of one", "h = Mul(x, W) y = Add(h, V)", {"W": (3, 1), "V": (2, 1, 4)}),
    Case("add, sizes unknown", "h = Add(x, W) y = Mul(h, h)", symbolic="a,b,c"),
    Case("add, both sides wide", "h = Mul(x, W) g = Mul(h, V) y = Add(h, g)",
         {"W": (1, 4), "V": (2, 1, 1)}, symbolic="a,b,c"),
    Case("sub", "y = Sub(W, x)"),
    Case("sub, second", "y = Sub(x, W)"),
    Case("div", "h = Div(x, W) y = Div(W, h)", low=1.0, high=2.0, x=(3, 4)),
    Case("sum and mean", "h = Sum(x, W, W) y = Mean(h, W)"),
    Case("pow", "p = Constant<value = float {3.0}>() y0 = Pow(W, p) y = Mul(x, y0)"),
    Case("pow, whole", "p = Constant<value = int64 {2}>() y0 = Pow(W, p) y = Mul(x, y0)"),
    Case("where", "z = Constant<value = float {0.1}>() c = Greater(x, z) h = Mul(W, W) "
         "y = Where(c, W, h)"),
    Case("max and min", "h = Max(x, W) g = Min(x, W) k = Mul(h, h) y = Add(k, g)"),
    Case("clip", "a = Constant<value = float {-0.5}>() b = Constant<value = float {0.6}>() "
         "h = Clip(W, a, b) y = Mul(x, h)"),
    Case("prelu", "c = Constant<value = float {0.9}>() h = Sub(x, c) y = PRelu(h, W)",
         {"W": (3, 1)}),
    Case("prelu, input", "s = Constant<value = float[1] {0.3}>() h = Mul(x, W) y = PRelu(h, s)"),
    Case("flat", "h = Floor(W) g = Mul(W, x) y = Add(h, g)"),
    Case("cast", "h = Cast<to = 11>(W) g = Cast<to = 1>(h) y = Mul(x, g)"),
    *(Case(f"scales, {name}",
           "q = Constant<value = int8[3,4] {5,-3,2,7,1,0,-8,4,6,-2,3,-1}>() "
           f"h = DequantizeLinear{attributes}(q, W) g = Sin(h) y = Mul(x, g)",
           {"W": shape}, low=0.1, high=0.4, opset=21)
      for name, attributes, shape in (
          ("blocks", "<axis = 1, block_size = 2>", (3, 2)),
          ("a block that is not full", "<axis = 0, block_size = 2>", (2, 4)),
          ("columns", "", (4,)),
          ("rows", "<axis = 0>", (3,)),
          ("all", "", ()),
      )),
    Case("matmul", "y = MatMul(x, W)", ONE),
    Case("matmul, left", "y = MatMul(W, x)", {"W": (5, 3)}),
    Case("matmul, chain", "h = MatMul(x, W) g = Tanh(h) y = MatMul(g, V)",
         {"W": (4, 2), "V": (2, 5)}, symbolic="a,b,c"),
    Case("matmul, batch", "h = Mul(x, V) y = MatMul(h, W)", {"V": (3, 4), "W": (2, 4, 5)}),
    Case("matmul, repeated batch", "h = Mul(x, V) y = MatMul(h, W)",
         {"V": (3, 4), "W": (1, 4, 5)}),
    Case("matmul, more axes", "h = Mul(x, V) y = MatMul(h, W)",
         {"V": (3, 4), "W": (5, 2, 4, 3)}, symbolic="a,b,c"),
    Case("matmul, vector", "h = Mul(x, V) y = MatMul(h, W)", {"V": (4,), "W": (4,)}, x=(3, 4)),
    Case("matmul, two vectors", "y = MatMul(V, W)", {"V": (4,), "W": (4,)}),
    Case("matmul, row", "y = MatMul(V, W)", {"V": (4,), "W": (4, 5)}),
    *(Case(f"fused matmul {a}{b}",
           f"h = Mul(x, V) y = com.microsoft.FusedMatMul<transA = {a}, transB = {b}, alpha = 0.5>"
           "(h, W)",
           {"V": (3, 4), "W": ((2, 5, 3) if b else (2, 3, 5)) if a else
            ((2, 5, 4) if b else (2, 4, 5))}) for a in (0, 1) for b in (0, 1)),
    *(Case(f"gemm {a}{b}",
           f"h = Mul(x, V) y = Gemm<transA = {a}, transB = {b}, alpha = 0.5, beta = 2.0>(h, W, c)",
           {"V": (3, 4), "W": ((5, 3) if b else (3, 5)) if a else ((5, 4) if b else (4, 5)),
            "c": (5,)}, x=(3, 4)) for a in (0, 1) for b in (0, 1)),
    Case("einsum", 'h = Mul(x, V) y = Einsum<equation = "bij,jk->bik">(h, W)',
         {"V": (3, 4), "W": (4, 5)}),
    Case("reshape", "s = Constant<value = int64[2] {4, -1}>() h = Mul(x, W) g = Reshape(h, s) "
         "y = Mul(g, g)"),
    Case("flatten", "h = Mul(x, W) y = Flatten(h)"),
    Case("squeeze", "a = Constant<value = int64[1] {0}>() h = Unsqueeze(W, a) g = Mul(h, h) "
         "k = Squeeze(g, a) y = Mul(x, k)"),
    Case("transpose", "h = Mul(x, W) g = Transpose<perm = [1, 2, 0]>(h) k = Transpose(g) "
         "y = Mul(k, k)"),
    Case("expand", "s = Constant<value = int64[3] {2, 3, 4}>() h = Expand(W, s) y = Mul(h, x)",
         {"W": (3, 1)}),
    Case("concat", "h = Mul(x, W) g = Mul(h, h) y = Concat<axis = 1>(x, h, g)"),
    Case("concat, negative axis", "h = Mul(x, W) y = Concat<axis = -1>(h, x)", symbolic="a,b,c"),
    Case("split", "s = Constant<value = int64[2] {1, 3}>() h = Mul(x, W) "
         "a, b = Split<axis = 2>(h, s) y = Mul(a, b)"),
    Case("split, one part unread", "s = Constant<value = int64[3] {1, 1, 2}>() h = Mul(x, W) "
         "a, b, c = Split<axis = -1>(h, s) y = Mul(c, c)"),
    Case("slice", "b = Constant<value = int64[2] {-3, 1}>() e = Constant<value = int64[2] {9, 3}>()"
         " a = Constant<value = int64[2] {2, 1}>() h = Mul(x, W) y = Slice(h, b, e, a)"),
    Case("slice, no axes", "b = Constant<value = int64[1] {1}>() e = Constant<value = int64[1] {2}>"
         "() h = Mul(x, W) y = Slice(h, b, e)"),
    Case("slice, steps", "b = Constant<value = int64[1] {3}>() e = Constant<value = int64[1] {-9}>"
         "() a = Constant<value = int64[1] {2}>() s = Constant<value = int64[1] {-2}>() "
         "h = Mul(x, W) y = Slice(h, b, e, a, s)"),
    Case("gather, one", "i = Constant<value = int64 {-2}>() h = Mul(x, W) "
         "y = Gather<axis = 1>(h, i)", symbolic="a,b,c"),
    Case("gather, rows", "i = Constant<value = int64[2, 2] {0, 2, 2, 1}>() y = Gather(W, i)"),
    Case("gather, columns", "i = Constant<value = int64[3] {0, 2, 2}>() h = Mul(x, W) "
         "y = Gather<axis = 2>(h, i)"),
    Case("gather elements", "i = Constant<value = int64[1, 4] {0, 2, 2, 1}>() "
         "y = GatherElements(W, i)"),
    Case("tile", "r = Constant<value = int64[2] {2, 1}>() h = Tile(W, r) y = Mul(h, h)"),
    Case("pad", "p = Constant<value = int64[4] {1, 0, 0, 2}>() h = Mul(W, W) g = Pad(h, p) "
         "y = Mul(g, g)"),
    *(Case(f"{op} {keep}", f"a = Constant<value = int64[1] {{1}}>() h = Mul(x, W) "
           f"y = ReduceSum<keepdims = {keep}>(h, a)") for op in ("sum",) for keep in (0, 1)),
    Case("sum of all", "h = Mul(x, W) y = ReduceSum<keepdims = 0>(h)"),
    *(Case(f"{op} {keep}", f"h = Mul(x, W) y = {op}<keepdims = {keep}, axes = [1, -1]>(h)")
      for op in ("ReduceMean", "ReduceL2", "ReduceSumSquare", "ReduceMax", "ReduceMin")
      for keep in (0, 1)),
    Case("mean, axes as input", "a = Constant<value = int64[1] {1}>() h = Mul(x, W) "
         "y = ReduceMean<keepdims = 0>(h, a)", opset=18, symbolic="a,b,c"),
    Case("softmax", "h = Mul(x, W) y = Softmax<axis = -1>(h)"),
    Case("softmax, first axis", "h = Mul(x, W) y = Softmax<axis = 1>(h)"),
    Case("log softmax", "h = Mul(x, W) y = LogSoftmax(h)"),
    Case("layer norm", "h = Mul(x, W) y = LayerNormalization(h, s, b)",
         {"W": (3, 4), "s": (4,), "b": (4,)}),
    Case("layer norm, two axes", "h = Mul(x, W) y = LayerNormalization<axis = 1>(h, s, b)",
         {"W": (3, 4), "s": (3, 4), "b": (3, 4)}, symbolic="a,b,c"),
    Case("batch norm", "m = Constant<value = float[3] {0.1, 0.2, 0.3}>() v = Constant<value = "
         "float[3] {1.0, 2.0, 0.5}>() h = Mul(x, W) y = BatchNormalization(h, s, b, m, v)",
         {"W": (3, 4), "s": (3,), "b": (3,)}),
]  # fmt: skip


def recurrent(
    op: str, way: str, *, more: str = "", states: bool = False, outputs: str = ""
) -> Case:
    """A cell of 3 elements on 5 steps of 2 samples with 4 elements."""
    gates, d = {"LSTM": 4, "GRU": 3, "RNN": 1}[op], 2 if way == "bidirectional" else 1
    shapes: dict[str, tuple[int, ...]] = {
        "V": (4,),
        "W": (d, gates * 3, 4),
        "R": (d, gates * 3, 3),
        "B": (d, 2 * gates * 3),
    }
    inputs = "h, W, R, B"
    if states:
        shapes |= {"H": (d, 2, 3)} | ({"C": (d, 2, 3)} if op == "LSTM" else {})
        inputs += ", , H" + (", C" if op == "LSTM" else "")
    body = f'h = Mul(x, V) {outputs or "y"} = {op}<hidden_size = 3, direction = "{way}"{more}>'
    body += f"({inputs})"
    if outputs:
        names = [name for name in outputs.replace(" ", "").split(",") if name]
        body += "".join(
            f" s{n} = ReduceSumSquare<axes = [0, 1], keepdims = 0>({name})"
            for n, name in enumerate(names)
        )
        body += " y = Sum(" + ", ".join(f"s{n}" for n in range(len(names))) + ")"
    name = " ".join(filter(None, (op, way, more, outputs)))
    return Case(name, body, shapes, (5, 2, 4), low=-0.9, high=0.9, symbolic="a,b,4")


WAYS = ("forward", "reverse", "bidirectional")
RECURRENT = [
    *(recurrent(op, way) for op in ("LSTM", "GRU", "RNN") for way in WAYS),
    *(recurrent("GRU", way, more=", linear_before_reset = 1") for way in WAYS),
    *(recurrent("LSTM", way, states=True, outputs="a, b, c") for way in WAYS),
    *(recurrent(op, way, states=True, outputs="a, b") for op in ("GRU", "RNN") for way in WAYS),
    recurrent("LSTM", "forward", outputs=", , c"),
    recurrent("GRU", "reverse", outputs=", b"),
]  # fmt: skip

IMAGE = (2, 3, 7, 6)
KERNEL = {"V": (1, 6), "W": (4, 3, 3, 2), "b": (4,)}
CONVOLUTIONS = [
    Case(f"conv {attributes}", f"h = Mul(x, V) y = Conv<{attributes}>(h, W, b)", KERNEL, IMAGE)
    for attributes in (
        "group = 1",
        "pads = [1, 1, 1, 0]",
        "strides = [2, 2]",
        "strides = [2, 3], pads = [1, 0, 2, 1]",
        "strides = [3, 2], dilations = [2, 1]",
        "dilations = [2, 2], pads = [2, 1, 2, 1]",
    )
] + [
    Case("conv, depthwise", "w = Constant<value = float[3, 1, 2, 2] "
         "{1,2,3,4,5,6,7,8,9,1,2,3}>() h = Mul(x, W) y = Conv<group = 3, strides = [2, 1]>(h, w)",
         {"W": (1, 6)}, IMAGE),
    Case("conv, one axis", "h = Mul(x, V) y = Conv<strides = [2]>(h, W)",
         {"V": (4,), "W": (5, 3, 2)}),
    Case("max pool", "h = Mul(x, W) y = MaxPool<kernel_shape = [3, 2], strides = [2, 1], "
         "pads = [1, 0, 0, 1]>(h)", {"W": (1, 6)}, IMAGE),
    Case("average pool", "h = Mul(x, W) y = AveragePool<kernel_shape = [3, 2], strides = [2, 2]>"
         "(h)", {"W": (1, 6)}, IMAGE, symbolic="a,b,c,d"),
    Case("average pool, padded", "h = Mul(x, W) y = AveragePool<kernel_shape = [3, 2], "
         "pads = [1, 0, 1, 1], count_include_pad = 1>(h)", {"W": (1, 6)}, IMAGE),
    Case("global pool", "h = Mul(x, W) y = GlobalAveragePool(h)", {"W": (1, 6)}, IMAGE),
]  # fmt: skip


def runner(model: ir.Model) -> Callable[[Mapping[str, Array]], dict[str, Array]]:
    session = open_session(ir.to_proto(model).SerializeToString(), threads=1)
    known = {item.name for item in session.get_inputs()}
    return lambda feed: run(session, {k: v for k, v in feed.items() if k in known}, "a model")


@pytest.mark.parametrize("case", [*CASES, *CONVOLUTIONS, *RECURRENT], ids=lambda case: case.name)
def test_derivative_is_the_slope(case: Case) -> None:
    rng = np.random.default_rng(7)
    model = ir.from_proto(case.model())
    trained = list(case.shapes)
    base = differentiable(model, trained)
    values = {name: model.graph.initializers[name].const_value for name in trained}
    start = {name: value.numpy() for name, value in values.items() if value is not None}
    x = rng.uniform(0.3, 1.5, case.x).astype(np.float32)
    feed = {"x": x, **start}
    y = runner(base)(feed)["y"]
    names = Loss.of("y")
    given = {
        names.target: y - rng.normal(size=y.shape).astype(np.float32),
        names.weight: rng.uniform(0.5, 1.0, y.shape).astype(np.float32),
    }
    found = gradient_model(base, ["y"], trained, read_ranks(base, trained, runner, feed))
    call = runner(found.model)

    def outputs(arrays: dict[str, Array]) -> dict[str, Array]:
        return call({"x": x, **arrays, **given})

    slopes = outputs(start)
    assert set(found.outputs) == set(trained)
    for name in trained:
        slope = slopes[found.outputs[name]]
        assert slope.shape == start[name].shape
        assert np.abs(slope).max() > 1e-3
        for _ in range(3):
            way = rng.choice([-1.0, 1.0], start[name].shape).astype(np.float32)
            step = np.float32(2e-3)
            ahead = outputs({**start, name: start[name] + step * way})[names.loss]
            behind = outputs({**start, name: start[name] - step * way})[names.loss]
            expected = (float(ahead) - float(behind)) / (2 * float(step))
            scale = np.linalg.norm(slope) + 1e-3 * float(ahead) / float(step)
            assert abs(float((slope * way).sum()) - expected) < 0.02 * scale


def test_every_derivative_is_tested() -> None:
    tested = {
        ("com.microsoft" if node.domain == "com.microsoft" else "", node.op_type)
        for case in (*CASES, *CONVOLUTIONS, *RECURRENT)
        for node in case.model().graph.node
    }
    untested = known_operators() - tested
    assert not untested - {("", "Sign"), ("", "Ceil"), ("", "Round"), ("", "GatherND")}


def test_an_operator_without_a_derivative_is_named() -> None:
    model = parse(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        graph (float[2, 3] x) => (float[2, 3] y) {
            h = MatMul (x, W)
            [odd] y = CumSum (h, axis)
        }
        """,
        {"W": np.ones((3, 3), np.float32), "axis": np.array(1, np.int64)},
    )
    base = differentiable(ir.from_proto(model), ["W"])
    with pytest.raises(InputError, match="operator CumSum at node 'odd' has no derivative"):
        gradient_model(base, ["y"], ["W"], {})


@pytest.mark.parametrize(
    ("attributes", "inputs", "why"),
    [
        (", clip = 1.0", "h, W, R", "clip"),
        (", input_forget = 1", "h, W, R", "input_forget"),
        (', activations = ["Relu", "Tanh", "Tanh"]', "h, W, R", "other activations"),
        (", layout = 1", "h, W, R", "batch first"),
        ("", "h, W, R, , l", "several lengths"),
        ("", "h, W, R, , , , , P", "peepholes"),
    ],
)
def test_what_a_cell_may_be_told_is_named(attributes: str, inputs: str, why: str) -> None:
    model = parse(
        f"""
        <ir_version: 8, opset_import: ["" : 17]>
        graph (float[5, 2, 4] x) => (float y) {{
            h = MatMul (x, V)
            [cell] y = LSTM <hidden_size = 3{attributes}> ({inputs})
        }}
        """,
        {
            "V": np.ones((4, 4), np.float32),
            "W": np.ones((1, 12, 4), np.float32),
            "R": np.ones((1, 12, 3), np.float32),
            "l": np.array([5, 4], np.int32),
            "P": np.ones((1, 9), np.float32),
        },
    )
    base = differentiable(ir.from_proto(model), ["V"])
    with pytest.raises(InputError, match=f"LSTM at node 'cell' with .*{why}"):
        gradient_model(base, ["y"], ["V"], {"h": 3})


def test_a_subgraph_between_is_named() -> None:
    model = parse(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        graph (float[2, 3] x, bool c) => (float[2, 3] y) {
            h = MatMul (x, W)
            y = If (c) <
                then_branch = yes () => (float[2, 3] a) { a = Tanh (h) },
                else_branch = no () => (float[2, 3] b) { b = Neg (h) }
            >
        }
        """,
        {"W": np.ones((3, 3), np.float32)},
    )
    base = differentiable(ir.from_proto(model), ["W"])
    with pytest.raises(InputError, match=r"operator If .* has subgraphs"):
        gradient_model(base, ["y"], ["W"], {})


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_floats_are_differentiated_in_float32(dtype: type) -> None:
    kind = {np.float16: "float16", ml_dtypes.bfloat16: "bfloat16", np.float64: "double"}[dtype]
    model = parse(
        f"""
        <ir_version: 8, opset_import: ["" : 17]>
        graph ({kind}[2, 3] x) => ({kind}[2, 3] y) {{
            c = Constant <value = float {{2.0}}> ()
            d = CastLike (c, x)
            h = MatMul (x, W)
            y = Mul (h, d)
        }}
        """,
        {"W": np.eye(3).astype(dtype)},
    )
    base = differentiable(ir.from_proto(model), ["W"])
    found = gradient_model(base, ["y"], ["W"], {})
    session = open_session(ir.to_proto(found.model).SerializeToString(), threads=1)
    assert {item.type for item in session.get_inputs()} == {"tensor(float)"}
    assert {item.type for item in session.get_outputs()} == {"tensor(float)"}
    names = Loss.of("y")
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    slopes = run(
        session,
        {
            "x": x,
            "W": np.eye(3, dtype=np.float32),
            names.target: np.zeros((2, 3), np.float32),
            names.weight: np.ones((1, 1), np.float32),
        },
        "it",
    )
    np.testing.assert_allclose(slopes[found.outputs["W"]], 8.0 * x.T @ x, rtol=1e-5)


def test_old_operator_sets_are_converted() -> None:
    model = parse(
        """
        <ir_version: 4, opset_import: ["" : 9]>
        graph (float[2, 3] x) => (float[2] y) {
            h = MatMul (x, W)
            g = Softmax <axis = 1> (h)
            y = ReduceSum <axes = [1], keepdims = 0> (g)
        }
        """,
        {"W": np.eye(3, dtype=np.float32)},
    )
    base = differentiable(ir.from_proto(model), ["W"])
    assert base.opset_imports[""] == 17
    gradient_model(base, ["y"], ["W"], {})


@pytest.mark.parametrize("dtype", ["float16", "double"])
def test_the_model_keeps_its_types(dtype: str) -> None:
    """The copy is of float32; what is cloned may share objects with the original."""
    kind = {"float16": np.float16, "double": np.float64}[dtype]
    proto = parse(
        f"""<ir_version: 8, opset_import: ["": 17]>
        agraph ({dtype}[N, 4] x) => ({dtype}[N, 3] y) <{dtype}[4, 3] w> {{ y = MatMul(x, w) }}""",
        {"w": np.ones((4, 3), kind)},
    )
    model = ir.from_proto(proto)
    copy = differentiable(model, ["w"])
    assert {value.dtype for value in copy.graph.inputs} == {ir.DataType.FLOAT}
    assert ir.to_proto(model) == ir.to_proto(ir.from_proto(proto))
